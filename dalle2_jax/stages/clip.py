"""CLIP: image and caption -> unit vectors whose dot product says how well they match (arXiv:2103.00020).

With unit embeddings z_i, z_t of the pairs of the global batch and a learned temperature tau (`logit_scale`),

    logits = exp(tau) z_i z_t^T
    loss   = 1/2 mean_rows CE(logits, diagonal) + 1/2 mean_columns CE(logits, diagonal)

Under jit a batch that is sharded over devices is one array, so this is the loss over the global batch,
gradients included. Accumulating gradients over parts of a batch would make it the loss of the parts.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dalle2_jax.nets.text import CLIPTextTransformer
from dalle2_jax.nets.vision import ModifiedResNet, ViT
from dalle2_jax.stages import check_settings

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LOGIT_SCALE = math.log(100.0)


def unit_norm(x: jax.Array) -> jax.Array:
    """x [..., E] divided by its norm, in float32; a zero vector stays zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))


def contrastive_loss(
    image_embed: jax.Array, text_embed: jax.Array, logit_scale: jax.Array, same: jax.Array | None = None
) -> tuple[jax.Array, dict]:
    """The symmetric cross entropy of unit embeddings [N, E], and its scalars; `logit_scale` is a logarithm.

    `same` [N, N] bool says which captions are equal (None: none are); a match with any of them is accurate.
    The loss needs no such care: equal captions have equal embeddings, and with targets spread over them it
    would have the same value, and so the same gradient.
    """
    similarity = jnp.matmul(
        image_embed, text_embed.T, precision="highest", preferred_element_type=jnp.float32
    )
    scale = jnp.exp(logit_scale.astype(jnp.float32))
    logits = scale * similarity
    same = jnp.eye(len(logits), dtype=bool) if same is None else same

    def cross_entropy(logits):
        return -jnp.diagonal(jax.nn.log_softmax(logits, axis=-1)).mean()

    def accuracy(logits):
        return jnp.take_along_axis(same, logits.argmax(axis=-1)[:, None], axis=1).mean()

    loss = (cross_entropy(logits) + cross_entropy(logits.T)) / 2
    metrics = {"accuracy_i2t": accuracy(logits), "accuracy_t2i": accuracy(logits.T), "logit_scale": scale}
    return loss, {"loss": loss} | metrics


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

    vision: ViT | ModifiedResNet
    text: CLIPTextTransformer
    image_size: int
    embed_dim: int
    context_length: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    # The loss contrasts all pairs of a batch: it is not the mean of the losses of its parts.
    whole_batch = True

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields that `loss` reads."""
        return {
            "image": jax.ShapeDtypeStruct((batch_size, self.image_size, self.image_size, 3), jnp.float32),
            "tokens": jax.ShapeDtypeStruct((batch_size, self.context_length), jnp.int32),
            "token_mask": jax.ShapeDtypeStruct((batch_size, self.context_length), jnp.bool_),
        }

    def init(self, key: jax.Array, batch: dict) -> dict:
        """Float32 parameters; the temperature starts at 1 / 0.07."""
        vision_key, text_key = jax.random.split(key)
        return {
            "vision": self.vision.init(vision_key, batch["image"])["params"],
            "text": self.text.init(text_key, batch["tokens"], batch["token_mask"])["params"],
            "logit_scale": jnp.float32(math.log(1 / 0.07)),
        }

    def loss(
        self, params: dict, key: jax.Array, batch: dict, *, train: bool = True
    ) -> tuple[jax.Array, dict]:
        """The contrastive loss of the batch and its scalars; `key` and `train` change nothing."""
        del key, train
        image_embed = self.encode_image(params, batch["image"])
        text_embed, _ = self.encode_text(params, batch["tokens"], batch["token_mask"])
        same = same_captions(batch["tokens"])
        return contrastive_loss(image_embed, text_embed, params["logit_scale"], same)

    def project(self, params: dict) -> dict:
        """Parameters whose temperature is at most 100, which training applies after every update."""
        return params | {"logit_scale": jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)}

    def encode_image(self, params: dict, image: jax.Array, *, normalize: bool = True) -> jax.Array:
        """image [B, S, S, 3] in [-1, 1], S = image_size -> [B, E] float32, of unit norm if `normalize`.

        Raises ValueError for another size.
        """
        if image.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(
                f"CLIP reads pictures of {self.image_size} x {self.image_size} x 3, got {image.shape[1:]}: "
                "resize them"
            )
        mean, std = jnp.asarray(self.image_mean, jnp.float32), jnp.asarray(self.image_std, jnp.float32)
        embed = self.vision.apply({"params": params["vision"]}, ((image + 1) / 2 - mean) / std)
        return unit_norm(embed) if normalize else embed

    def encode_text(
        self, params: dict, tokens: jax.Array, token_mask: jax.Array, *, normalize: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """tokens [B, L] int32, token_mask [B, L] -> (embedding [B, E], states [B, L, D]), float32.

        The embedding is of unit norm if `normalize`. The states are those after the final layer norm, at the
        padding too.
        """
        embed, states = self.text.apply({"params": params["text"]}, tokens, token_mask)
        return (unit_norm(embed) if normalize else embed), states


def build(
    *,
    embed_dim: int,
    image_size: int,
    vision: dict,
    text: dict,
    activation: str = "gelu",
    image_mean: tuple[float, float, float] = IMAGE_MEAN,
    image_std: tuple[float, float, float] = IMAGE_STD,
    remat: bool = False,
    dtype: str = "float32",
) -> CLIP:
    """The CLIP of a config.

    Args:
      embed_dim: size of the embeddings.
      image_size: side of the pictures.
      vision: dict(kind='vit', patch_size, width, depth, num_heads), or dict(kind='resnet', width, depths,
        num_heads) with the blocks of each stage in `depths`, and norm='group' (the default, to train) or
        'frozen_batch' (released weights).
      text: dict(vocab_size, context_length, width, depth, num_heads).
      activation: 'gelu' or 'quick_gelu' (OpenAI's weights), of both transformers.
      image_mean, image_std: of the channels in [0, 1]; pictures are normalised by them inside.
      remat: recompute a block's activations in the backward pass.
      dtype: compute type of the towers; norms, softmax and the loss are float32.

    Raises:
      ValueError: for settings that are unknown, missing or do not go together.
    """
    check_settings(vision, ("kind",), set(vision) - {"kind"}, "vision")
    options = {name: value for name, value in vision.items() if name != "kind"}
    common = dict(embed_dim=embed_dim, remat=remat, dtype=jnp.dtype(dtype))
    if vision["kind"] == "vit":
        check_settings(options, ("patch_size", "width", "depth", "num_heads"), (), "vision")
        if image_size % vision["patch_size"]:
            raise ValueError(
                f"image_size {image_size} is not a multiple of vision.patch_size {vision['patch_size']}"
            )
        tower = ViT(**options, **common, activation=activation)
    elif vision["kind"] == "resnet":
        check_settings(options, ("width", "depths", "num_heads"), ("norm",), "vision")
        factor = 2 ** (len(vision["depths"]) + 1)
        if image_size % factor:
            raise ValueError(
                f"image_size {image_size} is not a multiple of {factor}, as "
                f"{len(vision['depths'])} stages need"
            )
        tower = ModifiedResNet(**options | {"depths": tuple(vision["depths"])}, **common)
    else:
        raise ValueError(f"vision.kind {vision['kind']!r} is unknown; choose 'vit' or 'resnet'")
    check_settings(text, ("vocab_size", "context_length", "width", "depth", "num_heads"), (), "text")
    return CLIP(
        vision=tower,
        text=CLIPTextTransformer(**text, **common, activation=activation),
        image_size=image_size,
        embed_dim=embed_dim,
        context_length=text["context_length"],
        image_mean=tuple(image_mean),
        image_std=tuple(image_std),
    )
