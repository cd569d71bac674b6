"""OpenAI's dVAE of DALL-E 1: a folder with encoder.pkl and decoder.pkl, whole modules pickled by torch.

They are read as data: nothing of the pickles is executed.
"""

import re
from pathlib import Path

from dalle2_jax.convert.formats.vqgan import POINT, tokenizer_statistics
from dalle2_jax.convert.tables import CONV, SAME, Imported, Row, read_stage
from dalle2_jax.convert.tensors import Tensors, joined, open_module
from dalle2_jax.runtime import modeldir

HELP = "OpenAI's dVAE of DALL-E 1, a folder with encoder.pkl and decoder.pkl"
LICENCE = "OpenAI's modified MIT licence of DALL-E"
IMAGE_SIZE = 256


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The tokenizer in the folder `source`."""
    parts = {f"{name}.": open_module(source / f"{name}.pkl") for name in ("encoder", "decoder")}
    tensors = joined(parts)
    return Imported({"tokenizer": read(tensors)}, None, [*parts.values()], LICENCE)


def read(tensors: Tensors) -> tuple[dict, dict]:
    """(config, parameters) of the tensors of encoder and decoder."""
    found = [re.match(r"encoder\.blocks\.group_(\d+)\.block_(\d+)\.", name) for name in tensors.shapes]
    groups, blocks = (max(int(one[i]) for one in found if one) for i in (1, 2)) if any(found) else (1, 1)
    num_codes = tensors.shape("encoder.blocks.output.conv.w")[0]
    net = dict(kind="dvae", channels=tensors.shape("encoder.blocks.input.w")[0])
    net |= dict(num_groups=groups, num_blocks=blocks)
    width = tensors.shape("decoder.blocks.input.w")[0]
    quantizer = dict(kind="gumbel", num_codes=num_codes, width=width)
    model = dict(image_size=IMAGE_SIZE, net=net, quantizer=quantizer, likelihood="logit_laplace")
    config = {"stage": "tokenizer", "model": model}
    leaves = tokenizer_statistics(num_codes)
    return read_stage(config, lambda params: rows(params, blocks), tensors, leaves=leaves)


def rows(params, num_blocks: int) -> list[Row]:
    """The table of a tokenizer with net.kind='dvae'."""

    def theirs(name: str) -> str:
        part, layer, kind = re.fullmatch(r"net/(encoder|decoder)_(.+)/(kernel|bias)", name).groups()  # type: ignore[union-attr]
        if block := re.fullmatch(r"blocks_(\d+)/(.+)", layer):
            number, inner = int(block[1]), block[2]
            group = f"group_{number // num_blocks + 1}.block_{number % num_blocks + 1}"
            layer = f"{group}.{'id_path' if inner == 'skip' else f'res_path.{inner}'}"
        else:
            layer = {"in": "input", "out": "output.conv"}[layer]
        return f"{part}.blocks.{layer}.{'w' if kind == 'kernel' else 'b'}"

    book = [Row("book_0/embedding", ("decoder.blocks.input.w",), POINT)]
    book += [Row("book_0/bias", ("decoder.blocks.input.b",))]
    names = [name for name in modeldir.flatten(params) if name.startswith("net/")]
    return book + [Row(name, (theirs(name),), CONV if name.endswith("kernel") else SAME) for name in names]
