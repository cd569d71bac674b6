"""The autoregressive prior: caption and CLIP text embedding -> CLIP image embedding, code by code.

Section 2.2 of the paper. With mean mu and principal components P [K, E] (rows, by falling variance) of the
image embeddings z_i,

    c     = P (z_i - mu)                          [K]: what the first K components explain
    code  = bucket of c, entry by entry           `buckets` of equal width over the 0.1 .. 99.9 percentiles
    dot   = bucket of z_i . z_t (unit vectors)    `dot_buckets` that hold equally many of the training pairs
    p(codes | y) = prod_k p(code_k | code_<k, z_t, dot, caption)

trained by cross entropy. A code stands for the centre of its bucket, and mu + P^T c for the embedding. Of
the K components those are kept that leave at most `max_error` of the variance unexplained (the paper: 319 of
1,024 leave less than a hundredth); the rest are neither learned nor drawn. Sampling draws the dot product
from the upper half of its buckets, and guides the logits: u + s (c - u). The text, that is caption, text
embedding and dot product, is dropped together.

The paper does not say how a caption of 256 tokens enters a sequence of 384 that holds 319 codes: here by
cross-attention (see `nets.latents`).
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.models.diffusion.guidance import is_guided
from dalle2_jax.models.nets.latents import LatentTransformer
from dalle2_jax.models.stages import Loss, Op, candidates, check_settings, narrow_in_loop
from dalle2_jax.models.stages.clip import unit_norm
from dalle2_jax.models.stages.settings import CANDIDATES, SCALE, Setting
from dalle2_jax.models.tokens.decode import Options, decode

SETTINGS = (
    SCALE,
    CANDIDATES,
    Setting("temperature", float, "Temperature of an autoregressive prior.", 1e-6),
    Setting(
        "dot_quantile",
        float,
        "An autoregressive prior draws the dot product from above this share.",
        0,
        1 - 1e-6,
    ),
)

# The dot product folds a number into a sample's key that no code reaches.
_DOT_FOLD = 2**31 - 1


def buckets(edges: jax.Array, x: jax.Array) -> jax.Array:
    """x [..., K] -> which of the buckets of its own edges [K, Q + 1] each entry lies in, [..., K] int32.

    The outermost buckets reach to infinity.
    """
    inner = edges[:, 1:-1]
    count = jax.vmap(lambda e, v: jnp.searchsorted(e, v, side="right"), in_axes=(0, -1), out_axes=-1)
    return count(inner, x).astype(jnp.int32)


def centres(edges: jax.Array, codes: jax.Array) -> jax.Array:
    """codes [..., K] -> the middles of their buckets, [..., K] float32."""
    middles = (edges[:, :-1] + edges[:, 1:]) / 2
    return jax.vmap(jnp.take, in_axes=(0, -1), out_axes=-1)(middles, codes)


def fit_components(
    batches: Callable[[], Iterable[dict[str, np.ndarray]]],
    num_components: int,
    num_buckets: int,
    num_dot_buckets: int,
    max_error: float,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """(the stage's 'stats', scalars that describe them) in two streaming passes, moments in float64.

    batches() yields image_embed [n, E] and text_embed [n, E]. Raises ValueError for fewer rows than
    components.
    """
    count = 0
    total: Any = 0.0
    outer: Any = 0.0
    for batch in batches():
        x = np.asarray(batch["image_embed"], np.float64)
        count, total, outer = count + len(x), total + x.sum(axis=0), outer + x.T @ x
    if count <= num_components:
        raise ValueError(
            f"{count} embeddings do not determine {num_components} components: raise model.fit_rows, or "
            "lower model.num_components"
        )
    mean = total / count
    variance, vectors = np.linalg.eigh(outer / count - np.outer(mean, mean))
    variance, vectors = np.maximum(variance[::-1], 0.0), vectors[:, ::-1]
    error = 1.0 - np.cumsum(variance) / variance.sum()
    kept = min(int(np.searchsorted(-error, -max_error)) + 1, num_components)
    components = vectors[:, :num_components].T

    coordinates, dots = [], []
    for batch in batches():
        x, y = (np.asarray(batch[name], np.float64) for name in ("image_embed", "text_embed"))
        coordinates.append(((x - mean) @ components.T).astype(np.float32))
        dots.append((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1))
    low, high = np.percentile(np.concatenate(coordinates), [0.1, 99.9], axis=0)
    high = np.maximum(high, low + 1e-6)
    edges = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, num_buckets + 1)
    dot_edges = np.quantile(np.concatenate(dots), np.linspace(0, 1, num_dot_buckets + 1))
    stats = dict(
        mean=mean,
        components=components,
        edges=edges,
        dot_edges=dot_edges,
        kept=(np.arange(num_components) < kept),
    )
    scalars = dict(rows=count, components=kept, unexplained=float(error[kept - 1]))
    return {name: np.asarray(value, np.float32) for name, value in stats.items()}, scalars


@dataclasses.dataclass(frozen=True)
class ARPrior:
    """The autoregressive prior's network and sampling defaults; parameters go to every call.

    Parameters are {'net': ..., 'stats': {'mean' [E], 'components' [K, E], 'edges' [K, Q + 1], 'dot_edges'
    [D + 1], 'kept' [K] (1 or 0)}}; the statistics have no gradient and are set by `fit`.
    """

    ops = {"sample": Op(("image_embed",))}
    net: LatentTransformer
    embed_dim: int
    context_length: int
    max_error: float
    fit_rows: int
    text_drop: float
    guidance_scale: float
    num_candidates: int
    temperature: float
    dot_quantile: float

    states_width = 0  # it reads tokens, never the states of a frozen CLIP

    @property
    def sampling(self) -> dict:
        """Defaults of `sample`."""
        return dict(
            guidance_scale=self.guidance_scale,
            num_candidates=self.num_candidates,
            temperature=self.temperature,
            dot_quantile=self.dot_quantile,
        )

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields that `loss` reads; `sample` reads the same without `image_embed`."""
        embed = jax.ShapeDtypeStruct((batch_size, self.embed_dim), jnp.float32)
        shape = (batch_size, self.context_length)
        return {
            "image_embed": embed,
            "text_embed": embed,
            "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
            "token_mask": jax.ShapeDtypeStruct(shape, jnp.bool_),
        }

    def init(self, key: jax.Array, batch: dict) -> dict:
        """Float32 parameters; the statistics are those of the first entries of embeddings: see `fit`."""
        size, net = batch["image_embed"].shape[0], self.net
        zeros = jnp.zeros(size, jnp.int32)
        codes = jnp.zeros((size, net.num_codes), jnp.int32)
        text = (batch["tokens"], batch["token_mask"], zeros.astype(bool))
        return {
            "net": net.init(key, batch["text_embed"], zeros, codes, *text)["params"],
            "stats": {
                "mean": jnp.zeros(self.embed_dim),
                "components": jnp.eye(net.num_codes, self.embed_dim),
                "edges": jnp.tile(jnp.linspace(-1, 1, net.num_buckets + 1), (net.num_codes, 1)),
                "dot_edges": jnp.linspace(-1, 1, net.num_dot_buckets + 1),
                "kept": jnp.ones(net.num_codes),
            },
        }

    def fit(self, params: dict, batches: Callable[[], Iterable[dict]]) -> tuple[dict, dict[str, float]]:
        """(`params` with the statistics of the data, scalars that describe them); see `fit_components`."""
        net = self.net
        stats, scalars = fit_components(
            batches, net.num_codes, net.num_buckets, net.num_dot_buckets, self.max_error
        )
        return params | {"stats": {name: jnp.asarray(value) for name, value in stats.items()}}, scalars

    def encode(self, params: dict, image_embed: jax.Array) -> jax.Array:
        """image_embed [B, E] -> codes [B, K] int32."""
        stats = params["stats"]
        x = image_embed.astype(jnp.float32) - stats["mean"]
        return buckets(stats["edges"], jnp.matmul(x, stats["components"].T, precision="highest"))

    def decode(self, params: dict, codes: jax.Array) -> jax.Array:
        """codes [B, K] -> image_embed [B, E] float32, from the components that are kept."""
        stats = params["stats"]
        coordinates = centres(stats["edges"], codes) * stats["kept"]
        return jnp.matmul(coordinates, stats["components"], precision="highest") + stats["mean"]

    def dot_bucket(self, params: dict, image_embed: jax.Array, text_embed: jax.Array) -> jax.Array:
        """The bucket [B] int32 of the dot product of embeddings [B, E]."""
        dot = (unit_norm(image_embed) * unit_norm(text_embed)).sum(axis=-1)
        return buckets(params["stats"]["dot_edges"][None], dot[:, None])[:, 0]

    def loss(
        self, params: dict, key: jax.Array, batch: dict, *, step: jax.Array | int = 0, train: bool = True
    ) -> Loss:
        """Mean cross entropy of a code, in nats, and scalars; `train=False` drops no text."""
        params = params | {"stats": jax.lax.stop_gradient(params["stats"])}
        codes = self.encode(params, batch["image_embed"])
        dot = self.dot_bucket(params, batch["image_embed"], batch["text_embed"])
        drop = jax.random.bernoulli(key, self.text_drop, codes.shape[:1]) & train
        logits: Any = self.net.apply(
            {"params": params["net"]},
            batch["text_embed"],
            dot,
            codes,
            batch["tokens"],
            batch["token_mask"],
            drop,
        )
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), codes[..., None], axis=-1)[..., 0]
        kept = params["stats"]["kept"]

        def mean(x):
            return (x * kept).sum(axis=-1).mean() / kept.sum()

        loss = -mean(log_p)
        rebuilt = (unit_norm(self.decode(params, codes)) * unit_norm(batch["image_embed"])).sum(axis=-1)
        right = (logits.argmax(axis=-1) == codes).astype(jnp.float32)
        return Loss(loss, {"loss": loss, "accuracy": mean(right), "code_cosine": rebuilt.mean()})

    def sample(
        self,
        params: dict,
        keys: jax.Array,
        batch: dict,
        *,
        guidance_scale: float | jax.Array | None = None,
        num_candidates: int | None = None,
        temperature: float | None = None,
        dot_quantile: float | None = None,
    ) -> jax.Array:
        """Image embeddings [B, E] float32 in CLIP's own scale, one key a caption, in one scan over the codes.

        Reads text_embed, tokens and token_mask. A guidance scale given as the Python number 1 saves the
        unconditional half of the work; an array is traced. Of `num_candidates` the one closest to the text
        embedding is kept. Codes are drawn at `temperature`, the dot product from above `dot_quantile`.
        """
        count = self.num_candidates if num_candidates is None else num_candidates
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        temperature = self.temperature if temperature is None else temperature
        quantile = self.dot_quantile if dot_quantile is None else dot_quantile
        guided, size = is_guided(scale), len(keys)
        keys = candidates.split_keys(keys, count)

        # [B count]: one dot product a candidate, from the buckets above the quantile
        low, high = int(quantile * self.net.num_dot_buckets), self.net.num_dot_buckets
        dot_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, _DOT_FOLD)
        dot = jax.vmap(lambda key: jax.random.randint(key, (), low, high))(dot_keys)
        # The conditional and the null half of a candidate are neighbours.
        halves = jnp.array([False, True] if guided else [False])
        names = ("text_embed", "tokens", "token_mask")
        text_embed, *caption = (jnp.repeat(batch[name], len(halves), axis=0) for name in names)
        drop = jnp.tile(halves, size)
        scale = jnp.repeat(scale, count)[:, None] if jnp.ndim(scale) else scale

        def apply(method, *arguments):
            return self.net.apply({"params": params["net"]}, *arguments, method=method)

        states, mask = apply("encode", *caption, drop)
        read = apply("read", states), mask, text_embed, drop
        text, mask, text_embed, drop = candidates.spread(read, size, count)
        prefix = apply("prefix", text_embed, jnp.repeat(dot, len(halves)), drop)
        caches = apply("empty_caches", len(drop))
        _, caches = apply("step", prefix[:, 0], jnp.int32(0), text, mask, caches)

        def step(x, k, caches):  # position 0 is the prefix's
            own, x = narrow_in_loop(params["net"], x)
            return self.net.apply({"params": own}, x, k + 1, text, mask, caches, method="step")

        codes = decode(
            step,
            lambda codes: apply("embed_codes", codes),
            prefix[:, 1],
            caches,
            keys,
            self.net.num_codes,
            Options(temperature, guidance_scale=scale if guided else None),
        )
        return candidates.closest(self.decode(params, codes), batch["text_embed"])


