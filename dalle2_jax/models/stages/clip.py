"""CLIP: image and caption -> unit vectors whose dot product says how well they match (arXiv:2103.00020).

With unit embeddings z_i, z_t of the pairs of the global batch and a learned temperature tau (`logit_scale`),

    logits = exp(tau) z_i z_t^T
    loss   = 1/2 mean_rows CE(logits, diagonal) + 1/2 mean_columns CE(logits, diagonal)

Under jit a batch that is sharded over devices is one array, so this is the loss over the global batch,
gradients included. Accumulating gradients over parts of a batch would make it the loss of the parts.

Options: the sigmoid loss (Zhai et al. 2023), with a learned bias b and signs +1 for pairs of one caption,

    loss   = -1/N sum_ij log sigmoid(sign_ij (logits_ij + b))

and sharpness-aware minimisation (Foret et al. 2021), with which the paper trained its CLIP (rho = 0.1): the
gradient is taken at parameters that were moved by rho along it, to where the loss is worst,

    g(params + rho g_r / |g_r|)

by every replica r of 64 examples on its own: g_r is what its rows contribute to the gradient of the global
loss. A replica's moved parameters are a copy of its own, as they are on a device of its own.

With `noise` the image tower gets pictures that are noised up to a random time, and the time: its
similarity to a caption then guides the sampling of a decoder (GLIDE, arXiv:2112.10741, section 2.4).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.models.diffusion import process, schedules
from dalle2_jax.models.nets import cpu
from dalle2_jax.models.nets.text import CLIPTextTransformer
from dalle2_jax.models.nets.vision import ModifiedResNet, ViT
from dalle2_jax.models.stages import Loss, Op, check_settings
from dalle2_jax.runtime.partition import batch_shards, constrain

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LOGIT_SCALE = math.log(100.0)
LOSSES = ("softmax", "sigmoid")


def unit_norm(x: jax.Array) -> jax.Array:
    """x [..., E] divided by its norm, in float32; a zero vector stays zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))


def contrastive_loss(
    image_embed: jax.Array, text_embed: jax.Array, logit_scale: jax.Array, same: jax.Array | None = None
) -> tuple[jax.Array, dict]:
    """The symmetric cross entropy of unit embeddings [N, E], and its scalars.

    `logit_scale` is a logarithm, a number or, by the owner of row and column, [N].
    `same` [N, N] bool says which captions are equal (None: none are); a match with any of them is accurate.
    The loss needs no such care: equal captions have equal embeddings, and with targets spread over them it
    would have the same value, and so the same gradient.
    """
    similarity = jnp.matmul(
        image_embed, text_embed.T, precision="highest", preferred_element_type=jnp.float32
    )
    scale = jnp.exp(logit_scale.astype(jnp.float32)).reshape(-1, 1)
    by_image, by_text = scale * similarity, scale * similarity.T
    same = jnp.eye(len(similarity), dtype=bool) if same is None else same

    def cross_entropy(logits):
        return -jnp.diagonal(jax.nn.log_softmax(logits, axis=-1)).mean()

    def accuracy(logits):
        return jnp.take_along_axis(same, logits.argmax(axis=-1)[:, None], axis=1).mean()

    loss = (cross_entropy(by_image) + cross_entropy(by_text)) / 2
    metrics = {"accuracy_i2t": accuracy(by_image), "accuracy_t2i": accuracy(by_text)}
    return loss, {"loss": loss, "logit_scale": scale.mean()} | metrics


def sigmoid_loss(
    image_embed: jax.Array,
    text_embed: jax.Array,
    logit_scale: jax.Array,
    logit_bias: jax.Array,
    same: jax.Array,
) -> tuple[jax.Array, dict]:
    """The sigmoid loss of unit embeddings [N, E], and its scalars; arguments as for `contrastive_loss`.

    Every pair is judged by itself, so equal captions (`same`) have to count as matches.
    """
    _, metrics = contrastive_loss(image_embed, text_embed, logit_scale, same)
    similarity = jnp.matmul(
        image_embed, text_embed.T, precision="highest", preferred_element_type=jnp.float32
    )
    logits = jnp.exp(logit_scale).reshape(-1, 1) * similarity + logit_bias.reshape(-1, 1)
    loss = -jax.nn.log_sigmoid(jnp.where(same, logits, -logits)).sum() / len(logits)
    return loss, metrics | {"loss": loss, "logit_bias": logit_bias.mean()}


def same_captions(tokens: jax.Array) -> jax.Array:
    """[N, N] bool: which rows of tokens [N, L] are equal."""
    return (tokens[:, None] == tokens[None]).all(axis=-1)


