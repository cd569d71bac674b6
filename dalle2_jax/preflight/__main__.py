"""python -m dalle2_jax.preflight --config=configs/X.py --topology=v5p:4x4x4 [--config.a.b=value ...]"""

from absl import app, flags

from dalle2_jax.preflight import preflight
from dalle2_jax.runtime import commandline
from dalle2_jax.runtime.commandline import define_config

__doc__ = preflight.__doc__  # what --help prints

if __name__ == "__main__":
    define_config()
    flags.DEFINE_string("topology", None, "A described TPU slice, such as v5p:4x4x4; default: what is here.")
    commandline.DEFINE_path("clip", None, "Config file of the frozen CLIP that takes part in the step.")
    flags.DEFINE_integer("sample", None, "Compile drawing so many examples instead.", lower_bound=1)
    commandline.DEFINE_path("json", None, "Also write the report there.")
    commandline.DEFINE_path("hlo", None, "Also write the compiled program's text there.")
    flags.DEFINE_bool("debug", False, "Show the whole traceback of an error in the settings.")
    flags.mark_flags_as_required(["config"])
    app.run(preflight.main)
