"""dalle2-jax preflight --config=configs/X.py --topology=v5p:4x4x4 [--config.a.b=value ...]

Compiles the training step of a config for a TPU slice without having one. Reports whether it fits and how
long a step takes: bytes a chip against the chip's memory, the compiler's estimate of time and utilisation,
bytes over the links. Allocates nothing and reads no data. Needs libtpu (the extra tpu), but no TPU.
Without --topology it compiles for the devices of this machine.

  --clip=configs/clip.py  the frozen CLIP that computes embeddings in the step; default: precomputed ones
  --frozen=tokenizer=configs/dalle1/dvae.py   any frozen stage in the step, by its name; once for each
  --sample=8              the program that draws 8 pictures, not the training step
  --json=FILE             the report as JSON
  --hlo=FILE              the compiled program as text

The numbers are the compiler's, not measurements. The time is the sum of its estimates of cycles for the
operations of the program, without the links: the report gives utilisation for the two extremes, links that
are hidden behind computation and links that hold it up. The cost analysis (`optimal_seconds`) is a bound by
arithmetic and bytes, which counts a loop once. A large stage compiles for minutes (docs/scaling.md).
"""

from dalle2_jax.runtime import start

start.begin(__name__, "preflight: loading JAX")


import sys

import jax
from absl import flags
from etils import epath

from dalle2_jax.models import models
from dalle2_jax.preflight import preflight
from dalle2_jax.runtime import commandline, files, partition, processes
from dalle2_jax.runtime.commandline import define_config
from dalle2_jax.train import checks

FLAGS = flags.FLAGS


def frozen_recipes() -> dict[str, str]:
    """Name -> config file of --frozen and --clip; ValueError for a value of another form."""
    found = {"clip": FLAGS.clip} if FLAGS.clip else {}
    for text in FLAGS.frozen or ():
        name, _, path = text.partition("=")
        if not name or not path:
            raise ValueError(f"--frozen={text} must be NAME=CONFIG, such as tokenizer=configs/dalle1/dvae.py")
        found[name] = files.expand(path)
    return found


def main(argv):
    """Run the command; `argv` without the flags."""
    if FLAGS.topology:
        jax.config.update("jax_platforms", "cpu")  # JAX would look for a TPU of this machine
    with processes.fail_together(debug=FLAGS.debug):
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments {argv[1:]}")
        partition.initialise()
        print("compiling; a large stage takes minutes", file=sys.stderr, flush=True)
        config, how = models.to_plain(FLAGS.config), dict(sample=FLAGS.sample, hlo_path=FLAGS.hlo)
        report = preflight.inspect(config, FLAGS.topology, frozen=frozen_recipes(), **how)
    print("\n".join(report.lines()))
    if FLAGS.json:
        epath.Path(FLAGS.json).write_text(report.to_json())
    if report.fits is False:
        raise SystemExit(1)


if __name__ == "__main__":
    define_config()
    flags.DEFINE_string("topology", None, "A TPU slice, such as v5p:4x4x4; default: this machine's devices.")
    commandline.DEFINE_path("clip", None, "Config file of the frozen CLIP that is part of the step.")
    of_frozen = "NAME=CONFIG: config file of another frozen stage of the step; once for each."
    flags.DEFINE_multi_string("frozen", None, of_frozen)
    flags.DEFINE_integer("sample", None, "Compile drawing so many examples instead.", lower_bound=1)
    commandline.DEFINE_path("json", None, "Also write the report there.")
    commandline.DEFINE_path("hlo", None, "Also write the compiled program's text there.")
    flags.DEFINE_bool("debug", False, "Show the whole traceback of an error in the settings.")
    flags.mark_flags_as_required(["config"])
    start.run(main, settings=checks.settings_of_flag)
