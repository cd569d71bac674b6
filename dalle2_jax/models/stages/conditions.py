"""Conditioning of a picture stage beside x_t: conditions that have a null, and inputs that have none.

Training drops each condition (class, caption, CLIP image embedding) by itself. The unconditional half of
guidance drops all of them. The small picture of an upsampler and the known pixels are never dropped.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dalle2_jax.models.diffusion import process
from dalle2_jax.models.diffusion.schedules import Schedule

Specs = dict[str, tuple[tuple[int, ...], DTypeLike]]  # field -> shape of one example, type

# Settings of a text transformer that reads tokens.
TOKEN_TEXT = ("vocab_size", "context_length", "width", "depth", "num_heads")
TOKEN_TEXT_OPTIONAL = ("activation", "scan_blocks")

# The small picture's noise folds a number into a sample's key that is no time and not the first noise's.
_LOW_RES_FOLD = 2**31 - 2


@dataclasses.dataclass(frozen=True)
class ClipImage:
    """A CLIP image embedding, dropped with probability `drop`."""

    embed_dim: int
    drop: float
    name = "image"

    @property
    def specs(self) -> Specs:
        """The fields of a batch that it reads."""
        return {"image_embed": ((self.embed_dim,), jnp.float32)}

    def read(self, batch: dict, drop: jax.Array, null: bool) -> dict[str, jax.Array]:
        """Keywords of `DenoiserNet.condition`; drop [B] bool."""
        return {"image_embed": batch["image_embed"], "drop_image": drop}


@dataclasses.dataclass(frozen=True)
class Label:
    """A class, -1 for none; dropped with probability `drop`."""

    num_classes: int
    drop: float
    name = "label"

    @property
    def specs(self) -> Specs:
        """The fields of a batch that it reads."""
        return {"label": ((), jnp.int32)}

    def read(self, batch: dict, drop: jax.Array, null: bool) -> dict[str, jax.Array]:
        """Keywords of `DenoiserNet.condition`; drop [B] bool."""
        return {"label": jnp.where(drop, -1, batch["label"])}


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption, dropped with probability `drop`.

    states_width: width of a frozen encoder's text states; 0 reads tokens. embed_dim: of the CLIP that makes
    them; 0: a T5 makes them, without an embedding. null_tokens: how many positions the null caption has whose
    states may be read. masked: whether padding is hidden from the network (IF: no).
    """

    context_length: int
    drop: float
    states_width: int = 0
    embed_dim: int = 0
    null_tokens: int = 0
    masked: bool = True
    name = "caption"

    @classmethod
    def of(cls, text: dict, drop: float, embed_dim: int = 0) -> "Caption":
        """The condition that a stage's settings `text` describe."""
        settings = {name: text[name] for name in ("states_width", "null_tokens", "masked") if name in text}
        return cls(text["context_length"], drop, embed_dim=embed_dim, **settings)

    @property
    def specs(self) -> Specs:
        """The fields of a batch that it reads."""
        specs: Specs = {"token_mask": ((self.context_length,), jnp.bool_)}
        if not self.states_width:
            return specs | {"tokens": ((self.context_length,), jnp.int32)}
        states = (self.context_length, self.states_width)
        specs |= {"text_states": (states, jnp.float32)}
        return specs | ({"text_embed": ((self.embed_dim,), jnp.float32)} if self.embed_dim else {})

    def read(self, batch: dict, drop: jax.Array, null: bool) -> dict[str, jax.Array]:
        """Keywords of `DenoiserNet.condition`; drop [B] bool. Where a batch has a negative caption, `null`
        reads that one."""
        prefix = ""
        if null and "negative_token_mask" in batch:
            prefix, drop = "negative_", ~drop
        names = {"text": "text_states" if self.states_width else "tokens", "token_mask": "token_mask"}
        names |= {"text_embed": "text_embed"} if self.states_width and self.embed_dim else {}
        read = {to: batch[prefix + name] for to, name in names.items()} | {"drop_text": drop}
        return read if self.masked else read | {"token_mask": jnp.ones_like(read["token_mask"])}


