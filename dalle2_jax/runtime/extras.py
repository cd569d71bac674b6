"""Optional packages: which extra of setup.py installs them, and the one line for one that is missing."""

import importlib.util
import sys

# Packages of extras, by the names that are imported.
EXTRA_OF = {
    "diffusers": "oracle",
    "fastapi": "studio",
    "gcsfs": "gs",
    "gradio": "studio",
    "huggingface_hub": "hub",
    "libtpu": "tpu",
    "matplotlib": "eval",
    "pyarrow": "train",
    "s3fs": "s3",
    "scipy": "eval",
    "sentencepiece": "sentencepiece",
    "starlette": "studio",
    "tensorboardX": "train",
    "tensorflow": "train",
    "tensorflow_datasets": "train",
    "torch": "oracle",
    "transformers": "train",
    "uvicorn": "studio",
    "wandb": "wandb",
}


def how_to_install(package: str) -> str:
    """The command that installs a package of `EXTRA_OF`."""
    return f"pip install 'dalle2_jax[{EXTRA_OF[package]}]'"


def check(what: str, *packages: str) -> None:
    """Raises ValueError, with the command that installs it, if `what` needs a package that is missing."""
    for package in packages:
        if (sys.modules[package] if package in sys.modules else importlib.util.find_spec(package)) is None:
            raise ValueError(f"{what} needs {package}: {how_to_install(package)}")


def missing(error: ImportError) -> str:
    """The line for the failed import of a package of an extra; '' for other imports."""
    package = (error.name or "").partition(".")[0]
    return f"{package} is not installed: {how_to_install(package)}" if package in EXTRA_OF else ""
