"""python -m dalle2_jax.train --config=configs/X.py[:preset] --workdir=DIR [--config.a.b=value ...]

Trains one stage; the loop is the same for all of them. Running the same command again goes on from the last
committed checkpoint with exactly the next batch. DIR gets config.json, tokenizer/, checkpoints/,
metrics.jsonl, TensorBoard events, samples/ and, on request, profile/. Several processes, each started with
the same command on the same DIR, train as one: see `processes`.
"""

from absl import app, flags, logging

from dalle2_jax.models import models
from dalle2_jax.runtime import commandline, partition, processes
from dalle2_jax.runtime.commandline import define_config
from dalle2_jax.train import checks, loop

FLAGS = flags.FLAGS


def main(argv):
    """Run the command; `argv` without the flags."""
    from dalle2_jax.data import bad_records

    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    partition.initialise()
    config = models.to_plain(FLAGS.config)
    refused = (ValueError, OSError, bad_records.TooManyBadRecords)
    with processes.fail_together(refused, status=checks.FAILED, say=logging.error, debug=FLAGS.debug):
        processes.join()
        try:
            loop.train(config, FLAGS.workdir, FLAGS.allow_changed)
        except FloatingPointError as error:  # which all processes see at the same step
            logging.error("%s", error)
            raise SystemExit(3) from (error if FLAGS.debug else None)


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
        app.run(main)
    except SystemExit as ended:
        processes.leave(ended.code)