@dataclasses.dataclass(frozen=True)
class LowRes:
    """The small picture of an upsampler. The batch has the full small picture, which is enlarged here.

    Enlarging a crop would differ at its border (trap 17). So training enlarges first, and then crops to the
    window of the target.

    Attributes:
      size: its side. factor: how much larger the picture of the stage is. resize: the filter.
      noise, level: the small picture is noised up to a random time in training, below the share `noise` of
        all, and to the share `level` in sampling; the network reads the time (Ho et al. 2021, section 4.2).
      noise_enlarged: the noise is added behind the enlarging, pixel by pixel (IF), and not before it.
    """

    size: int
    factor: int
    resize: str
    noise: float = 0.0
    level: float = 0.0
    noise_enlarged: bool = False

    def enlarge(self, low_res: jax.Array) -> jax.Array:
        """low_res [B, h, w, 3] -> [B, factor h, factor w, 3]."""
        batch, height, width, channels = low_res.shape
        shape = (batch, height * self.factor, width * self.factor, channels)
        if self.resize != "align_corners":
            return jax.image.resize(low_res, shape, self.resize)
        # torch's align_corners: x_out = s x_in with s = (out - 1) / (in - 1). JAX counts from the edges of
        # pixels, x_out + 1/2 = s (x_in + 1/2) + (1 - s) / 2
        scale = jnp.array([(n * self.factor - 1) / (n - 1) for n in (height, width)])
        resize = jax.image.scale_and_translate
        return resize(low_res, shape, (1, 2), scale, (1 - scale) / 2, "linear", antialias=False)

    def enlarged_windows(self, low_res: jax.Array, crop_yx: jax.Array, size: tuple[int, int]) -> jax.Array:
        """Windows [B, H, W, 3] of that size at `crop_yx` [B, 2] of `enlarge(low_res)`.

        Only the windows are computed: 16 full pictures of 1024 pixels would take most of a step's memory."""
        if self.resize in ("nearest", "align_corners"):
            window = jax.vmap(lambda full, yx: jax.lax.dynamic_slice(full, (yx[0], yx[1], 0), (*size, 3)))
            return window(self.enlarge(low_res), crop_yx)

        def one(picture, yx):
            scale, origin = jnp.full(2, self.factor, jnp.float32), -yx.astype(jnp.float32)
            shape = (*size, picture.shape[-1])
            return jax.image.scale_and_translate(picture, shape, (0, 1), scale, origin, self.resize)

        return jax.vmap(one)(low_res, crop_yx)

    def for_training(self, keys: dict, batch: dict, schedule: Schedule, train: bool) -> dict:
        """Keywords of `DenoiserNet.denoise` for the window of `image` at `crop_yx`."""
        low_res, level = batch["low_res"], None
        if self.noise:
            most = max(1, round(self.noise * schedule.num_timesteps))
            level = jax.random.randint(keys["level"], low_res.shape[:1], 0, most)
            level = level if train else jnp.zeros_like(level)
            if not self.noise_enlarged:
                noise = jax.random.normal(keys["noise"], low_res.shape)
                low_res = process.q_sample(schedule, low_res, level, noise)
        windows = self.enlarged_windows(low_res, batch["crop_yx"], batch["image"].shape[1:3])
        if level is not None and self.noise_enlarged:
            noise = jax.random.normal(keys["noise"], windows.shape)
            windows = process.q_sample(schedule, windows, level, noise)
        return {"low_res_up": windows, "low_res_t": level}

    def for_sampling(self, keys: jax.Array, low_res: jax.Array, schedule: Schedule) -> dict:
        """Keywords of `DenoiserNet.denoise` for small pictures [B, h, w, 3] of any size, one key each."""
        # The network was trained on pictures, which have 256 levels.
        low_res = jnp.round((jnp.clip(low_res, -1, 1) + 1) * 127.5) / 127.5 - 1
        level, low_res = None, self.enlarge(low_res) if self.noise_enlarged else low_res
        if self.noise:
            time = round(self.level * (schedule.num_timesteps - 1))
            level = jnp.full(low_res.shape[:1], time, jnp.int32)
            noise_keys = jax.vmap(lambda key: jax.random.fold_in(key, _LOW_RES_FOLD))(keys)
            noise = jax.vmap(lambda key: jax.random.normal(key, low_res.shape[1:]))(noise_keys)
            low_res = process.q_sample(schedule, low_res, level, noise)
        return {"low_res_up": low_res if self.noise_enlarged else self.enlarge(low_res), "low_res_t": level}


def random_mask(key: jax.Array, count: int, side: int) -> jax.Array:
    """Masks of inpainting for training, 1 where to draw anew: [count, side, side, 1] of 0 and 1.

    A rectangle for most, all but a rectangle for a fifth, all for a fifth, so that the network still draws
    whole pictures (section 3.2 of GLIDE erases random regions).
    """

    def one(key):
        kind_key, y_key, x_key = jax.random.split(key, 3)

        def span(key):
            low, high = jnp.sort(jax.random.randint(key, (2,), 0, side))
            return (jnp.arange(side) >= low) & (jnp.arange(side) <= high)

        box = span(y_key)[:, None] & span(x_key)
        kind = jax.random.uniform(kind_key)
        return jnp.where(kind < 0.2, True, jnp.where(kind < 0.4, ~box, box))

    return jax.vmap(one)(jax.random.split(key, count))[..., None].astype(jnp.float32)


def known_pixels(image: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, H, W, 4]: the pixels of an image where the mask is 0, 0 elsewhere, and 1 - mask."""
    return jnp.concatenate([image * (1 - mask), 1 - mask], axis=-1)
