"""python -m dalle2_jax.train --config=configs/X.py[:preset] --workdir=DIR [--config.a.b=value ...]"""

from absl import app, flags, logging

from dalle2_jax.runtime import commandline, processes
from dalle2_jax.runtime.commandline import define_config
from dalle2_jax.train import train

__doc__ = train.__doc__  # what --help prints

if __name__ == "__main__":
    define_config()
    commandline.DEFINE_path(
        "workdir", None, "Where checkpoints, logs and samples go; an existing one is resumed."
    )
    flags.DEFINE_list(
        "allow_changed",
        [],
        "Settings, or groups of them, in which a resumption may differ: optim.learning_rate,data. With data "
        "and clip the dataset and the CLIP themselves may be others.",
    )
    flags.DEFINE_bool("debug", False, "Show the whole traceback of an error in the settings.")
    flags.mark_flags_as_required(["config", "workdir"])
    logging.set_verbosity(logging.INFO)
    try:
        app.run(train.main)
    except SystemExit as ended:
        processes.leave(ended.code)
