"""What command lines have in common: the flag --config, and flags that are paths."""

from absl import flags

from dalle2_jax.runtime import files

flags.disclaim_key_flags()  # --help lists what is defined here as the command's own


def define_config(text: str = "Config file, FILE.py[:preset]; override with --config.a.b=value.") -> None:
    """Defines the flag --config, and with it --config.a.b for every setting of the file."""
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, text, lock_config=False, accept_new_attributes=True)
    parser = flags.FLAGS["config"].parser
    load = parser.parse
    parser.parse = lambda path: load(files.expand(path))


class PathParser(flags.ArgumentParser):
    """Text that names a file or a folder; see `files.expand`."""

    def parse(self, argument: str) -> str:
        """The path as the system takes it."""
        return files.expand(argument)

    def flag_type(self) -> str:
        """What --help says of it."""
        return "path"


def DEFINE_path(name: str, default: str | None, text: str) -> None:
    """Defines a flag that is the path of a file or a folder, or the address of one."""
    flags.DEFINE(PathParser(), name, default, text, serializer=flags.ArgumentSerializer())


def DEFINE_multi_path(name: str, default: list[str] | None, text: str) -> None:
    """`DEFINE_path` of a flag that may be given several times; its value is the list."""
    flags.DEFINE_multi(PathParser(), flags.ArgumentSerializer(), name, default, text)
