"""The upsamplers: picture -> picture of four times the side (section 2.1 of the paper).

An ADM U-Net without attention and without text sees the noised picture beside the upsampled small one. It is
trained on crops of a quarter of the side. The small picture always arrives whole and is enlarged here, in
training as in sampling, and then cropped with the window of the target: enlarging a crop would differ at its
border (trap 17).
"""

import dataclasses

import jax
import jax.numpy as jnp

from dalle2_jax.diffusion import gaussian, schedules
from dalle2_jax.nets.unet import UpsamplerNet


@dataclasses.dataclass(frozen=True)
class Upsampler:
    """An upsampler's network, noise process and sampling defaults; parameters are passed to every call."""

    net: UpsamplerNet
    diffusion: gaussian.GaussianDiffusion
    image_size: int
    low_res_size: int
    crop_size: int
    resize: str

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields that `loss` reads; `sample` reads `low_res` alone."""
        return {
            "image": jax.ShapeDtypeStruct((batch_size, self.crop_size, self.crop_size, 3), jnp.float32),
            "low_res": jax.ShapeDtypeStruct(
                (batch_size, self.low_res_size, self.low_res_size, 3), jnp.float32
            ),
            "crop_yx": jax.ShapeDtypeStruct((batch_size, 2), jnp.int32),
        }

    def enlarge(self, low_res: jax.Array) -> jax.Array:
        """low_res [B, h, w, 3] -> [B, s h, s w, 3] with s = image_size / low_res_size."""
        batch, height, width, channels = low_res.shape
        factor = self.image_size // self.low_res_size
        return jax.image.resize(low_res, (batch, height * factor, width * factor, channels), self.resize)

    def init(self, key: jax.Array, batch: dict) -> dict:
        """Float32 parameters."""
        t = jnp.zeros(batch["image"].shape[0], jnp.int32)
        return self.net.init(key, batch["image"], t, batch["image"])["params"]

    def loss(
        self, params: dict, key: jax.Array, batch: dict, *, train: bool = True
    ) -> tuple[jax.Array, dict]:
        """Mean loss over the batch and its scalars; `image` is the window at `crop_yx` of the full-size
        picture."""
        diffusion_key, dropout_key = jax.random.split(key)
        size = batch["image"].shape[1:]
        window = jax.vmap(lambda full, yx: jax.lax.dynamic_slice(full, (yx[0], yx[1], 0), size))
        low_res_up = window(self.enlarge(batch["low_res"]), batch["crop_yx"])

        def network(x_t, t):
            rngs = {"dropout": dropout_key}
            return self.net.apply({"params": params}, x_t, t, low_res_up, deterministic=not train, rngs=rngs)

        losses, metrics, _ = self.diffusion.loss(diffusion_key, network, batch["image"], train=train)
        return losses.mean(), {name: value.mean() for name, value in metrics.items()}

    def sample(
        self,
        params: dict,
        keys: jax.Array,
        batch: dict,
        *,
        num_steps: int | None = None,
        method: str | None = None,
        eta: float | None = None,
    ) -> jax.Array:
        """Pictures [B, s h, s w, 3] in [-1, 1] for `low_res` [B, h, w, 3] of any size, one key a picture."""
        # The network was trained on pictures, which have 256 levels.
        low_res = jnp.round((jnp.clip(batch["low_res"], -1, 1) + 1) * 127.5) / 127.5 - 1
        low_res_up = self.enlarge(low_res)

        x0 = self.diffusion.sample(
            lambda x_t, t: self.net.apply({"params": params}, x_t, t, low_res_up),
            keys,
            low_res_up.shape[1:],
            num_steps=num_steps,
            method=method,
            eta=eta,
        )
        return jnp.clip(x0, -1.0, 1.0)


def build(
    *,
    image_size: int = 256,
    low_res_size: int = 64,
    crop_size: int | None = None,
    channels: int = 320,
    channel_mult: tuple[int, ...] = (1, 2, 3, 4),
    num_res_blocks: int = 3,
    dropout: float = 0.1,
    scale_shift: bool = True,
    resize: str = "cubic",
    schedule: str = "cosine",
    num_timesteps: int = 1000,
    objective: str = "eps",
    learned_variance: bool = False,
    weighting: str = "uniform",
    num_steps: int = 27,
    spacing: str = "uniform",
    method: str = "ddim",
    eta: float = 0.0,
    remat: bool = False,
    dtype: str = "float32",
) -> Upsampler:
    """The upsampler of a config; defaults are Table 3's 64 -> 256. `crop_size` is a quarter of the side
    unless given.

    Raises ValueError for sizes that cannot go together.
    """
    crop_size = crop_size or image_size // 4
    halvings = 2 ** (len(channel_mult) - 1)
    if image_size % low_res_size:
        raise ValueError(f"image_size {image_size} must be a multiple of low_res_size {low_res_size}")
    if crop_size % halvings or crop_size > image_size:
        raise ValueError(
            f"crop_size {crop_size} must be a multiple of {halvings} (the halvings of "
            f"channel_mult {channel_mult}) "
            f"and at most image_size {image_size}"
        )
    unet = dict(
        out_channels=6 if learned_variance else 3,
        channels=channels,
        channel_mult=tuple(channel_mult),
        num_res_blocks=num_res_blocks,
        dropout=dropout,
        scale_shift=scale_shift,
        remat=remat,
    )
    return Upsampler(
        net=UpsamplerNet(unet=unet, image_size=image_size, dtype=jnp.dtype(dtype)),
        diffusion=gaussian.GaussianDiffusion(
            schedule=schedules.make_schedule(schedule, num_timesteps),
            objective=objective,
            learned_variance=learned_variance,
            weighting=weighting,
            num_steps=num_steps,
            spacing=spacing,
            method=method,
            eta=eta,
        ),
        image_size=image_size,
        low_res_size=low_res_size,
        crop_size=crop_size,
        resize=resize,
    )
