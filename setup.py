"""The package definition: what generating needs is the base, everything else is an extra.

    pip install -e '.[train,eval,test]' -c constraints.txt    a clone to work in
    pip wheel --no-deps .                                     a wheel, with the recipes as dalle2_jax.configs

`REQUIRED` and `EXTRAS` are plain literals, so that tests/test_package.py can read them without running this.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
INIT = (ROOT / "dalle2_jax/__init__.py").read_text("utf-8")
HOME = "https://github.com/OWNER/dalle2_jax"  # a placeholder until there is a public repository

# Loading a model directory and drawing with it. jax 0.10 is the last for Python 3.11.
REQUIRED = [
    "absl-py>=2.1",
    "etils[epath]>=1.9.1",
    "flax>=0.12",
    "ftfy>=6.1",
    "google-crc32c>=1.5",
    "jax>=0.10",
    "ml_collections>=1.0",
    "ml_dtypes>=0.5",
    "numpy>=2.0",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.30",
    "pillow>=11",
    "safetensors>=0.5",
    "tokenizers>=0.21",
]

EXTRAS = {
    # tf.data reads the data; TensorFlow's own build for GPUs is never wanted beside JAX's. For
    # Python 3.14 it has no release: there threads read the data.
    "train": [
        # which tensorflow-datasets imports and does not ask for
        "importlib-resources>=6; python_version < '3.14'",
        "pyarrow>=18",
        "tensorboard>=2.19",
        "tensorboardX>=2.6.2",
        "tensorflow-cpu>=2.20; platform_system == 'Linux' and platform_machine == 'x86_64' "
        "and python_version < '3.14'",
        "tensorflow>=2.20; (platform_system != 'Linux' or platform_machine != 'x86_64') "
        "and python_version < '3.14'",
        "tensorflow-datasets>=4.9.9; python_version < '3.14'",
        "transformers>=4.46,<6",
    ],
    "eval": ["matplotlib>=3.9", "scipy>=1.14"],
    "cuda": ["jax[cuda12]>=0.10"],
    "tpu": ["jax[tpu]>=0.10"],
    # gradio 6 wants pillow below 13, and brings the other three
    "studio": ["gradio>=6.31,<7", "fastapi>=0.115", "starlette>=0.40", "uvicorn>=0.30"],
    "browser": ["selenium>=4.51"],  # drives the Chromium of the system in the tests of the studio
    "sentencepiece": ["protobuf>=4", "sentencepiece>=0.2", "transformers>=4.46,<6"],  # `convert t5`, once
    "hub": ["fsspec>=2024.6", "huggingface_hub>=0.34"],  # fsspec reads shards: data.path=hf://datasets/...
    "s3": ["fsspec>=2024.6", "s3fs>=2024.6"],
    "gs": ["fsspec>=2024.6", "gcsfs>=2024.6"],
    # servers that stand for these stores in the tests, which are skipped without them
    "stores": ["gcp-storage-emulator>=2024.8", "gcsfs>=2024.6", "moto[server]>=5", "s3fs>=2024.6"],
    "wandb": ["wandb>=0.19"],
    "emoji": ["resvg-py>=0.1"],  # draws SVG in configs/emoji_styles/shards.py
    "docs": ["furo>=2025.12", "myst-parser>=5", "sphinx>=9"],  # the site of docs/
    # setuptools builds the wheel of tests/test_wheel.py
    "test": [
        "mypy>=2.4",
        "packaging>=24",
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "ruff>=0.17",
        "setuptools>=77",
    ],
    # the torch networks that the tests compare with; without them those tests say that they were skipped
    "oracle": ["diffusers>=0.35", "torch==2.13.0", "torchmetrics>=1.6", "transformers>=4.46,<6"],
}
EXTRAS["dev"] = sorted({need for name in ("train", "eval", "test", "oracle") for need in EXTRAS[name]})


setup(
    name="dalle2_jax",
    version=re.search(r'^__version__ = "(.+)"$', INIT, re.M)[1],
    description="DALL·E 2 (unCLIP) in JAX: CLIP, diffusion prior, decoder and upsamplers, one training loop",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    url=HOME,
    project_urls={
        "Documentation": f"{HOME}/tree/main/docs",
        "Changelog": f"{HOME}/blob/main/CHANGELOG.md",
        "Issues": f"{HOME}/issues",
    },
    license="Apache-2.0",
    keywords="dall-e dalle2 unclip diffusion text-to-image clip glide imagen jax flax",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["dalle2_jax", "dalle2_jax.*"]),
        *(f"dalle2_jax.configs.{name}" for name in find_packages("configs")),
    ],
    package_dir={"dalle2_jax.configs": "configs"},
    package_data={"dalle2_jax": ["bundled/**/*"], "dalle2_jax.configs.emoji_styles": ["records.txt"]},
    entry_points={"console_scripts": ["dalle2-jax = dalle2_jax.__main__:main"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