def build(
    *,
    embed_dim: int,
    text: dict,
    latent: dict,
    num_components: int = 319,
    num_buckets: int = 1024,
    num_dot_buckets: int = 1024,
    max_error: float = 0.01,
    fit_rows: int = 65_536,
    text_drop: float = 0.1,
    guidance_scale: float = 1.0,
    num_candidates: int = 1,
    temperature: float = 1.0,
    dot_quantile: float = 0.5,
    remat: bool | str = "none",
    dtype: str = "float32",
) -> ARPrior:
    """The autoregressive prior of a config; defaults are the paper's.

    Args:
      embed_dim: size of CLIP's embeddings.
      text: dict(vocab_size, context_length, width, depth, num_heads) of the caption's encoder.
      latent: dict(width, depth, num_heads) of the decoder of codes.
      num_components: K, codes of an embedding; num_buckets: values of a code.
      num_dot_buckets: values of the dot product.
      max_error: share of the variance that the kept components may leave unexplained, if K allows.
      fit_rows: training examples over which components and buckets are fitted.
      text_drop: how often the text is dropped in training.
      guidance_scale, num_candidates, temperature, dot_quantile: defaults of `sample`.
      remat: what of a block is computed again in the backward pass, 'none', 'products' (all else) or 'all'.
      dtype: compute type of the network.

    Raises:
      ValueError: for settings that are unknown, missing or do not go together.
    """
    check_settings(text, ("vocab_size", "context_length", "width", "depth", "num_heads"), (), "text")
    check_settings(latent, ("width", "depth", "num_heads"), (), "latent")
    for name, part in (("text", text), ("latent", latent)):
        if part["width"] % part["num_heads"]:
            raise ValueError(
                f"{name}.width {part['width']} is not a multiple of its num_heads {part['num_heads']}"
            )
    if not 1 <= num_components <= embed_dim:
        raise ValueError(f"num_components {num_components} must be in 1 .. embed_dim = {embed_dim}")
    if num_buckets < 2 or num_dot_buckets < 2:
        raise ValueError(
            f"num_buckets {num_buckets} and num_dot_buckets {num_dot_buckets} must be at least 2"
        )
    if not 0 <= text_drop < 1 or not 0 <= dot_quantile < 1 or not 0 < max_error < 1:
        raise ValueError(
            f"text_drop {text_drop} and dot_quantile {dot_quantile} must be in [0, 1), "
            f"max_error {max_error} in (0, 1)"
        )
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} must be above 0; 1 draws from the model")
    net = LatentTransformer(
        embed_dim=embed_dim,
        num_codes=num_components,
        num_buckets=num_buckets,
        num_dot_buckets=num_dot_buckets,
        text=dict(text),
        **latent,
        remat=remat,
        dtype=jnp.dtype(dtype),
    )
    return ARPrior(
        net=net,
        embed_dim=embed_dim,
        context_length=text["context_length"],
        max_error=max_error,
        fit_rows=fit_rows,
        text_drop=text_drop,
        guidance_scale=guidance_scale,
        num_candidates=num_candidates,
        temperature=temperature,
        dot_quantile=dot_quantile,
    )
