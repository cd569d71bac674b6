"""dalle2-jax train --config=RECIPE[:preset] --workdir=DIR [--config.a.b=value ...]

Trains one stage; the loop is the same for all of them. Running the same command again goes on from the last
committed checkpoint with exactly the next batch. DIR gets config.json, tokenizer/, checkpoints/,
metrics.jsonl, TensorBoard events, samples/ and, on request, profile/. Several processes, each started with
the same command on the same DIR, train as one: see `processes`.

examples:
  dalle2-jax train --config=tiny/folder --workdir=runs/mine --config.data.path=FOLDER
  dalle2-jax train --config=tiny/clip --workdir=runs/clip
  dalle2-jax train --config=tiny/prior --workdir=runs/prior --config.clip=runs/clip
  dalle2-jax train --config=clip --workdir=runs/clip --config.data.path=DIR --config.batch_size=1024
  dalle2-jax train --config=finetune:MODEL/decoder --workdir=runs/tuned --config.data.path=DIR
"""

from dalle2_jax.runtime import start

start.begin(__name__, "train: loading JAX")

from absl import app, flags, logging

from dalle2_jax.models import models
from dalle2_jax.runtime import commandline, partition, processes
from dalle2_jax.runtime.commandline import define_config
from dalle2_jax.train import checks, loop

FLAGS = flags.FLAGS
# The settings that --help explains.
MOST_USED = {
    "data.source": "folder, tar, parquet, tfrecord, tfds, embeddings or scenes: what data.path is",
    "data.path": "the data: a folder or a pattern of files, the name of a dataset",
    "clip": "workdir or model directory of the trained CLIP, for prior and decoder",
    "init_from": "workdir or model directory whose parameters training starts from",
    "num_steps": "where the run ends",
    "batch_size": "examples a step, over all devices",
    "grad_accum": "parts of a batch, computed one after the other: less memory",
    "optim.learning_rate": "its peak",
    "optim.warmup_steps": "steps until the peak",
    "model.dtype": "float32, or bfloat16 for GPU and TPU",
    "model.remat": "what is computed again in the backward pass: less memory, more time",
    "mesh.fsdp": "devices that parameters are split over; -1: all",
    "sample_every": "steps between grids of samples",
    "checkpoint_every": "steps between checkpoints",
    "wandb": "project of Weights & Biases; empty: none",
}


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


def about_config() -> str:
    """The settings that are used most, and the recipes of the package, for --help."""
    lines = ["settings, as --config.NAME=VALUE (docs/training.md has all of them):"]
    lines += [f"  {name.ljust(26)}  {text}" for name, text in MOST_USED.items()]
    return "\n".join([*lines, "", commandline.recipes_text()])


if __name__ == "__main__":
    define_config()
    commandline.DEFINE_path(
        "workdir", None, "Where checkpoints, logs and samples go; an existing one is resumed."
    )
    with start.group(start.EXPERT):
        flags.DEFINE_list(
            "allow_changed",
            [],
            "Settings, or groups of them, in which a resumption may differ: optim.learning_rate,data. With "
            "data and clip the dataset and the CLIP themselves may be others.",
        )
        flags.DEFINE_bool("debug", False, "Show the whole traceback of an error in the settings.")
    flags.mark_flags_as_required(["config", "workdir"])
    logging.set_verbosity(logging.INFO)
    try:
        start.run(main, more=about_config, settings=checks.settings_of_flag)
    except SystemExit as ended:
        processes.leave(ended.code)
