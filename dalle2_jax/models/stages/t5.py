"""A text encoder of T5's shape, frozen under a diffusion stage (Imagen, arXiv 2205.11487, section 2.1).

Released weights come by `convert t5`. Trained here, it restores captions: a share of the tokens, in spans of
SPAN, is replaced by one id, and the loss is the cross entropy of what was there and of what was kept. That is
T5's objective of the whole text (arXiv 1910.10683, section 3.3.1) without its decoder; a network that is
trained so is no T5. A decoder would read the states of kept tokens. Here only their own loss trains these:
without it three quarters of their variance tell of other tokens, and stages that read them do not learn to
combine words.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dalle2_jax.models.nets.t5 import T5Encoder
from dalle2_jax.models.stages import Loss, Op

SETTINGS = ()
SPAN = 3


@dataclasses.dataclass(frozen=True)
class T5:
    """The encoder and how it is trained; parameters go to every call.

    Attributes:
      mask_token: the id in the place of masked tokens. mask_rate: their share in training.
    """

    ops = {"encode_text": Op(("text_states",), ("tokens", "token_mask"))}
    net: T5Encoder
    context_length: int
    mask_token: int
    mask_rate: float

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields that `loss` reads."""
        shape = (batch_size, self.context_length)
        return {
            "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
            "token_mask": jax.ShapeDtypeStruct(shape, jnp.bool_),
        }

    def init(self, key: jax.Array, batch: dict) -> dict:
        """Float32 parameters."""
        return self.net.init(key, batch["tokens"], batch["token_mask"])["params"]

    def encode_text(self, params: dict, tokens: jax.Array, token_mask: jax.Array) -> jax.Array:
        """States [B, L, D] float32 of tokens [B, L] with their mask [B, L], at padding, too."""
        states = self.net.apply({"params": params}, tokens, token_mask)
        assert isinstance(states, jax.Array)
        return states

    def loss(
        self, params: dict, key: jax.Array, batch: dict, *, step: jax.Array | int = 0, train: bool = True
    ) -> Loss:
        """Mean cross entropy of the masked and of the kept tokens, in nats; the share of the masked that is
        right."""
        tokens, real = batch["tokens"], batch["token_mask"]
        starts = jax.random.bernoulli(key, self.mask_rate / SPAN, tokens.shape)
        masked = starts
        for k in range(1, SPAN):
            masked |= jnp.pad(starts, ((0, 0), (k, 0)))[:, : tokens.shape[1]]
        masked &= real
        states = self.net.apply({"params": params}, jnp.where(masked, self.mask_token, tokens), real)
        table = params["token_embedding"]["embedding"]
        logits = jnp.einsum("bld,vd->blv", states, table) * table.shape[1] ** -0.5
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
        losses = {}
        for name, where in (("masked_loss", masked), ("kept_loss", real & ~masked)):
            losses[name] = -jnp.where(where, log_p, 0).sum() / jnp.maximum(where.sum(), 1)
        loss = losses["masked_loss"] + losses["kept_loss"]
        right = jnp.where(masked, logits.argmax(axis=-1) == tokens, False).sum() / jnp.maximum(
            masked.sum(), 1
        )
        return Loss(loss, {"loss": loss, **losses, "accuracy": right, "masked": masked.sum() / real.sum()})


def build(
    *,
    vocab_size: int = 32_128,
    width: int = 4096,
    depth: int = 24,
    num_heads: int = 64,
    mlp_width: int = 10_240,
    head_dim: int = 64,
    context_length: int = 128,
    mask_token: int = 32_099,
    mask_rate: float = 0.15,
    remat: bool | str = "none",
    dtype: str = "float32",
) -> T5:
    """The encoder of a config, T5 v1.1 XXL's by default; ValueError for settings that cannot go together."""
    if not 0 <= mask_token < vocab_size or not 0 < mask_rate < 1:
        raise ValueError(
            f"mask_token {mask_token} must be an id below vocab_size {vocab_size}, mask_rate {mask_rate} in "
            "0 .. 1"
        )
    sizes = (vocab_size, width, depth, num_heads, mlp_width, head_dim)
    net = T5Encoder(*sizes, remat=remat, dtype=jnp.dtype(dtype))
    return T5(net, context_length, mask_token, mask_rate)