def retrieval_accuracy(image_embed: jax.Array, text_embed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(image to text, text to image): the fraction of pairs [N, E] whose nearest match is the partner."""
    similarity = unit_norm(image_embed) @ unit_norm(text_embed).T
    partner = jnp.arange(similarity.shape[0])
    return (similarity.argmax(axis=1) == partner).mean(), (similarity.argmax(axis=0) == partner).mean()


@dataclasses.dataclass(frozen=True)
class CLIP:
    """CLIP's two towers and its loss; parameters {'vision', 'text', 'logit_scale'} go to every call."""

    vision: ViT | ModifiedResNet | None
    text: CLIPTextTransformer
    image_size: int
    embed_dim: int
    context_length: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    loss_kind: str = "softmax"
    sam_rho: float = 0.0
    sam_batch_size: int = 64
    schedule: schedules.Schedule | None = None
    unit_embeds: bool = True

    ops = {
        "encode_image": Op(("image_embed",), ("image",)),
        "encode_text": Op(("text_embed", "text_states"), ("tokens", "token_mask")),
    }
    # The loss contrasts all pairs of a batch: it is not the mean of the losses of its parts.
    whole_batch = True

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields that `loss` reads."""
        image = jax.ShapeDtypeStruct((batch_size, self.image_size, self.image_size, 3), jnp.float32)
        return ({} if self.vision is None else {"image": image}) | {
            "tokens": jax.ShapeDtypeStruct((batch_size, self.context_length), jnp.int32),
            "token_mask": jax.ShapeDtypeStruct((batch_size, self.context_length), jnp.bool_),
        }

    def init(self, key: jax.Array, batch: dict) -> dict:
        """Float32 parameters; the temperature starts at 1 / 0.07, with the sigmoid loss at 10, bias -10."""
        vision_key, text_key = jax.random.split(key)
        vision = {}
        if self.vision is not None:
            times = self._times(batch["image"])
            vision = {"vision": self.vision.init(vision_key, batch["image"], times)["params"]}
        return (
            vision
            | {
                "text": self.text.init(text_key, batch["tokens"], batch["token_mask"])["params"],
                "logit_scale": jnp.float32(math.log(1 / 0.07 if self.loss_kind == "softmax" else 10.0)),
            }
            | ({} if self.loss_kind == "softmax" else {"logit_bias": jnp.float32(-10.0)})
        )

    def loss(
        self, params: dict, key: jax.Array, batch: dict, *, step: jax.Array | int = 0, train: bool = True
    ) -> Loss:
        """The contrastive loss of the batch and its scalars; `train=False` moves none of the parameters.

        `key` draws times and noise where pictures are noised; else it changes nothing.

        With SAM it is the loss at the moved parameters, and so is its gradient. Raises ValueError for a
        batch that is not whole replicas.
        """
        if self.schedule is not None:
            t_key, noise_key = jax.random.split(key)
            image = batch["image"]
            t = process.draw_timesteps(t_key, len(image), self.schedule.num_timesteps, train=train)
            noise = jax.random.normal(noise_key, image.shape)
            batch = batch | {"image": process.q_sample(self.schedule, image, t, noise), "t": t}
        if not (train and self.sam_rho):
            embeds = self._embed(params, batch)
            return Loss(*self._contrast(*embeds, params, batch["tokens"]))
        size = len(batch["tokens"])
        if size % self.sam_batch_size:
            raise ValueError(
                f"a batch of {size} is not whole replicas of model.sam_batch_size = {self.sam_batch_size}"
            )
        embeds, scalars = self._moved_embeds(params, batch)
        return Loss(*self._contrast(*embeds, scalars, batch["tokens"]))

    def _moved_embeds(self, params: dict, batch: dict) -> tuple[tuple[jax.Array, jax.Array], dict]:
        """The embeddings of a batch, and the loss's scalars a row, each by its replica's moved parameters.

        The loss depends on a replica's parameters through its own rows alone: its gradient with respect to
        all embeddings is computed once, and carried back to the parameters replica by replica. As many
        replicas are handled at a time as there are parts of the batch on devices, so that a device holds one
        moved copy: kept for the backward pass where it is the device's only one, else made again there.
        """
        size, rows, shards = len(batch["tokens"]), self.sam_batch_size, batch_shards()
        shards = shards if (size // rows) % shards == 0 else 1
        unmoved = jax.lax.stop_gradient(params)
        names = [name for name in params if name.startswith("logit_")]

        def contrast(embeds, scalars):
            return self._contrast(*embeds, scalars, batch["tokens"])[0]

        by_row = {name: jnp.broadcast_to(unmoved[name], (size,)) for name in names}
        slopes = jax.grad(contrast, argnums=(0, 1))(self._embed(unmoved, batch), by_row)
        slopes = jax.lax.stop_gradient(slopes)

        def grouped(x):
            """[B, ...] as [groups, shards, rows, ...], each device's replicas in turn."""
            return x.reshape(shards, -1, rows, *x.shape[1:]).swapaxes(0, 1)

        def whole(x):
            return x.swapaxes(0, 1).reshape(size, *x.shape[3:])

        def of_replica(params, part, slope):
            _, back = jax.vjp(lambda p: self._embed(p, part), jax.lax.stop_gradient(params))
            (gradient,) = back(slope[0])
            gradient |= {name: slope[1][name].sum() for name in names}
            square = sum(jnp.square(g).sum() for g in jax.tree.leaves(gradient))
            rate = self.sam_rho * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
            moved = jax.tree.map(lambda p, g: p + jax.lax.stop_gradient(rate * g), params, gradient)
            return self._embed(moved, part), {name: jnp.repeat(moved[name], rows) for name in names}

        def of_group(params, part, slope):
            part, slope = jax.tree.map(constrain, (part, slope))
            with cpu.bfloat16_products(False):  # a product with each replica's kernels has no fast one
                return jax.vmap(of_replica, in_axes=(None, 0, 0))(params, part, slope)

        parts = jax.tree.map(grouped, (batch, slopes))
        if size // rows > shards:  # one group's copy may stay
            of_group = jax.checkpoint(of_group)
        _, found = jax.lax.scan(lambda _, x: (None, of_group(params, *x)), None, parts)
        return jax.tree.map(whole, found)

    def _embed(self, params: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
        text_embed, _ = self.encode_text(params, batch["tokens"], batch["token_mask"], normalize=True)
        return self.encode_image(params, batch["image"], normalize=True, t=batch.get("t")), text_embed

    def _contrast(self, image_embed, text_embed, scalars, tokens) -> tuple[jax.Array, dict]:
        same = same_captions(tokens)
        if self.loss_kind == "softmax":
            return contrastive_loss(image_embed, text_embed, scalars["logit_scale"], same)
        return sigmoid_loss(image_embed, text_embed, scalars["logit_scale"], scalars["logit_bias"], same)

    def update(self, params: dict, statistics: dict, key: jax.Array) -> tuple[dict, dict]:
        """(`params` with a temperature of at most 100, no scalars); the loss has no statistics."""
        return params | {"logit_scale": jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)}, {}

    def _times(self, image: jax.Array) -> jax.Array | None:
        return None if self.schedule is None else jnp.zeros(image.shape[0], jnp.int32)

    def log_p(self, params: dict, x_t: jax.Array, t: jax.Array, text_embed: jax.Array) -> jax.Array:
        """How well pictures x_t [B, S, S, 3], noised up to t [B], match text_embed [B, E]: logits [B].

        Raises ValueError for a CLIP that was not trained on noised pictures.
        """
        if self.schedule is None:
            raise ValueError("this CLIP was not trained on noised pictures: train one with model.noise")
        similarity = (self.encode_image(params, x_t, normalize=True, t=t) * unit_norm(text_embed)).sum(
            axis=-1
        )
        return jnp.exp(params["logit_scale"]) * similarity

    def encode_image(
        self,
        params: dict,
        image: jax.Array,
        *,
        normalize: bool | None = None,
        t: jax.Array | None = None,
    ) -> jax.Array:
        """image [B, S, S, 3] in [-1, 1], S = image_size -> [B, E] float32, of unit norm if `normalize`.

        Where that is None, the model's `unit_embeds` says so. t [B] is the time up to which it is noised, if
        the model knows times; None is clean. Raises ValueError for another size, or if there is no image
        tower.
        """
        if self.vision is None:
            raise ValueError("this CLIP came without an image tower: it reads captions alone")
        if image.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(
                f"CLIP reads pictures of {self.image_size} x {self.image_size} x 3, got {image.shape[1:]}: "
                "resize them"
            )
        mean, std = jnp.asarray(self.image_mean, jnp.float32), jnp.asarray(self.image_std, jnp.float32)
        t = self._times(image) if t is None else t
        embed: Any = self.vision.apply({"params": params["vision"]}, ((image + 1) / 2 - mean) / std, t)
        return self._scaled(embed, normalize)

    def _scaled(self, embed: jax.Array, normalize: bool | None) -> jax.Array:
        return unit_norm(embed) if (self.unit_embeds if normalize is None else normalize) else embed

    def encode_text(
        self, params: dict, tokens: jax.Array, token_mask: jax.Array, *, normalize: bool | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """tokens [B, L] int32, token_mask [B, L] -> (embedding [B, E], states [B, L, D]), float32.

        The embedding is of unit norm if `normalize`, or if that is None and `unit_embeds`. The states are
        those after the final layer norm, at the padding too.
        """
        made: Any = self.text.apply({"params": params["text"]}, tokens, token_mask)
        embed, states = made
        return self._scaled(embed, normalize), states


def _image_tower(
    vision: dict, image_size: int, activation: str, scan: bool, **common
) -> ViT | ModifiedResNet:
    """The image tower of `build`'s `vision`; ValueError for settings that do not go together."""
    check_settings(vision, ("kind",), set(vision) - {"kind"}, "vision")
    options = {name: value for name, value in vision.items() if name != "kind"}
    if vision["kind"] == "vit":
        check_settings(options, ("patch_size", "width", "depth", "num_heads"), ("mlp_width",), "vision")
        if image_size % vision["patch_size"]:
            raise ValueError(
                f"image_size {image_size} is not a multiple of vision.patch_size {vision['patch_size']}"
            )
        return ViT(**options, **common, activation=activation, scan=scan)
    if vision["kind"] != "resnet":
        raise ValueError(f"vision.kind {vision['kind']!r} is unknown; choose 'vit' or 'resnet'")
    check_settings(options, ("width", "depths", "num_heads"), ("norm",), "vision")
    factor = 2 ** (len(vision["depths"]) + 1)
    if image_size % factor:
        raise ValueError(
            f"image_size {image_size} is not a multiple of {factor}, as {len(vision['depths'])} stages need"
        )
    return ModifiedResNet(**options | {"depths": tuple(vision["depths"])}, **common)


def build(
    *,
    embed_dim: int,
    image_size: int,
    vision: dict | None,
    text: dict,
    activation: str = "gelu",
    image_mean: tuple[float, float, float] = IMAGE_MEAN,
    image_std: tuple[float, float, float] = IMAGE_STD,
    loss: str = "softmax",
    sam_rho: float = 0.0,
    sam_batch_size: int = 64,
    noise: dict | None = None,
    unit_embeds: bool = True,
    remat: bool | str = "none",
    scan_blocks: bool = False,
    dtype: str = "float32",
) -> CLIP:
    """The CLIP of a config.

    Args:
      embed_dim: size of the embeddings.
      image_size: side of the pictures.
      vision: dict(kind='vit', patch_size, width, depth, num_heads) and mlp_width, if its MLPs are not four
        times as wide as it is; or dict(kind='resnet', width, depths, num_heads) with the blocks of each stage
        in `depths`, and norm='group' (the default, to train) or 'frozen_batch' (released weights). None: a
        text tower alone, as some released models come with.
      text: dict(vocab_size, context_length, width, depth, num_heads).
      activation: 'gelu' or 'quick_gelu' (OpenAI's weights), of both transformers.
      image_mean, image_std: of the channels in [0, 1]; pictures are normalised by them inside.
      loss: 'softmax' (CLIP's) or 'sigmoid'.
      sam_rho: how far SAM moves the parameters; 0 for none.
      sam_batch_size: examples of a replica, which is moved on its own.
      noise: None, or dict(schedule, num_timesteps) of the noise that pictures get: the decoder's.
      unit_embeds: whether the other stages get embeddings of unit norm, or as the towers give them (Karlo's
        way). The loss and the guides compare unit vectors in either case.
      remat: what of a block is computed again in the backward pass, 'none', 'products' (all else) or 'all'.
      scan_blocks: whether the blocks of a transformer are compiled as one loop, see `TransformerStack`.
      dtype: compute type of the towers; norms, softmax and the loss are float32.

    Raises:
      ValueError: for settings that are unknown, missing or do not go together.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is unknown; choose one of {', '.join(LOSSES)}")
    if sam_rho < 0 or sam_batch_size < 1:
        raise ValueError(
            f"sam_rho {sam_rho} must be at least 0 (0 for none), sam_batch_size {sam_batch_size} at least 1"
        )
    if noise is not None:
        check_settings(noise, ("schedule",), ("num_timesteps",), "noise")
    common: dict[str, Any] = dict(embed_dim=embed_dim, remat=remat, dtype=jnp.dtype(dtype))
    tower = None if vision is None else _image_tower(vision, image_size, activation, scan_blocks, **common)
    check_settings(text, ("vocab_size", "context_length", "width", "depth", "num_heads"), (), "text")
    return CLIP(
        vision=tower,
        text=CLIPTextTransformer(**text, **common, activation=activation, scan=scan_blocks),
        image_size=image_size,
        embed_dim=embed_dim,
        context_length=text["context_length"],
        image_mean=tuple(image_mean),
        image_std=tuple(image_std),
        loss_kind=loss,
        sam_rho=sam_rho,
        sam_batch_size=sam_batch_size,
        schedule=None
        if noise is None
        else schedules.make_schedule(noise["schedule"], noise.get("num_timesteps", 1000)),
        unit_embeds=unit_embeds,
    )
