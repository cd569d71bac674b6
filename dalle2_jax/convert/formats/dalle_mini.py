"""dalle-mini and dalle-mega with their VQGAN, as published (flax) or as min-dalle's copies.

    SRC/encoder.pt, decoder.pt, detoker.pt             min-dalle; detoker.pt may lie in SRC/vqgan or ../vqgan
    SRC/flax_model.msgpack, SRC/vqgan/flax_model.msgpack              dalle-mini, and its VQGAN
    SRC/vocab.json, merges.txt                                        or tokenizer.json

The VQGAN works on pixels in [0, 1]; its last layer is scaled to [-1, 1]. min-dalle's copies lack its encoder:
such a tokenizer decodes alone. Attention follows its own block as in taming-transformers, where the VQGAN was
trained. min-dalle begins with the code 16,383, dalle-mini with an id of its own, which is read here.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dalle2_jax.convert.formats import vqgan
from dalle2_jax.convert.tables import Imported, Row, dense, leaf, norm, read_stage, under
from dalle2_jax.convert.tensors import Tensors, joined, open_tensors
from dalle2_jax.data.tokenizer import load_bart
from dalle2_jax.runtime import modeldir

HELP = "a folder of dalle-mini or mega: flax_model.msgpack, or min-dalle's encoder.pt, decoder.pt, detoker.pt"
LICENCE = "Apache-2.0, that of dalle-mini; its VQGAN, and min-dalle's copies, MIT"
IMAGE_SIZE, HEAD_DIM = 256, 64
NO_ENCODER = "detoker.pt lacks the VQGAN's encoder: the model draws, and encodes no pictures"
# Of flax's modules in a layer -> min-dalle's names.
_LAYER = {
    "LayerNorm_0": "pre_self_attn_layer_norm",
    "FlaxBartAttention_0": "self_attn",
    "LayerNorm_1": "self_attn_layer_norm",
    "LayerNorm_2": "pre_encoder_attn_layer_norm",
    "FlaxBartAttention_1": "encoder_attn",
    "LayerNorm_3": "encoder_attn_layer_norm",
    "GLU_0": "glu",
}
_GLU = {"LayerNorm_0": "ln0", "LayerNorm_1": "ln1", "Dense_0": "fc0", "Dense_1": "fc1", "Dense_2": "fc2"}


def rows(depth: int) -> list[Row]:
    """The table, by min-dalle's names below encoder. and decoder."""
    found = []
    for text, theirs in (("text_", "encoder."), ("", "decoder.")):
        table = "text" if text else "code"
        found += leaf(f"net/{table}_embedding/embedding", f"{theirs}embed_tokens.weight")
        found += leaf(f"net/{table}_position/embedding", f"{theirs}embed_positions.weight")
        found += norm(f"net/{text}norm_in", f"{theirs}layernorm_embedding")
        found += norm(f"net/{text}norm_out", f"{theirs}final_ln")
        block = _attention("attn", "self_attn") + ([] if text else _attention("cross_attn", "encoder_attn"))
        block += norm("glu/norm", "glu.ln0") + norm("glu/norm_inner", "glu.ln1")
        for ours, name in (("fc_gate", "fc0"), ("fc1", "fc1"), ("fc2", "fc2")):
            block += dense(f"glu/{ours}", f"glu.{name}", bias=False)
        for i in range(depth):
            found += under(f"net/{text}block_{i}", block, f"{theirs}layers.{i}.")
    return found + leaf("net/logits/embedding", "decoder.lm_head.weight")


def _attention(ours: str, theirs: str) -> list[Row]:
    found = norm(f"{ours}/norm", f"pre_{theirs}_layer_norm") + norm(
        f"{ours}/norm_after", f"{theirs}_layer_norm"
    )
    for name in ("q", "k", "v", "out"):
        found += dense(f"{ours}/{name}", f"{theirs}.{name}_proj", bias=False)
    return found


