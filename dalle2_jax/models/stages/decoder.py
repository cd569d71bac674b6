"""The decoder: CLIP image embedding and caption -> base picture (section 2.1 of the paper).

A GLIDE-shaped diffusion model. The image embedding is projected and added to the timestep embedding, and
projected to four tokens in front of the text transformer's outputs, which every attention layer reads. In
training the image embedding is dropped with probability 0.1 and the caption, independently, with 0.5;
classifier-free guidance drops both.

The same stage is a generator without image embeddings: of captions alone (GLIDE), of classes (ADM), or of
nothing at all.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dalle2_jax.models.diffusion import gaussian, process, schedules
from dalle2_jax.models.nets.unet import DecoderNet
from dalle2_jax.models.stages import check_settings
from dalle2_jax.models.stages.settings import ETA, GUIDANCE, METHOD, SPACING, STEPS, THRESHOLD

SETTINGS = (GUIDANCE, STEPS, METHOD, ETA, SPACING, THRESHOLD)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder's network, noise process and sampling defaults; parameters are passed to every call.

    `inpaint` says whether the network sees what is to be kept of a picture, `states_width` of what width the
    states of a frozen CLIP's text transformer are that it reads captions from, 0 for tokens. An `embed_dim`
    of 0 is a decoder without image embeddings, a context_length of None one without captions.
    """

    net: DecoderNet
    diffusion: gaussian.GaussianDiffusion
    image_size: int
    embed_dim: int
    context_length: int | None
    image_drop: float
    text_drop: float
    guidance_scale: float
    inpaint: bool = False
    states_width: int = 0
    num_classes: int = 0
    label_drop: float = 0.0

    @property
    def guidable(self) -> bool:
        """Whether anything is dropped in training, for guidance to lead away from."""
        return bool(self.embed_dim or self.context_length or self.label_drop)

    @property
    def null_tokens(self) -> int:
        """How many positions the null caption has whose states may be read."""
        return self.net.text.get("null_tokens", 0) if self.states_width else 0

    @property
    def sampling(self) -> dict:
        """What `sample` does unless told."""
        own = self.diffusion
        return dict(
            num_steps=own.num_steps,
            guidance_scale=self.guidance_scale,
            method=own.method,
            eta=own.eta,
            spacing=own.spacing,
            threshold=own.threshold,
        )

    def sampler(
        self, num_steps: int | None = None, spacing: str | None = None, threshold: float | None = None
    ) -> gaussian.GaussianDiffusion:
        """The noise process with these in place of its own."""
        given = dict(num_steps=num_steps, spacing=spacing, threshold=threshold)
        changed = {name: value for name, value in given.items() if value is not None}
        if spacing in (None, self.diffusion.spacing):
            changed.pop("num_steps", None)  # the model's own spacing gives way to another number of steps
        return dataclasses.replace(self.diffusion, **changed)

    def check(self, settings: dict) -> None:
        """Raises ValueError for settings of `sample` that this stage cannot take."""
        scale, num_steps = settings["guidance_scale"], settings["num_steps"]
        if scale != 1 and not self.guidable:
            raise ValueError(
                f"guidance_scale {scale} has no meaning for a stage that was never trained without its "
                "condition: leave it out, or steer with a classifier"
            )
        self.sampler(num_steps, settings["spacing"], settings["threshold"]).timesteps(num_steps)

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields that `loss` reads; `sample` reads the same without `image`."""
        picture = (batch_size, self.image_size, self.image_size, 3)
        spec = {"image": jax.ShapeDtypeStruct(picture, jnp.float32)}
        if self.embed_dim:
            spec["image_embed"] = jax.ShapeDtypeStruct((batch_size, self.embed_dim), jnp.float32)
        if self.num_classes:
            spec["label"] = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        if self.context_length is None:
            return spec
        length = (batch_size, self.context_length)
        spec["token_mask"] = jax.ShapeDtypeStruct(length, jnp.bool_)
        if self.states_width:
            spec["text_states"] = jax.ShapeDtypeStruct((*length, self.states_width), jnp.float32)
            spec["text_embed"] = jax.ShapeDtypeStruct((batch_size, self.embed_dim), jnp.float32)
        else:
            spec["tokens"] = jax.ShapeDtypeStruct(length, jnp.int32)
        return spec

    def _told(self, batch: dict, drops: tuple[jax.Array, jax.Array, jax.Array], prefix: str = "") -> dict:
        """What the network's `condition` reads of a batch, of the negative captions with their prefix.

        drops: [B] bool each, which image embeddings, captions and classes to leave out.
        """
        drop_image, drop_text, drop_label = drops
        told = {}
        if self.embed_dim:
            told |= {"image_embed": batch["image_embed"], "drop_image": drop_image}
        if self.num_classes:
            told["label"] = jnp.where(drop_label, -1, batch["label"])
        if self.context_length:
            names = {"text": "text_states" if self.states_width else "tokens", "token_mask": "token_mask"}
            names |= {"text_embed": "text_embed"} if self.states_width else {}
            told |= {to: batch[prefix + name] for to, name in names.items()} | {"drop_text": drop_text}
        return told

    def init(self, key: jax.Array, batch: dict) -> dict:
        """Float32 parameters."""
        t = jnp.zeros(batch["image"].shape[0], jnp.int32)
        kept = (jnp.zeros(t.shape, bool),) * 3
        params = self.net.init(key, batch["image"], t, **self._told(batch, kept))["params"]
        if self.diffusion.loss_kind == "vlb":
            params = params | {"stats": process.init_history(self.diffusion.schedule.num_timesteps)}
        return params

    def observe(self, params: dict, observed: dict) -> dict:
        """`params` whose history of L_vlb has what a step's loss `observed`."""
        return params | {"stats": process.observe(params["stats"], **observed)}

    def loss(
        self, params: dict, key: jax.Array, batch: dict, *, train: bool = True
    ) -> tuple[jax.Array, dict]:
        """Mean loss over the batch and its scalars. `train=False` keeps conditions and units (no dropping,
        no dropout)."""
        size = batch["image"].shape[0]
        diffusion_key, image_key, text_key, dropout_key = jax.random.split(key, 4)
        known = None
        if self.inpaint:
            repaint = random_repaint(jax.random.fold_in(key, 0), size, self.image_size)
            known = seen_of(batch["image"], repaint)
        drop_image = jax.random.bernoulli(image_key, self.image_drop, (size,)) & train
        drop_text = jax.random.bernoulli(text_key, self.text_drop, (size,)) & train
        drop_label = jax.random.bernoulli(jax.random.fold_in(key, 1), self.label_drop, (size,)) & train
        told = self._told(batch, (drop_image, drop_text, drop_label))

        def network(x_t, t):
            return self.net.apply(
                {"params": params},
                x_t,
                t,
                known=known,
                **told,
                deterministic=not train,
                rngs={"dropout": dropout_key},
            )

        losses, metrics, _ = self.diffusion.loss(
            diffusion_key, network, batch["image"], train=train, history=params.get("stats")
        )
        observed = {name: metrics.pop(name) for name in ("observed",) if name in metrics}
        return losses.mean(), {name: value.mean() for name, value in metrics.items()} | observed

    def sample(
        self,
        params: dict,
        keys: jax.Array,
        batch: dict,
        *,
        num_steps: int | None = None,
        guidance_scale: float | jax.Array | None = None,
        method: str | None = None,
        eta: float | None = None,
        spacing: str | None = None,
        threshold: float | None = None,
        image_size: int | None = None,
        log_p: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
        log_p_scale: float | jax.Array = 1.0,
        x_T: jax.Array | None = None,
        init: jax.Array | None = None,
        strength: float = 1.0,
        known: tuple[jax.Array, jax.Array] | None = None,
        resample: int = 1,
        return_path: bool = False,
    ) -> jax.Array:
        """Pictures [B, H, W, 3] in [-1, 1] for what `batch` says (see `batch_spec`), one key a picture.

        A guidance scale given as the Python number 1 saves the unconditional half of the work; an array is
        traced. Where the batch has negative_tokens and negative_token_mask, guidance leads away from that
        caption instead of from none. log_p(x_t, t) -> [B], of a classifier or a CLIP of noised pictures,
        steers on top of that. The others start from pictures and keep parts of them: see
        `GaussianDiffusion.sample`. return_path: the picture after every step instead, [B, n, H, W, 3].
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        guided = gaussian.is_guided(scale)
        side = image_size or self.image_size
        conditions = self._conditions(params, batch, len(keys))
        if guided:
            null = self._conditions(params, batch, len(keys), null=True)
            conditions = gaussian.interleave(conditions, null)
        seen = seen_of(*known) if known is not None and self.inpaint else None

        def network(x_t, t):
            rows = None if seen is None else jnp.repeat(seen, len(x_t) // len(seen), axis=0)
            return self.net.apply({"params": params}, x_t, t, conditions, rows, method="denoise")

        x0 = self.sampler(num_steps, spacing, threshold).sample(
            network,
            keys,
            (side, side, 3),
            guidance_scale=scale if guided else None,
            num_steps=num_steps,
            method=method,
            eta=eta,
            log_p=log_p,
            log_p_scale=log_p_scale,
            x_T=x_T,
            init=init,
            strength=strength,
            known=known,
            resample=resample,
            return_path=return_path,
        )
        if return_path:
            x0 = jnp.moveaxis(x0[1], 0, 1)
        return jnp.clip(x0, -1.0, 1.0)

    def invert(self, params: dict, batch: dict, *, num_steps: int | None = None) -> jax.Array:
        """x_T [B, H, W, 3], from which 'ddim' with eta 0, guidance 1, the same conditions and as many steps
        returns to about `image` (section 3 of the paper). Reads what `loss` reads."""
        conditions = self._conditions(params, batch, len(batch["image"]))
        return self.diffusion.invert(
            lambda x_t, t: self.net.apply({"params": params}, x_t, t, conditions, method="denoise"),
            batch["image"],
            num_steps=num_steps,
        )

    def _conditions(self, params: dict, batch: dict, count: int, null: bool = False):
        """What the network is told of the `count` rows of a batch; `null` drops embedding and class, and the
        caption or puts the negative one in its place."""
        drop = jnp.full(count, null)
        negative = null and "negative_token_mask" in batch
        prefix, drop_text = ("negative_", ~drop) if negative else ("", drop)
        told = self._told(batch, (drop, drop_text, drop), prefix)
        return self.net.apply({"params": params}, **told, method="condition")


def random_repaint(key: jax.Array, count: int, side: int) -> jax.Array:
    """Where pictures are to be drawn anew: [count, side, side, 1] of 0 and 1.

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


