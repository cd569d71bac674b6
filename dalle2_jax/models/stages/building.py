"""The parts of a picture stage, made of the keywords of its `build`."""

from collections.abc import Mapping

from dalle2_jax.models.diffusion import gaussian, schedules
from dalle2_jax.models.diffusion.process import Times
from dalle2_jax.models.nets.unet import Style
from dalle2_jax.models.stages import check_settings

# `process` of a config: further settings of `GaussianDiffusion`.
PROCESS = ("fixed_variance", "guide_rule", "noise_scale", "threshold_max", *Times._fields)


def unet_and_process(settings: dict) -> tuple[dict, gaussian.GaussianDiffusion]:
    """(the U-Net's settings, the noise process) of the keywords of a `build`."""
    unet = {name: settings[name] for name in ("channels", "num_res_blocks", "head_dim", "num_heads")}
    unet |= {name: settings[name] for name in ("dropout", "scale_shift", "remat")}
    unet |= {name: tuple(settings[name]) for name in ("channel_mult", "attention_resolutions")}
    if not isinstance(settings["num_res_blocks"], int):
        unet["num_res_blocks"] = tuple(settings["num_res_blocks"])
    unet["out_channels"] = 6 if settings["learned_variance"] else 3
    if settings["net"]:
        unet["style"] = unet_style(settings["net"])
    names = ("objective", "learned_variance", "weighting", "num_steps", "spacing", "method", "eta")
    further = dict(settings["process"] or {})
    check_settings(further, (), PROCESS, "process")
    process = gaussian.GaussianDiffusion(
        schedule=schedules.make_schedule(settings["schedule"], settings["num_timesteps"]),
        threshold=settings.get("threshold"),
        loss_kind=settings.get("loss", "hybrid"),
        times=Times(**{name: further.pop(name) for name in Times._fields if name in further}),
        **{name: settings[name] for name in names},
        **further,
    )
    return unet, process


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
