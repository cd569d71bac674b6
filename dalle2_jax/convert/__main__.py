"""dalle2-jax convert SUBCOMMAND ...: weights in, model directories out."""

from dalle2_jax.runtime import start

start.begin(__name__, "convert: loading JAX")

from absl import logging

from dalle2_jax.convert import convert
from dalle2_jax.runtime import partition

__doc__ = convert.__doc__  # --help prints it

if __name__ == "__main__":
    partition.initialise()
    logging.set_verbosity(logging.ERROR)  # Orbax warns of intended settings
    raise SystemExit(convert.main())