def seen_of(picture: jax.Array, repaint: jax.Array) -> jax.Array:
    """[B, H, W, 4]: the pixels of a picture that are kept, zero elsewhere, and 1 where they are."""
    return jnp.concatenate([picture * (1 - repaint), 1 - repaint], axis=-1)


def build(
    *,
    image_size: int = 64,
    embed_dim: int = 1024,
    channels: int = 512,
    channel_mult: tuple[int, ...] = (1, 2, 3, 4),
    num_res_blocks: int = 3,
    attention_resolutions: tuple[int, ...] = (32, 16, 8),
    head_dim: int = 64,
    num_heads: int = 0,
    dropout: float = 0.1,
    scale_shift: bool = True,
    num_image_tokens: int = 4,
    embed_scale: float | None = None,
    text: dict | None = None,
    num_classes: int = 0,
    image_drop: float = 0.1,
    text_drop: float = 0.5,
    label_drop: float = 0.0,
    schedule: str = "cosine",
    num_timesteps: int = 1000,
    objective: str = "eps",
    learned_variance: bool = True,
    weighting: str = "uniform",
    loss: str = "hybrid",
    num_steps: int = 250,
    spacing: str = "uniform",
    method: str = "ddpm",
    eta: float = 0.0,
    guidance_scale: float = 3.0,
    threshold: float | None = None,
    inpaint: bool = False,
    remat: bool | str = "none",
    dtype: str = "float32",
) -> Decoder:
    """The decoder of a config; defaults are Table 3's, but `text` (keywords of GlideTextTransformer), which
    it needs.

    embed_dim: 0 for a decoder without image embeddings. embed_scale: what embeddings are multiplied by; None
    is sqrt(embed_dim), for those of unit norm. num_classes: how many classes a caption may name; 0 where the
    network is told none. num_heads: of every attention, in the place of heads of head_dim entries.
    guidance_scale: it is 1 where nothing is ever dropped.

    `text=None` builds a decoder that reads the image embedding alone; with dict(states_width, context_length,
    width) it reads the states of a frozen CLIP's text transformer, as Karlo's does; null_tokens is then the
    number of positions that the null caption has (0, the default: a dropped caption has none).

    weighting ('uniform', 'p2', 'min_snr') and loss ('hybrid', 'vlb'): see `diffusion.process`. threshold: the
    percentile of dynamic thresholding, None to clip. inpaint: the network also sees what is to be kept of a
    picture, and is trained on random masks (GLIDE's way; `init_from` a decoder without).

    Raises ValueError for settings that cannot go together.
    """
    if image_size % 2 ** (len(channel_mult) - 1):
        raise ValueError(
            f"image_size {image_size} cannot be halved {len(channel_mult) - 1} times: shorten "
            f"channel_mult {channel_mult} "
            f"or make image_size a multiple of {2 ** (len(channel_mult) - 1)}"
        )
    if text and text.get("states_width") and not embed_dim:
        raise ValueError(
            "text.states_width is for decoders of image embeddings: set embed_dim, or read tokens"
        )
    if text and text.get("states_width"):
        check_settings(text, ("states_width", "context_length", "width"), ("null_tokens",), "text")
    elif text:
        required = ("vocab_size", "context_length", "width", "depth", "num_heads")
        check_settings(text, required, ("activation", "states_width"), "text")
        text = {name: value for name, value in text.items() if name != "states_width"}
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
    return Decoder(
        net=DecoderNet(
            unet=unet,
            text=(dict(text) if text.get("states_width") else dict(text, remat=remat)) if text else None,
            embed_dim=embed_dim,
            image_size=image_size,
            num_image_tokens=num_image_tokens,
            inpaint=inpaint,
            embed_scale=embed_dim**0.5 if embed_scale is None else embed_scale,
            num_classes=num_classes,
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
            threshold=threshold,
            loss_kind=loss,
        ),
        image_size=image_size,
        embed_dim=embed_dim,
        context_length=text["context_length"] if text else None,
        image_drop=image_drop,
        text_drop=text_drop,
        guidance_scale=guidance_scale if embed_dim or text or label_drop else 1.0,
        inpaint=inpaint,
        states_width=text.get("states_width", 0) if text else 0,
        num_classes=num_classes,
        label_drop=label_drop,
    )
