"""The weights of FID's Inception, converted and loaded.

`python -m dalle2_jax.convert inception SRC.pth OUT.safetensors` converts the state dictionary of pytorch-fid
and torch-fidelity into safetensors, once, with batch norm folded into the convolutions. The user downloads
the file; its checksum is compared.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.models.nets import inception
from dalle2_jax.runtime import files, modeldir

NETWORK = "inception-2015-12-05"
# Of pt_inception-2015-12-05-6726825d.pth; the name of the file has its first digits.
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


@functools.cache
def abstract_params() -> dict:
    """Names and shapes of the parameters."""
    image = jax.ShapeDtypeStruct((1, inception.IMAGE_SIZE, inception.IMAGE_SIZE, 3), jnp.float32)
    return jax.eval_shape(inception.Inception().init, jax.random.key(0), image)["params"]


def from_state_dict(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our parameters under flat names from the state dictionary of the released weights.

    Each convolution is followed by a batch norm with gain g, bias b, mean m and variance v; with
    s = g / sqrt(v + 1e-3) its kernel becomes s W, its bias b - s m, in float64.

    Raises ValueError that names missing, surplus or misshapen tensors.
    """
    left = {name: np.asarray(value) for name, value in tensors.items()}
    left = {name: value for name, value in left.items() if not name.endswith("num_batches_tracked")}
    params, missing = {}, []

    def take(name: str) -> np.ndarray:
        if name not in left:
            missing.append(name)
            return np.ones(())
        return left.pop(name).astype(np.float64)

    for name in sorted(modeldir.flatten(abstract_params())):
        layer, _, kind = name.rpartition("/")
        source = layer.replace("/", ".")
        if layer == "fc":
            value = take("fc.weight" if kind == "kernel" else "fc.bias")
            params[name] = value.T
        elif kind == "kernel":
            kernel = take(f"{source}.conv.weight")
            gain, bias, mean, var = (
                take(f"{source}.bn.{part}") for part in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gain / np.sqrt(var + inception.EPSILON)
            params[name] = kernel.transpose(2, 3, 1, 0) * scale if kernel.ndim == 4 else kernel
            params[f"{layer}/bias"] = bias - mean * scale
    if missing or left:
        shown = ", ".join((missing or sorted(left))[:5])
        raise ValueError(
            f"this is not the state dictionary of {NETWORK}: it "
            + (f"lacks {len(missing)} tensors" if missing else f"has {len(left)} tensors too many")
            + f", among them {shown}"
        )
    params = {name: np.ascontiguousarray(value, np.float32) for name, value in params.items()}
    modeldir.check_params(params, modeldir.flatten(abstract_params()), "the state dictionary")
    return params


def convert(source: str | os.PathLike, out: str | os.PathLike, any_checksum: bool = False) -> str:
    """Write a state dictionary of torch (new layout or old) as safetensors; returns the source's sha256.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: its sha256 is not SHA256 (unless `any_checksum`), or it holds other weights.
    """
    import safetensors.numpy

    from dalle2_jax.convert.tensors import open_tensors

    if not os.path.isfile(source):
        raise FileNotFoundError(f"there is no file {source}")
    checksum = sha256(source)
    if checksum != SHA256 and not any_checksum:
        raise ValueError(
            f"{source} has the sha256 {checksum}, not {SHA256}: it is another file, or damaged; with "
            "--any_checksum it is taken all the same, and FID of it is no one else's FID"
        )
    params = from_state_dict(open_tensors(source))
    metadata = {"format": "np", "network": NETWORK, "source_sha256": checksum}
    with files.atomic_write(out) as partial:
        safetensors.numpy.save_file(params, partial, metadata=metadata)
    return checksum


@dataclasses.dataclass(frozen=True)
class Weights:
    """params: nested dicts. sha256: of the converted file. source_sha256: of the original file."""

    params: dict
    sha256: str
    source_sha256: str


def load(path: str | os.PathLike) -> Weights:
    """The weights in a file that `convert` wrote. Raises FileNotFoundError or ValueError with advice."""
    import safetensors

    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is no safetensors file: convert the released weights once, with python -m "
            "dalle2_jax.convert inception SRC.pth OUT.safetensors"
        ) from error
    modeldir.check_params(flat, modeldir.flatten(abstract_params()), os.fspath(path))
    return Weights(modeldir.unflatten(flat), sha256(path), metadata.get("source_sha256", "unknown"))


def sha256(path: str | os.PathLike) -> str:
    """The checksum of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
