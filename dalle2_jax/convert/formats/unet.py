"""The tables of the ADM U-Net for the names of OpenAI's code and of diffusers.

Both have the same blocks as our network; Karlo's and GLIDE's checkpoints have OpenAI's names.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from dalle2_jax.convert import tables
from dalle2_jax.convert.tables import POINTWISE, SAME, Row, conv, dense, leaf, norm, regrouped, under
from dalle2_jax.convert.tensors import Tensors, parted
from dalle2_jax.models.nets.layers import num_groups
from dalle2_jax.runtime import modeldir

HEAD_DIM = 64  # of attention in the networks of OpenAI's code, unless a number of heads is set


def diffusers_rows(params: Mapping[str, Any], prefix: str = "") -> list[Row]:
    """The table of a UNet2DModel or UNet2DConditionModel with its time embedding.

    `params`: our shapes of the stage, `prefix`: before their names.
    """
    net = params["net"]
    levels = 1 + max(int(name.split("_")[1]) for name in net if name.startswith("down_"))

    def theirs(name: str) -> str:
        side, level, kind, number = _parts(name)
        part = {"res": "resnets", "attn": "attentions", "down": "downsamplers", "up": "upsamplers"}[kind]
        if side == "mid":
            return f"mid_block.{part}.{number}"
        place = level if side == "down" else levels - 1 - level
        return f"{side}_blocks.{place}.{part}.{number}"

    rows = conv("conv_in", "conv_in") + conv("conv_out", "conv_out") + norm("norm_out", "conv_norm_out")
    for name, block in _blocks(net):
        if "kernel" in block:  # resampling by a convolution
            rows += conv(name, f"{theirs(name)}.conv")
            continue
        if "conv1" in block:
            part = norm("norm1", "norm1") + conv("conv1", "conv1") + dense("emb_proj", "time_emb_proj")
            part += norm("norm2", "norm2") + conv("conv2", "conv2")
            part += conv("skip", "conv_shortcut") if "skip" in block else []
        else:
            part = norm("norm", "group_norm") + dense("out", "to_out.0")
            part += dense("qkv", "to_q", "to_k", "to_v") if "qkv" in block else dense("q", "to_q")
            part += norm("norm_context", "norm_cross") if "norm_context" in block else []
            part += dense("text_kv", "add_k_proj", "add_v_proj") if "text_kv" in block else []
        rows += under(name, part, f"{theirs(name)}.")
    time = dense("time/fc1", "time_embedding.linear_1") + dense("time/fc2", "time_embedding.linear_2")
    return under("", under("net", rows) + time, prefix)


def adm_rows(
    params: Mapping[str, Any], prefix: str = "", num_heads: int = 0, blocks: bool = False
) -> list[Row]:
    """The table of guided-diffusion's UNetModel or EncoderUNetModel, without a classifier's pool.

    `params`: our shapes of the stage, `prefix`: before their names. Queries, keys and values are ordered by
    head, with `num_heads` heads or heads of HEAD_DIM entries, or with `blocks` in three blocks (their "new"
    order). The first convolution of a network for inpainting is split: see `split_inpaint_input`.
    """
    net = params["net"]
    # In theirs a residual block begins a module, which also holds the attention after it; on the way up
    # the block that doubles the side does as well.
    called = {"down": "input_blocks", "mid": "middle_block", "up": "output_blocks"}
    count, within, places = {"down": 0, "mid": -1, "up": -1}, 0, {}
    for name in sorted((name for name, _ in _blocks(net)), key=_turn):
        side, _, kind, _ = _parts(name)
        begins = side == "mid" or kind in ("res", "down")
        count[side] += begins
        within = 0 if begins else within + 1
        places[name] = f"{called[side]}.{count[side]}" + (f".{within}" if side != "mid" else "")
    first = "input_blocks.0.0"
    if "conv_in_known" in net:
        rows = conv("conv_in", f"{first}.noised", bias=False) + leaf("conv_in/bias", f"{first}.bias")
        rows += conv("conv_in_known", f"{first}.kept", bias=False)
    else:
        rows = conv("conv_in", first)
    rows += norm("norm_out", "out.0") + (conv("conv_out", "out.2") if "conv_out" in net else [])
    for name, place in places.items():
        block = net[name]
        if "kernel" in block:  # improved DDPM resamples by convolutions
            rows += conv(name, f"{place}.conv" if "_up" in name else f"{place}.op")
            continue
        if "conv1" in block:
            part = norm("norm1", "in_layers.0") + conv("conv1", "in_layers.2")
            part += dense("emb_proj", "emb_layers.1")
            part += norm("norm2", "out_layers.0") + conv("conv2", "out_layers.3")
            part += conv("skip", "skip_connection") if "skip" in block else []
        else:
            width = block["out"]["bias"].shape[0]
            head_dim = width // num_heads if num_heads else min(HEAD_DIM, width)
            part = norm("norm", "norm") + dense("out", "proj_out", layouts=(POINTWISE, SAME))
            for ours, theirs, parts in (("qkv", "qkv", 3), ("text_kv", "encoder_kv", 2)):
                if ours in block:
                    by_head = regrouped(parts, head_dim, POINTWISE)
                    part += dense(ours, theirs, layouts=(POINTWISE, SAME) if blocks else by_head)
        rows += under(name, part, f"{place}.")
    time = dense("time/fc1", "time_embed.0") + dense("time/fc2", "time_embed.2")
    return under("", under("net", rows) + time, prefix)


def split_inpaint_input(tensors: Tensors, low_res: bool) -> Tensors:
    """`tensors` of a network for inpainting, with its first convolution split: the four channels of the kept
    pixels apart from the noised picture and, with `low_res`, the low-resolution picture."""
    first, noised = "input_blocks.0.0", [0, 1, 2, *([7, 8, 9] if low_res else [])]
    channels = {"noised": noised, "kept": [3, 4, 5, 6]}
    parts = {f"{first}.{name}.weight": (f"{first}.weight", 1, rows) for name, rows in channels.items()}
    return parted(tensors, parts)


def _adm_depth(names: list[str], source: str) -> tuple[int, int]:
    """(levels, residual blocks a level) of a U-Net in OpenAI's layout, or of its way down alone."""
    if any(name.startswith("output_blocks.") for name in names):
        # What doubles the side, a block or a convolution, comes last in its module, at every level but one.
        second = r"output_blocks\.\d+\.[12]\.(in_layers\.0|conv)\.weight"
        levels = 1 + sum(re.fullmatch(second, name) is not None for name in names)
        above = {name.split(".")[1] for name in names if name.startswith("output_blocks.")}
        return levels, len(above) // levels - 1
    # The modules behind the last one without attention, which halves the side, are the last level.
    modules = {int(name.split(".")[1]) for name in names if name.startswith("input_blocks.")}
    plain = [number for number in modules if f"input_blocks.{number}.1.qkv.weight" not in names]
    num_res_blocks = max(modules, default=0) - max(plain, default=0)
    levels, spare = divmod(len(modules), num_res_blocks + 1)
    if not num_res_blocks or spare:
        raise ValueError(f"{source}: the smallest level has no attention, which is not built")
    return levels, num_res_blocks


