"""The flags that say how to draw, of every command that draws: one for each of `settings.SETTINGS`."""

from absl import flags

from dalle2_jax.generate.settings import SETTINGS, by_role
from dalle2_jax.models.stages.settings import Setting
from dalle2_jax.runtime import commandline

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # --help lists what is defined here as the command's own


class _Parser(flags.ArgumentParser):
    """The value of a flag's text, by its setting."""

    def __init__(self, name: str, setting: Setting):
        super().__init__()
        self.name, self.setting = name, setting

    def parse(self, argument):
        """See `Setting.parse`."""
        try:
            return self.setting.parse(argument)
        except ValueError as error:
            raise ValueError(f"{self.name} {error}") from None


def define_sampling_flags() -> None:
    """Define the flags that say how to draw; `sampling_settings` reads them."""
    commandline.DEFINE_path(
        "model", None, "Model directory; by default the small model that comes with the package."
    )
    for name, setting in SETTINGS.items():
        text = setting.help.removesuffix(".") + "; default: the model's own."
        flags.DEFINE(_Parser(name, setting), name, None, text)
    flags.DEFINE_alias("steps", "decoder_steps")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Compute type; default: as trained.")
    flags.DEFINE_bool("low_memory", False, "Weights as they are stored, those of one stage at a time.")
    flags.DEFINE_integer("batch_size", None, "Pictures at a time, rounded up to a multiple of the devices.")
    flags.DEFINE_bool("debug", False, "Show the whole traceback of an error in the settings.")


def sampling_settings(changes: dict[str, str] | None = None) -> dict:
    """The keywords of `Pipeline.settings` that the flags give, with `changes` (name -> text) instead of some.

    Raises ValueError for a change that is no setting or has no such value.
    """
    by_role(changes or {})  # names what is no setting
    values = {name: FLAGS[name].value for name in SETTINGS}
    for name, text in (changes or {}).items():
        try:
            values[name] = FLAGS[name].parser.parse(text)
        except ValueError as error:
            raise ValueError(f"{name}={text}: {error}") from None
    return values
