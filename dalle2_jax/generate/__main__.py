"""python -m dalle2_jax.generate [--model=DIR] "caption" ["caption" ...] [--n=4 --seed=0 --out=outputs ...]"""

from absl import app, flags, logging

from dalle2_jax.generate import generate
from dalle2_jax.generate.generate import define_sampling_flags
from dalle2_jax.runtime import commandline

__doc__ = generate.__doc__  # what --help prints

if __name__ == "__main__":
    define_sampling_flags()
    commandline.DEFINE_path("out", "outputs", "Where pictures, grid.png and generate.json go.")
    flags.DEFINE_integer("n", 1, "Pictures a caption.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed; the same seed and caption give the same picture.")
    logging.set_verbosity(logging.WARNING)  # not every backend that JAX looks for in vain
    app.run(generate.main)