def adm_settings(tensors: Tensors, prefix: str = "") -> tuple[dict, list[int]]:
    """(our settings of a U-Net in OpenAI's layout, the levels that attend), read off its tensors."""
    names = [name[len(prefix) :] for name in tensors.shapes if name.startswith(prefix)]
    levels, num_res_blocks = _adm_depth(names, tensors.source)
    first = [1 + level * (num_res_blocks + 1) for level in range(levels)]
    channels = tensors.shape(f"{prefix}time_embed.0.weight")[1]
    widths = [tensors.shape(f"{prefix}input_blocks.{number}.0.out_layers.3.weight")[0] for number in first]
    added = tensors.shape(f"{prefix}input_blocks.1.0.emb_layers.1.weight")[0]
    if any(2 * width % channels for width in widths):
        raise ValueError(f"{tensors.source}: only multiples of half of {channels} are built, not {widths}")
    settings = dict(
        channels=channels,
        channel_mult=[width / channels if width % channels else width // channels for width in widths],
        num_res_blocks=num_res_blocks,
        scale_shift=added == 2 * widths[0],
        dropout=0.0,
    )
    attending = [
        level for level, number in enumerate(first) if f"input_blocks.{number}.1.qkv.weight" in names
    ]
    return settings, attending


def _turn(name: str) -> tuple:
    """The key that sorts the names of our blocks in the order of their execution."""
    side, level, kind, number = _parts(name)
    place = ("down", "mid", "up").index(side)
    return place, level if side == "down" else -level, kind in ("down", "up"), number, kind == "attn"


def _parts(name: str) -> tuple[str, int, str, int]:
    """(side, level, kind, number) of a name: down_2_res_1 -> ('down', 2, 'res', 1); absent parts are 0."""
    match = re.fullmatch(r"([a-z]+)(?:_(\d+))?_([a-z]+)(?:_(\d+))?", name)
    assert match, name
    side, level, kind, number = match.groups()
    return side, int(level or 0), kind, int(number or 0)


def _blocks(net: Mapping[str, Any]) -> list[tuple[str, Mapping]]:
    return [(name, block) for name, block in net.items() if re.match(r"(down|mid|up)_", name)]


def read_stage(
    config: dict, table: Callable[[Any], list[Row]], tensors: Tensors, groups: int = 32, **options
) -> tuple[dict, dict]:
    """`tables.read_stage` of a stage with a U-Net; `groups`: of their group norms, see `check_groups`."""
    config, params = tables.read_stage(config, table, tensors, **options)
    check_groups(params["net"], groups, tensors.source)
    return config, params


def check_groups(net: Any, groups: int, where: str) -> None:
    """Raise ValueError unless our group norms of these widths have `groups` groups."""
    for name, array in modeldir.flatten(net).items():
        if re.search(r"(^|/)norm(1|2|_out)?/scale$", name) and num_groups(array.shape[0]) != groups:
            raise ValueError(
                f"{where} has group norms of {groups} groups, ours have {num_groups(array.shape[0])} at "
                f"{array.shape[0]} channels: only 32 groups of at least 4 channels are shared"
            )
