"""The table of the ADM U-Net as diffusers names its parts: the blocks are those that our network has."""

import re
from collections.abc import Mapping
from typing import Any

from dalle2_jax import modeldir
from dalle2_jax.formats.tables import Row, conv, dense, norm
from dalle2_jax.nets.layers import num_groups


def diffusers_rows(net: Mapping[str, Any], prefix: str = "") -> list[Row]:
    """The table of a UNet2DModel or UNet2DConditionModel; `net`: our shapes, `prefix`: before their names."""
    levels = 1 + max(int(name.split("_")[1]) for name in net if name.startswith("down_"))

    def theirs(name: str) -> str:
        side, level, kind, number = _parts(name)
        part = {"res": "resnets", "attn": "attentions", "down": "downsamplers", "up": "upsamplers"}[kind]
        if side == "mid":
            return f"mid_block.{part}.{number}"
        place = level if side == "down" else levels - 1 - level
        return f"{side}_blocks.{place}.{part}.{number}"

    rows = conv("conv_in", f"{prefix}conv_in") + conv("conv_out", f"{prefix}conv_out")
    rows += norm("norm_out", f"{prefix}conv_norm_out")
    for name, block in _blocks(net):
        a, b = name, prefix + theirs(name)
        if "conv1" in block:
            rows += norm(f"{a}/norm1", f"{b}.norm1") + conv(f"{a}/conv1", f"{b}.conv1")
            rows += dense(f"{a}/emb_proj", f"{b}.time_emb_proj")
            rows += norm(f"{a}/norm2", f"{b}.norm2") + conv(f"{a}/conv2", f"{b}.conv2")
            rows += conv(f"{a}/skip", f"{b}.conv_shortcut") if "skip" in block else []
        else:
            rows += norm(f"{a}/norm", f"{b}.group_norm") + dense(f"{a}/out", f"{b}.to_out.0")
            rows += dense(f"{a}/qkv", f"{b}.to_q", f"{b}.to_k", f"{b}.to_v")
            rows += dense(f"{a}/text_kv", f"{b}.add_k_proj", f"{b}.add_v_proj") if "text_kv" in block else []
    return rows


def _parts(name: str) -> tuple[str, int, str, int]:
    """('down', 2, 'res', 1) of down_2_res_1: side, level, kind, number; what is not named is 0."""
    side, level, kind, number = re.fullmatch(r"([a-z]+)(?:_(\d+))?_([a-z]+)(?:_(\d+))?", name).groups()
    return side, int(level or 0), kind, int(number or 0)


def _blocks(net: Mapping[str, Any]) -> list[tuple[str, Mapping]]:
    return [(name, block) for name, block in net.items() if re.match(r"(down|mid|up)_", name)]


def check_groups(net: Any, groups: int, where: str) -> None:
    """Raise ValueError unless our group norms of these widths have `groups` groups."""
    for name, leaf in modeldir.flatten(net).items():
        if re.search(r"(^|/)norm(1|2|_out)?/scale$", name) and num_groups(leaf.shape[0]) != groups:
            raise ValueError(
                f"{where} has group norms of {groups} groups, ours have {num_groups(leaf.shape[0])} at "
                f"{leaf.shape[0]} channels: only 32 groups of at least 4 channels are shared"
            )
