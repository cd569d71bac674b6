"""python -m dalle2_jax.preflight --config=configs/X.py --topology=v5p:4x4x4 [--config.a.b=value ...]

Compiles the training step of a config for a TPU slice that is not there, and says whether it would fit and
how long a step would take: bytes a chip against the chip's memory, the compiler's estimate and the
utilisation that follows, what goes over the links. Nothing is allocated and no data is read. Needs libtpu
(pip install 'dalle2_jax[tpu]'), but no TPU. Without --topology it compiles for the devices of this machine.

  --clip=configs/clip.py  the frozen CLIP that fills embeddings into the batch, else they are precomputed
  --sample=8              the program that draws 8 pictures in the place of the training step
  --json=FILE             the report as JSON
  --hlo=FILE              the compiled program as text

The numbers are the compiler's, not measurements. The time is the sum of the cycles that it estimates for each
operation of the program, which leaves out what goes over the links: the report gives utilisation for the two
extremes, links that run wholly beside the computation and links that hold it up. The cost analysis
(`optimal_seconds`) is shown beside it: a bound by arithmetic and bytes, in which a loop counts once. A large
stage compiles for minutes (docs/scaling.md).
"""

import sys

import jax
from absl import app, flags
from etils import epath

from dalle2_jax.models import models
from dalle2_jax.preflight import preflight
from dalle2_jax.runtime import commandline, partition
from dalle2_jax.runtime.commandline import define_config

FLAGS = flags.FLAGS


def main(argv):
    """Run the command; `argv` without the flags."""
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments {argv[1:]}")
        if FLAGS.topology:
            jax.config.update("jax_platforms", "cpu")  # a TPU that is not there would be looked for
        partition.initialise()
        config = models.to_plain(FLAGS.config)
        print("compiling; a large stage takes minutes", file=sys.stderr, flush=True)
        report = preflight.inspect(
            config, FLAGS.topology, clip_config=FLAGS.clip, sample=FLAGS.sample, hlo_path=FLAGS.hlo
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from (error if FLAGS.debug else None)
    print("\n".join(report.lines()))
    if FLAGS.json:
        epath.Path(FLAGS.json).write_text(report.to_json())
    if report.fits is False:
        raise SystemExit(1)


if __name__ == "__main__":
    define_config()
    flags.DEFINE_string("topology", None, "A described TPU slice, such as v5p:4x4x4; default: what is here.")
    commandline.DEFINE_path("clip", None, "Config file of the frozen CLIP that takes part in the step.")
    flags.DEFINE_integer("sample", None, "Compile drawing so many examples instead.", lower_bound=1)
    commandline.DEFINE_path("json", None, "Also write the report there.")
    commandline.DEFINE_path("hlo", None, "Also write the compiled program's text there.")
    flags.DEFINE_bool("debug", False, "Show the whole traceback of an error in the settings.")
    flags.mark_flags_as_required(["config"])
    app.run(main)
