"""Flags of the commands that run a model: its directory, how it runs, and all of `settings.SETTINGS`."""

from absl import flags

from dalle2_jax.generate.settings import SETTINGS, by_role
from dalle2_jax.models.stages.settings import Setting
from dalle2_jax.runtime import commandline, start

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # --help lists these flags as the command's
# Settings of sampling by their group of --help; the others are for experts.
GROUPS = {
    start.OFTEN: ("decoder_steps", "guidance_scale", "upsampler_steps"),
    start.SAMPLING: (
        *("prior_steps", "prior_guidance_scale", "prior_candidates", "upsampler_guidance_scale"),
        *("method", "prior_method", "upsampler_method", "classifier", "noisy_clip"),
        *("rerank", "temperature", "top_k", "top_p"),
    ),
    start.MEMORY: ("tile",),
}
METAVARS = {int: "N", float: "X", str: "TEXT", "pair": "LO,HI", "list": "N,N"}


class _Parser(flags.ArgumentParser):
    """Parses a flag by its setting."""

    def __init__(self, name: str, setting: Setting):
        super().__init__()
        self.name, self.setting = name, setting
        kind = setting.kind
        self.metavar = "NAME" if isinstance(kind, tuple) else METAVARS[kind]

    def parse(self, argument):
        """See `Setting.parse`."""
        try:
            return self.setting.parse(argument)
        except ValueError as error:
            raise ValueError(f"{self.name} {error}") from None


def define_model_flags() -> None:
    """Define the flags of the model and of how it runs."""
    commandline.DEFINE_path("model", None, "Model directory; default: the small model of the package.")
    with start.group(start.MEMORY):
        flags.DEFINE_integer(
            "batch_size", None, "Pictures at a time, rounded up to a multiple of the devices."
        )
        flags.DEFINE_bool("low_memory", False, "Weights as they are stored, those of one stage at a time.")
        flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Compute type; default: as trained.")
    with start.group(start.EXPERT):
        flags.DEFINE_bool("debug", False, "Show the whole traceback of an error in the settings.")


def define_sampling_flags() -> None:
    """Define the flags of the model and of sampling; `sampling_settings` reads the latter."""
    define_model_flags()
    groups = {name: title for title, names in GROUPS.items() for name in names}
    for name, setting in SETTINGS.items():
        choices = f": {', '.join(setting.kind)}" if isinstance(setting.kind, tuple) else ""
        default = "; default: the model's" if groups.get(name) == start.OFTEN else ""
        with start.group(groups.get(name, start.EXPERT)):
            text = f"{setting.help.removesuffix('.')}{choices}{default}."
            flags.DEFINE(_Parser(name, setting), name, None, text)
    with start.group(start.OFTEN):
        flags.DEFINE_alias("steps", "decoder_steps")


def sampling_settings(changes: dict[str, str] | None = None) -> dict:
    """The keywords of `Pipeline.settings` from the flags; `changes` (name -> text) replace some.

    Raises ValueError for an unknown name or an invalid value in `changes`.
    """
    by_role(changes or {})  # checks the names
    values = {name: FLAGS[name].value for name in SETTINGS}
    for name, text in (changes or {}).items():
        try:
            values[name] = FLAGS[name].parser.parse(text)
        except ValueError as error:
            raise ValueError(f"{name}={text}: {error}") from None
    return values
