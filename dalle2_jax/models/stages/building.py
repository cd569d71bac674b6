"""The parts of a picture stage, made of the keywords of its `build`."""

import inspect
from collections.abc import Callable, Mapping

from dalle2_jax.models.diffusion import gaussian, schedules
from dalle2_jax.models.nets.unet import Style
from dalle2_jax.models.stages import check_settings

# `process` of a config: further settings of `GaussianDiffusion`.
PROCESS = ("fixed_variance", "guide_rule", "noise_scale", "threshold_max")
# `net` of a config with kind='vit': keywords of `PixelViT`, and time_scale.
VIT_REQUIRED = ("patch_size", "width", "depth", "num_heads")
VIT_OPTIONAL = ("mlp_width", "bottleneck", "context_tokens", "context_start", "scan_blocks", "time_scale")
# Keywords of `build` that the U-Net alone reads.
_UNET = (
    "channels",
    "channel_mult",
    "num_res_blocks",
    "attention_resolutions",
    "head_dim",
    "num_heads",
    "scale_shift",
)


def body_and_process(build: Callable, settings: dict) -> tuple[dict, gaussian.GaussianDiffusion]:
    """(`DenoiserNet.body`, the noise process) of the keywords `settings` of a `build`."""
    net = settings["net"] or {}
    body = _vit(build, settings, net) if net.get("kind", "unet") != "unet" else _unet(settings, net)
    body |= {name: settings[name] for name in ("dropout", "remat")}
    body["out_channels"] = 6 if settings["learned_variance"] else 3
    names = ("objective", "learned_variance", "weighting", "num_steps", "spacing", "method", "eta")
    check_settings(settings["process"] or {}, (), PROCESS, "process")
    process = gaussian.GaussianDiffusion(
        schedule=schedules.make_schedule(settings["schedule"], settings["num_timesteps"]),
        threshold=settings.get("threshold"),
        loss_kind=settings.get("loss", "hybrid"),
        **{name: settings[name] for name in names},
        **(settings["process"] or {}),
    )
    return body, process


def _unet(settings: dict, net: Mapping) -> dict:
    """Keywords of the U-Net; net: see `unet_style`, and the kind."""
    unet = {name: settings[name] for name in ("channels", "num_res_blocks", "head_dim", "num_heads")}
    unet |= {name: tuple(settings[name]) for name in ("channel_mult", "attention_resolutions")}
    unet["scale_shift"] = settings["scale_shift"]
    if not isinstance(settings["num_res_blocks"], int):
        unet["num_res_blocks"] = tuple(settings["num_res_blocks"])
    style = {name: value for name, value in net.items() if name != "kind"}
    return unet | ({"style": unet_style(style)} if style else {})


def _vit(build: Callable, settings: dict, net: Mapping) -> dict:
    """Keywords of the transformer; ValueError for those that cannot work, and for settings of the U-Net."""
    if net["kind"] != "vit":
        raise ValueError(f"net.kind {net['kind']!r} is unknown; choose 'unet' or 'vit'")
    check_settings(net, ("kind", *VIT_REQUIRED), VIT_OPTIONAL, "net")
    parameters = inspect.signature(build).parameters
    others = [name for name in _UNET if settings[name] != parameters[name].default]
    if others:
        raise ValueError(f"net.kind 'vit' reads no {', '.join(others)}: leave them out, they are the U-Net's")
    width, heads, start = net["width"], net["num_heads"], net.get("context_start")
    if width % (4 * heads):
        raise ValueError(f"net.width {width} must be a multiple of 4 net.num_heads, {4 * heads}")
    if start is not None and not 0 <= start < net["depth"]:
        raise ValueError(f"net.context_start {start} must be in 0 .. net.depth - 1, {net['depth'] - 1}")
    return dict(net)


def check_side(body: Mapping, name: str, side: int) -> None:
    """Raise ValueError for a side of pictures, the setting `name`, that the network cannot work on."""
    if body.get("kind") == "vit":
        multiple, setting = body["patch_size"], "net.patch_size"
    else:
        multiple, setting = 2 ** (len(body["channel_mult"]) - 1), "the halvings of channel_mult"
    if side < multiple or side % multiple:
        raise ValueError(f"{name} {side} must be a multiple of {multiple} ({setting})")


def unet_style(settings: Mapping) -> Style:
    """`net` of a config, see `unet.Style`; ValueError for a setting or a value that is not there."""
    check_settings(settings, (), Style._fields, "net")
    return Style(**settings).check()


def checked_states(text: Mapping, embed_dim: int = 0) -> dict:
    """The settings of captions that are a frozen encoder's states; ValueError for others.

    embed_dim: of the CLIP whose states they are; 0: a T5's, which are pooled by `pool_heads` heads, and read
    at padding, too, unless `masked` (the default).
    """
    required = ("states_width", "context_length", "width")
    if embed_dim:
        check_settings(text, required, ("null_tokens",), "text")
    else:
        check_settings(text, (*required, "pool_heads"), ("masked",), "text")
        if text["states_width"] % text["pool_heads"]:
            raise ValueError(f"text.pool_heads {text['pool_heads']} must divide {text['states_width']=}")
    return dict(text)
