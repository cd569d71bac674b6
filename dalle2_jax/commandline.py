"""What the command lines of training, embedding, preflight and benchmark have in common."""

from absl import flags
from ml_collections import config_flags

flags.disclaim_key_flags()  # --help lists what is defined here as the command's own


def define_config(text: str = "Config file, FILE.py[:preset]; override with --config.a.b=value.") -> None:
    """Defines the flag --config, and with it --config.a.b for every setting of the file."""
    config_flags.DEFINE_config_file("config", None, text, lock_config=False, accept_new_attributes=True)
