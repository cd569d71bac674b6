"""The weights of FID's Inception, converted and loaded.

`python -m dalle2_jax.convert inception SRC.pth OUT.safetensors` converts the state dictionary of pytorch-fid
and torch-fidelity into safetensors, once, with batch norm folded into the convolutions. The user downloads
the file; its checksum is compared.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from dalle2_jax.convert.tensors import open_tensors
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
    names = {"fc": ["fc.weight", "fc.bias"]}
    parts = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    for layer in {name.rpartition("/")[0] for name in modeldir.flatten(abstract_params())} - {"fc"}:
        names[layer] = [f"{layer.replace('/', '.')}.{part}" for part in parts]
    expected = {name for wanted in names.values() for name in wanted}
    found = {name for name in tensors if not name.endswith("num_batches_tracked")}
    missing, surplus = sorted(expected - found), sorted(found - expected)
    if missing or surplus:
        why = f"lacks {len(missing)} tensors" if missing else f"has {len(surplus)} tensors too many"
        some = ", ".join((missing or surplus)[:5])
        raise ValueError(f"this is not the state dictionary of {NETWORK}: it {why}, among them {some}")
    params = {}
    for layer, wanted in names.items():
        kernel, *rest = (np.asarray(tensors[name], np.float64) for name in wanted)
        if layer == "fc":
            params["fc/kernel"], params["fc/bias"] = kernel.T, rest[0]
            continue
        gain, bias, mean, var = rest
        scale = gain / np.sqrt(var + inception.EPSILON)
        params[f"{layer}/kernel"] = kernel.transpose(2, 3, 1, 0) * scale if kernel.ndim == 4 else kernel
        params[f"{layer}/bias"] = bias - mean * scale
    params = {name: np.ascontiguousarray(value, np.float32) for name, value in params.items()}
    modeldir.check_params(params, modeldir.flatten(abstract_params()), "the state dictionary")
    return params


def convert(source: str | os.PathLike, out: str | os.PathLike, any_checksum: bool = False) -> str:
    """Write a state dictionary of torch (new layout or old) as safetensors; returns the source's sha256.

    Raises:
      FileNotFoundError: no such file.
      ValueError: its sha256 is not SHA256 (unless `any_checksum`), or it holds other weights.
    """
    if not os.path.isfile(source):
        raise FileNotFoundError(f"{source} does not exist")
    checksum = files.sha256(source)
    if checksum != SHA256 and not any_checksum:
        raise ValueError(
            f"{source} has the sha256 {checksum}, not {SHA256}: it is another file, or damaged; with "
            "--any_checksum it is converted, and its FID is comparable with no other"
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
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        command = "python -m dalle2_jax.convert inception SRC.pth OUT.safetensors"
        raise ValueError(f"{path} is invalid: convert the released weights once, with {command}") from error
    modeldir.check_params(flat, modeldir.flatten(abstract_params()), os.fspath(path))
    return Weights(modeldir.unflatten(flat), files.sha256(path), metadata.get("source_sha256", "unknown"))