def import_weights(source: Path, tokenizer=None) -> Imported:
    """The model in the folder `source`."""
    if (source / "flax_model.msgpack").exists():
        model, picture = _bart_of_flax(source), _vqgan_of_flax(source / "vqgan")
        tokenizer_stage = read_vqgan(picture)
    else:
        model = joined({f"{half}.": open_tensors(source / f"{half}.pt") for half in ("encoder", "decoder")})
        places = [folder / "detoker.pt" for folder in (source, source / "vqgan", source.parent / "vqgan")]
        found = [path for path in places if path.exists()]
        if not found:
            raise FileNotFoundError(f"{source} comes without detoker.pt, the decoder of its VQGAN")
        picture = open_tensors(found[0])
        picture = picture.renamed({name: name for name in picture}, notes=[NO_ENCODER])
        tokenizer_stage = read_decoder(picture)
    config, params = read(model)
    stages = {"tokenizer": tokenizer_stage, "token_model": (config, params)}
    words = tokenizer or load_bart(source, config["model"]["text"]["context_length"])
    return Imported(stages, words, [model, picture], LICENCE)


def read(tensors: Tensors) -> tuple[dict, dict]:
    """(config, parameters) of the stage `dalle_mini`, of tensors with min-dalle's names."""
    tensors = _with_gains(tensors)
    vocab_size, width = tensors.shape("encoder.embed_tokens.weight")
    num_ids = tensors.shape("decoder.embed_tokens.weight")[0]
    depth = sum(bool(re.fullmatch(r"decoder\.layers\.\d+\.glu\.fc0\.weight", name)) for name in tensors)
    side = round(tensors.shape("decoder.embed_positions.weight")[0] ** 0.5)
    hidden = tensors.shape("decoder.layers.0.glu.fc0.weight")[0]
    model = dict(
        text=dict(vocab_size=vocab_size, context_length=tensors.shape("encoder.embed_positions.weight")[0]),
        net=dict(width=width, depth=depth, num_heads=max(1, width // HEAD_DIM), hidden=hidden),
        grids=((side, side),),
        num_codes=(min(16_384, num_ids - 1),),
        num_ids=num_ids,
        start_code=num_ids - 1,
    )
    return read_stage({"stage": "dalle_mini", "model": model}, lambda params: rows(depth), tensors)


def _with_gains(tensors: Tensors) -> Tensors:
    """Tensors with gains of 1 for norms that have a bias alone: dalle-mini's have none before a product."""
    norms = [name.removesuffix(".bias") for name in tensors if name.endswith(".bias")]
    lacking = {f"{name}.weight": tensors.shape(f"{name}.bias") for name in norms}
    lacking = {name: shape for name, shape in lacking.items() if name not in tensors.shapes}

    def one(name: str) -> np.ndarray:
        return np.ones(lacking[name], np.float32) if name in lacking else tensors[name]

    return Tensors(tensors.source, tensors.shapes | lacking, one, tensors.files, tensors.notes)


def read_vqgan(tensors: Tensors) -> tuple[dict, dict]:
    """(config, parameters) of the stage `tokenizer`, of a VQGAN in taming's layout on pixels in [0, 1]."""
    config, _ = vqgan.read(tensors)
    config["model"]["net"]["unit_pixels"] = True
    leaves = vqgan.tokenizer_statistics(config["model"]["quantizer"]["num_codes"])
    return read_stage(config, vqgan.rows, _in_both_signs(tensors), leaves=leaves)


def read_decoder(tensors: Tensors) -> tuple[dict, dict]:
    """(config, parameters) of the stage `tokenizer`, of min-dalle's detoker.pt: such a VQGAN's decoder."""
    num_codes, width = tensors.shape("embedding.weight")
    found = [re.match(r"decoder\.up\.(\d+)\.(block|attn)\.(\d+)\.", name) for name in tensors.shapes]
    parts = {(int(m[1]), m[2], int(m[3])) for m in found if m}
    levels = sorted({level for level, _, _ in parts})
    # the blocks of the finest level have the narrowest output
    widths = [tensors.shape(f"decoder.up.{level}.block.0.conv1.weight")[0] for level in levels]
    net = dict(
        kind="vqgan",
        channels=widths[0],
        channel_mult=[each // widths[0] for each in widths],
        num_res_blocks=max(block for _, part, block in parts if part == "block"),
        attention_resolutions=sorted({IMAGE_SIZE // 2**i for i, part, _ in parts if part == "attn"}),
        z_channels=tensors.shape("decoder.conv_in.weight")[1],
    )
    quantizer = dict(kind="vq", decay=0.0, num_codes=num_codes, width=width)
    model = dict(image_size=IMAGE_SIZE, net=net, quantizer=quantizer, likelihood="l1", decode_only=True)

    def table(params) -> list[Row]:
        kept = [row for row in vqgan.rows(params) if row.ours != "book_0/embedding"]
        return kept + leaf("book_0/embedding", "embedding.weight")

    leaves = vqgan.tokenizer_statistics(num_codes)
    return read_stage({"stage": "tokenizer", "model": model}, table, _in_both_signs(tensors), leaves=leaves)


def _in_both_signs(tensors: Tensors) -> Tensors:
    """A VQGAN's tensors with an output in [-1, 1] in the place of [0, 1]: y -> 2 y - 1."""
    how = {"decoder.conv_out.weight": (2.0, 0.0), "decoder.conv_out.bias": (2.0, -1.0)}

    def one(name: str) -> np.ndarray:
        factor, shift = how.get(name, (1.0, 0.0))
        return tensors[name] * np.float32(factor) + np.float32(shift) if name in how else tensors[name]

    return Tensors(tensors.source, tensors.shapes, one, tensors.files, tensors.notes)


# Flax's files


def _msgpack(path: Path) -> dict[str, np.ndarray]:
    """'a/b/kernel' -> array of a flax file; numbers alone are read."""
    from flax import serialization

    return modeldir.flatten(serialization.msgpack_restore(path.read_bytes()))


def _bart_of_flax(source: Path) -> Tensors:
    """dalle-mini's tensors under min-dalle's names; its layers are stacked, or have numbers."""
    path, found = source / "flax_model.msgpack", {}
    for name, array in _msgpack(path).items():
        for theirs, made in _bart_names(name.split("/"), array):
            found[theirs] = made
    return _tensors(path, found)


def _bart_names(parts: list[str], array: np.ndarray):
    """(min-dalle's name, array) of a flax leaf; several for layers that are stacked."""
    if parts[0] == "lm_head":
        yield "decoder.lm_head.weight", array.T
        return
    half, *parts = parts[1:]  # below 'model'
    if parts[0] != "layers":
        yield _name([half, *parts]), array
        return
    layer, module, *rest = parts[1:]
    names = [_LAYER[module], *(_GLU.get(name, name) for name in rest)]
    numbered = re.fullmatch(r"FlaxBart\w+Layer_(\d+)", layer)
    for i, one in [(int(numbered[1]), array)] if numbered else enumerate(array):
        yield _name([half, "layers", str(i), *names]), one.T if rest[-1] == "kernel" else one


def _vqgan_of_flax(folder: Path) -> Tensors:
    """A VQGAN of vqgan-jax under the names of taming-transformers."""
    path, found = folder / "flax_model.msgpack", {}
    for name, array in _msgpack(path).items():
        if name == "quantize/embedding/embedding":
            found["quantize.embedding.weight"] = array
            continue
        parts = [re.sub(r"^(down|up|block|attn)_(\d+)$", r"\1.\2", part) for part in name.split("/")]
        if "mid" in parts:  # its parts keep their underscores
            parts = name.split("/")
        # norms that vqgan-jax converted are [1, 1, 1, C]
        found[_name(parts)] = array.transpose(3, 2, 0, 1) if parts[-1] == "kernel" else array.reshape(-1)
    return _tensors(path, found)


def _name(parts: list[str]) -> str:
    """A name of torch's of the parts of a flax name."""
    return re.sub(r"\.(kernel|scale|embedding)$", ".weight", ".".join(parts))


def _tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> Tensors:
    shapes = {name: array.shape for name, array in arrays.items()}
    return Tensors(str(path), shapes, functools.partial(dict.__getitem__, dict(arrays)), [path])
