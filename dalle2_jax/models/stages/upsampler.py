"""The upsamplers: picture -> picture of four times the side (section 2.1 of the paper).

An ADM U-Net without attention and without text sees the noised picture beside the upsampled small one. It is
trained on crops of a quarter of the side. The small picture always arrives whole and is enlarged here, in
training as in sampling, and then cropped with the window of the target: enlarging a crop would differ at its
border (trap 17).

Options: noise-conditioning augmentation (Ho et al. 2021, section 4.2), for which the small picture is noised
up to a random time that the network is told; and sampling in tiles, for pictures whose feature maps do not
fit at once: every step runs the network on overlapping windows of a training crop's size and blends what
they say.

The paper's upsamplers read no captions. Others do: GLIDE's attends to them by a text transformer of its own,
and its network for repainting sees what is kept; ADM's is told a class.

With `last_step` a second network of the same shape takes the last step of sampling. Karlo's authors trained
theirs against a discriminator; training here leaves it as it is.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.models.diffusion import gaussian, process, schedules
from dalle2_jax.models.nets.unet import UpsamplerNet
from dalle2_jax.models.stages import check_settings
from dalle2_jax.models.stages.decoder import random_repaint, seen_of
from dalle2_jax.models.stages.settings import ETA, METHOD, STEPS, TILE

SETTINGS = (STEPS, METHOD, ETA, TILE)

# The small picture's noise folds a number into a sample's key that is no time and not the first noise's.
_LOW_RES_FOLD = 2**31 - 2


@dataclasses.dataclass(frozen=True)
class Upsampler:
    """An upsampler's network, noise process and sampling defaults; parameters are passed to every call.

    A context_length of None is an upsampler without captions, `num_classes` of 0 one without classes.
    """

    net: UpsamplerNet
    diffusion: gaussian.GaussianDiffusion
    image_size: int
    low_res_size: int
    crop_size: int
    resize: str
    low_res_noise: float = 0.0
    low_res_level: float = 0.0
    tile: int | None = None
    last_step: bool = False
    context_length: int | None = None
    num_classes: int = 0
    inpaint: bool = False

    @property
    def sampling(self) -> dict:
        """What `sample` does unless told."""
        own = self.diffusion
        return dict(num_steps=own.num_steps, method=own.method, eta=own.eta, tile=self.tile)

    def check_tile(self, tile: int) -> int:
        """`tile`, the side of windows to draw in; ValueError for one that the network cannot halve."""
        halvings = 2 ** (len(self.net.unet["channel_mult"]) - 1)
        if tile < halvings or tile % halvings:
            raise ValueError(f"tile {tile} must be a multiple of {halvings} (the halvings of channel_mult)")
        return tile

    def check(self, settings: dict) -> None:
        """Raises ValueError for settings of `sample` that this stage cannot take."""
        self.diffusion.timesteps(settings["num_steps"])
        if settings["tile"] is not None:
            self.check_tile(settings["tile"])

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields that `loss` reads; `sample` reads them without `image` and `crop_yx`."""
        spec = {
            "image": jax.ShapeDtypeStruct((batch_size, self.crop_size, self.crop_size, 3), jnp.float32),
            "low_res": jax.ShapeDtypeStruct(
                (batch_size, self.low_res_size, self.low_res_size, 3), jnp.float32
            ),
            "crop_yx": jax.ShapeDtypeStruct((batch_size, 2), jnp.int32),
        }
        if self.num_classes:
            spec["label"] = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        if self.context_length:
            spec["tokens"] = jax.ShapeDtypeStruct((batch_size, self.context_length), jnp.int32)
            spec["token_mask"] = jax.ShapeDtypeStruct((batch_size, self.context_length), jnp.bool_)
        return spec

    def _told(self, batch: dict) -> dict:
        """What the network's `condition` reads of a batch."""
        told = {"label": batch["label"]} if self.num_classes else {}
        if self.context_length:
            told |= {"text": batch["tokens"], "token_mask": batch["token_mask"]}
        return told

    def enlarge(self, low_res: jax.Array) -> jax.Array:
        """low_res [B, h, w, 3] -> [B, s h, s w, 3] with s = image_size / low_res_size."""
        batch, height, width, channels = low_res.shape
        factor = self.image_size // self.low_res_size
        return jax.image.resize(low_res, (batch, height * factor, width * factor, channels), self.resize)

    def _condition(self, params: dict, batch: dict) -> tuple:
        """What a network is told at every step, of its `condition`."""
        told = self._told(batch)
        return self.net.apply({"params": params}, **told, method="condition") if told else (None, None)

    def enlarged_windows(self, low_res: jax.Array, crop_yx: jax.Array, size: tuple[int, int]) -> jax.Array:
        """The windows of that size [B, H, W, 3] at `crop_yx` [B, 2] of `enlarge(low_res)`, and nothing else
        of it: the whole of 16 pictures of 1024 pixels would be most of a training step's memory."""
        factor = self.image_size // self.low_res_size
        if self.resize == "nearest":
            window = jax.vmap(lambda full, yx: jax.lax.dynamic_slice(full, (yx[0], yx[1], 0), (*size, 3)))
            return window(self.enlarge(low_res), crop_yx)

        def one(picture, yx):
            scale, origin = jnp.full(2, factor, jnp.float32), -yx.astype(jnp.float32)
            shape = (*size, picture.shape[-1])
            return jax.image.scale_and_translate(picture, shape, (0, 1), scale, origin, self.resize)

        return jax.vmap(one)(low_res, crop_yx)

    def init(self, key: jax.Array, batch: dict) -> dict:
        """Float32 parameters."""
        t = jnp.zeros(batch["image"].shape[0], jnp.int32)
        level = t if self.low_res_noise else None
        told = self._told(batch)
        params = self.net.init(key, batch["image"], t, batch["image"], level, **told)["params"]
        return params | {"last": params} if self.last_step else params

    def _networks(self, params: dict) -> tuple[dict, dict]:
        """Parameters of the network, and of the one that takes the last step."""
        first = {name: value for name, value in params.items() if name != "last"}
        return first, params.get("last", first)

    def _noised(self, low_res: jax.Array, level: jax.Array, noise: jax.Array) -> jax.Array:
        return process.q_sample(self.diffusion.schedule, low_res, level, noise)

    def loss(
        self, params: dict, key: jax.Array, batch: dict, *, train: bool = True
    ) -> tuple[jax.Array, dict]:
        """Mean loss over the batch and its scalars; `image` is the window at `crop_yx` of the full-size
        picture."""
        diffusion_key, dropout_key, level_key, noise_key = jax.random.split(key, 4)
        low_res, level = batch["low_res"], None
        if self.low_res_noise:
            most = max(1, round(self.low_res_noise * self.diffusion.schedule.num_timesteps))
            level = jax.random.randint(level_key, low_res.shape[:1], 0, most)
            level = level if train else jnp.zeros_like(level)
            low_res = self._noised(low_res, level, jax.random.normal(noise_key, low_res.shape))
        low_res_up = self.enlarged_windows(low_res, batch["crop_yx"], batch["image"].shape[1:3])

        trained, _ = self._networks(params)
        known = None
        if self.inpaint:
            repaint = random_repaint(jax.random.fold_in(key, 0), len(low_res), self.crop_size)
            known = seen_of(batch["image"], repaint)

        def network(x_t, t):
            return self.net.apply(
                {"params": trained},
                x_t,
                t,
                low_res_up,
                level,
                known=known,
                **self._told(batch),
                deterministic=not train,
                rngs={"dropout": dropout_key},
            )

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
        tile: int | None = None,
        known: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Pictures [B, s h, s w, 3] in [-1, 1] for `low_res` [B, h, w, 3] of any size and what else is read
        (see `batch_spec`), one key a picture.

        `tile` is the side of the windows that the network sees, None for the whole picture at once. known:
        see `GaussianDiffusion.sample`.
        """
        tile = self.tile if tile is None else self.check_tile(tile)
        # The network was trained on pictures, which have 256 levels.
        low_res = jnp.round((jnp.clip(batch["low_res"], -1, 1) + 1) * 127.5) / 127.5 - 1
        level = None
        if self.low_res_noise:
            time = round(self.low_res_level * (self.diffusion.schedule.num_timesteps - 1))
            level = jnp.full(low_res.shape[:1], time, jnp.int32)
            noise_keys = jax.vmap(lambda key: jax.random.fold_in(key, _LOW_RES_FOLD))(keys)
            noise = jax.vmap(lambda key: jax.random.normal(key, low_res.shape[1:]))(noise_keys)
            low_res = self._noised(low_res, level, noise)
        low_res_up = self.enlarge(low_res)

        first, last = self._networks(params)
        condition, last_condition = (self._condition(own, batch) for own in (first, last))
        seen = seen_of(*known) if known is not None and self.inpaint else None

        def network(x_t, t, low_res_up=low_res_up, seen=seen):
            def apply(own, condition):
                given = dict(condition=condition, known=seen, method="denoise")
                return self.net.apply({"params": own}, x_t, t, low_res_up, level, **given)

            if not self.last_step:
                return apply(first, condition)
            last_time = self.diffusion.timesteps(num_steps)[-1]
            return jax.lax.cond(
                t[0] == last_time, lambda: apply(last, last_condition), lambda: apply(first, condition)
            )

        if tile is not None and tile < max(low_res_up.shape[1:3]):
            whole, beside = network, (low_res_up,) if seen is None else (low_res_up, seen)

            def network(x_t, t):
                return in_tiles(lambda parts: whole(parts[0], t, *parts[1:]), (x_t, *beside), tile)

        x0 = self.diffusion.sample(
            network,
            keys,
            low_res_up.shape[1:],
            num_steps=num_steps,
            method=method,
            eta=eta,
            known=known,
        )
        return jnp.clip(x0, -1.0, 1.0)


def in_tiles(function, pictures: tuple[jax.Array, ...], tile: int) -> jax.Array:
    """function(windows) [B, t, t, C] of `pictures` [B, H, W, *], blended to [B, H, W, C]; one tile at a time.

    Windows have side `tile` (or the picture's, if that is less) and overlap by at least a quarter, over which
    their weights rise from the border: a window knows least of what lies there.
    """
    height, width = pictures[0].shape[1:3]

    def starts(length):
        side = min(tile, length)
        count = 1 if length == side else -(-(length - side) // (side - side // 4)) + 1
        return side, np.rint(np.linspace(0, length - side, count)).astype(np.int32)

    (rows, tops), (columns, lefts) = starts(height), starts(width)

    def ramp(side):
        from_border = np.minimum(np.arange(side) + 1, side - np.arange(side))
        return np.minimum(from_border / max(1, side // 4), 1.0)

    weight = jnp.asarray(ramp(rows)[:, None] * ramp(columns), jnp.float32)[None, :, :, None]
    corners = jnp.asarray([(top, left) for top in tops for left in lefts])

    def window(picture, corner):
        sizes = (picture.shape[0], rows, columns, picture.shape[3])
        return jax.lax.dynamic_slice(picture, (0, corner[0], corner[1], 0), sizes)

    def add(sums, corner):
        drawn = function(tuple(window(picture, corner) for picture in pictures)).astype(jnp.float32)
        parts = (weight * drawn, jnp.broadcast_to(weight, (1, rows, columns, 1)))
        at = (0, corner[0], corner[1], 0)
        return tuple(
            jax.lax.dynamic_update_slice(total, window(total, corner) + part, at)
            for total, part in zip(sums, parts, strict=True)
        ), None

    spec = jax.eval_shape(lambda: function(tuple(window(picture, corners[0]) for picture in pictures)))
    zeros = jnp.zeros((spec.shape[0], height, width, spec.shape[3]), jnp.float32)
    (total, weights), _ = jax.lax.scan(add, (zeros, jnp.zeros((1, height, width, 1))), corners)
    return total / weights


def build(
    *,
    image_size: int = 256,
    low_res_size: int = 64,
    crop_size: int | None = None,
    channels: int = 320,
    channel_mult: tuple[int, ...] = (1, 2, 3, 4),
    num_res_blocks: int = 3,
    attention_resolutions: tuple[int, ...] = (),
    head_dim: int = 64,
    num_heads: int = 0,
    dropout: float = 0.1,
    scale_shift: bool = True,
    text: dict | None = None,
    num_classes: int = 0,
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
    low_res_noise: float = 0.0,
    low_res_level: float = 0.0,
    tile: int | None = None,
    last_step: bool = False,
    inpaint: bool = False,
    remat: bool | str = "none",
    dtype: str = "float32",
) -> Upsampler:
    """The upsampler of a config; defaults are Table 3's 64 -> 256. `crop_size` is a quarter of the side
    unless given.

    low_res_noise is the share of the times up to which the small picture is noised in training (0: never),
    low_res_level the share at which it is in sampling; tile: see `Upsampler.sample`. last_step: whether a
    second network, parameters 'last', takes the last step. attention_resolutions, head_dim, num_heads, text
    (for tokens), num_classes and inpaint: see `decoder.build`; the sides that attend are of the full picture.

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
    if not 0 <= low_res_level <= low_res_noise <= 1:
        raise ValueError(
            f"low_res_level {low_res_level} must be in 0 .. low_res_noise = {low_res_noise}, that at most 1"
        )
    if text:
        required = ("vocab_size", "context_length", "width", "depth", "num_heads")
        check_settings(text, required, ("activation",), "text")
        if not attention_resolutions:
            raise ValueError("text is read by attention layers: set attention_resolutions, or leave text out")
    unet = dict(
        out_channels=6 if learned_variance else 3,
        channels=channels,
        channel_mult=tuple(channel_mult),
        num_res_blocks=num_res_blocks,
        attention_resolutions=tuple(attention_resolutions),
        head_dim=head_dim,
        num_heads=num_heads,
        dropout=dropout,
        scale_shift=scale_shift,
        remat=remat,
    )
    built = Upsampler(
        net=UpsamplerNet(
            unet=unet,
            image_size=image_size,
            text=dict(text, remat=remat) if text else None,
            num_classes=num_classes,
            inpaint=inpaint,
            dtype=jnp.dtype(dtype),
        ),
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
        low_res_noise=low_res_noise,
        low_res_level=low_res_level,
        tile=tile,
        last_step=last_step,
        context_length=text["context_length"] if text else None,
        num_classes=num_classes,
        inpaint=inpaint,
    )
    if tile is not None:
        built.check_tile(tile)
    return built
