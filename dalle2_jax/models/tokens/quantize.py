"""Quantizers: the vectors of an encoder as codes of a book. Three kinds with one interface.

    VQ      code = argmin_k |z - e_k|^2,  z_q = z + sg(e - z),  loss = beta |z - sg(e)|^2
            (arXiv 1711.00937)
            book by moving averages: n <- g n + (1 - g) count,  m <- g m + (1 - g) sum of z,
            e = m / ((n + eps) / (N + K eps) N),  N = sum of n;  a batch is quantized with the book before it
    Gumbel  y = softmax((logits + noise) / tau),  z_q = y E,  loss = beta KL(softmax(logits) | uniform),
            code = argmax logits  (arXiv 1611.01144, as in DALL-E 1, arXiv 2102.12092)
    FSQ     each channel of z is bounded and rounded to one of its levels; the code is their mixed-radix
            number; there is no book to learn, so none that could collapse               (arXiv 2309.15505)

Each has `init(key) -> (trained, statistics)`, two dicts of arrays. The other methods get both in one dict,
`state`. Statistics follow params["stats"]: see `stages`. Distances, sums and averages are float32.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

WINDOW = 65_536  # codes over which the used share of a book is counted, at least; a batch if that is more
EPSILON = 1e-5  # of the moving average's smoothing
FIRST_COUNT = 1e-3  # of each code before the first batch
HIGHEST = jax.lax.Precision.HIGHEST  # codes depend on rounding: no bfloat16 or TF32 inside products


class Quantized(NamedTuple):
    """z_q [B, h, w, out_width]: what the decoder reads. codes [B, h, w] int32. loss: [], already weighted.

    scalars: {name: []}. statistics: what the batch adds, for `update`; arrays without a gradient.
    """

    z_q: jax.Array
    codes: jax.Array
    loss: jax.Array
    scalars: dict[str, jax.Array]
    statistics: dict[str, jax.Array]


def cosine(start_end_steps: tuple[float, float, float], step: jax.Array | int) -> jax.Array:
    """The value at a step of (start, end, steps): half a cosine from start to end, then end."""
    start, end, steps = start_end_steps
    p = jnp.clip(jnp.asarray(step, jnp.float32) / max(steps, 1), 0, 1)
    return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * p))


def perplexity(counts: jax.Array) -> jax.Array:
    """exp of the entropy of the shares of counts [K]: K for even use, 1 for one code."""
    p = counts / counts.sum()
    return jnp.exp(-jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum())


def one_hot(codes: jax.Array, num_codes: int) -> jax.Array:
    """codes [...] -> [N, K] float32 of all positions."""
    return jax.nn.one_hot(codes.reshape(-1), num_codes)


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """What the three kinds share: the use of the codes."""

    num_codes: int = 0
    relaxed = False  # whether z_q differs between training and codes

    def init(self, key: jax.Array) -> tuple[dict, dict]:
        """(trained arrays, statistics)."""
        return {}, {"since": jnp.zeros(self.num_codes)}

    @property
    def advice(self) -> str:
        """What to change after a collapse."""
        return ""

    def update(self, state: dict, statistics: dict, key: jax.Array) -> tuple[dict, dict]:
        """(the statistics after a step, scalars) of what `quantize` returned, stacked [grad_accum, ...].

        since [K]: the codes that were drawn since a code was last one of them. A code counts as unused after
        WINDOW of them, so that `usage` is 1 until so many were drawn.
        """
        counts = statistics["counts"].sum(axis=0)
        since = jnp.where(counts > 0, 0, jnp.minimum(state["since"] + counts.sum(), WINDOW))
        scalars = {"perplexity": perplexity(counts), "usage": (since < WINDOW).mean()}
        return {"since": since}, scalars


@dataclasses.dataclass(frozen=True)
class VQ(Quantizer):
    """The nearest of `num_codes` vectors.

    Attributes:
      width: of the vectors. beta: weight of the commitment loss, a mean over positions and width.
      decay: of the moving averages; 0: the book is trained by its own loss, |sg(z) - e|^2, without beta.
      restart: 0, or the share of the average code's count below which a code becomes a random vector of the
        batch, with the average count. An addition, in none of the papers.
    """

    width: int = 64
    beta: float = 0.25
    decay: float = 0.99
    restart: float = 0.0

    @property
    def advice(self) -> str:
        """See `Quantizer`."""
        first = "raise model.quantizer.restart" if self.restart else "set model.quantizer.restart=0.1"
        return f"{first}{'' if self.decay else ' and decay=0.99'}, lower beta, or use kind='fsq'"

    @property
    def in_width(self) -> int:
        """Channels that `quantize` reads."""
        return self.width

    out_width = in_width

    def init(self, key: jax.Array) -> tuple[dict, dict]:
        """A normal book, whose averages weigh so little that the first batches replace them."""
        book = jax.random.normal(key, (self.num_codes, self.width)) / math.sqrt(self.width)
        _, stats = super().init(key)
        if not self.decay:
            return {"embedding": book}, stats
        count = jnp.full(self.num_codes, FIRST_COUNT)
        return {}, stats | {"book": book, "sum": FIRST_COUNT * book, "count": count}

    def _book(self, state: dict) -> jax.Array:
        return state["book" if self.decay else "embedding"]

    def encode(self, state: dict, z: jax.Array) -> jax.Array:
        """z [B, h, w, D] -> codes [B, h, w] int32."""
        book, z = self._book(state), z.astype(jnp.float32)
        # |z - e|^2 without |z|^2, which is the same for all codes
        far = jnp.square(book).sum(axis=-1) - 2 * jnp.einsum("bhwd,kd->bhwk", z, book, precision=HIGHEST)
        return far.argmin(axis=-1).astype(jnp.int32)

    def lookup(self, state: dict, codes: jax.Array) -> jax.Array:
        """codes [B, h, w] -> [B, h, w, D] float32."""
        return self._book(state)[codes]

    def quantize(self, state: dict, z: jax.Array, key: jax.Array, step, train: bool) -> Quantized:
        """z [B, h, w, D] -> their nearest vectors, with the gradient of z."""
        z, codes = z.astype(jnp.float32), self.encode(state, jax.lax.stop_gradient(z))
        nearest = self.lookup(state, codes)
        commit = jnp.square(z - jax.lax.stop_gradient(nearest)).mean()
        loss = self.beta * commit
        if not self.decay:
            loss += jnp.square(jax.lax.stop_gradient(z) - nearest).mean()
        z_q = z + jax.lax.stop_gradient(nearest - z)
        vectors = jax.lax.stop_gradient(z).reshape(-1, self.width)
        chosen = one_hot(codes, self.num_codes)
        statistics = {"counts": chosen.sum(axis=0)}
        if train and self.decay:
            statistics["sums"] = jnp.einsum("nk,nd->kd", chosen, vectors, precision=HIGHEST)
        if train and self.decay and self.restart:  # one vector of the batch for each code
            few = len(vectors) < self.num_codes
            statistics["vectors"] = vectors[jax.random.choice(key, len(vectors), (self.num_codes,), few)]
        return Quantized(z_q, codes, loss, {"commit": commit}, statistics)

    def update(self, state: dict, statistics: dict, key: jax.Array) -> tuple[dict, dict]:
        """The moving averages, and restarts; see `Quantizer.update`."""
        stats, scalars = super().update(state, statistics, key)
        if not self.decay:
            return stats, scalars
        counts, sums = statistics["counts"].sum(axis=0), statistics["sums"].sum(axis=0)
        count = self.decay * state["count"] + (1 - self.decay) * counts
        total = self.decay * state["sum"] + (1 - self.decay) * sums
        if self.restart:
            dead = count < self.restart * count.mean()
            part = jax.random.randint(key, (self.num_codes,), 0, len(statistics["vectors"]))
            vectors = statistics["vectors"][part, jnp.arange(self.num_codes)]
            count, average = jnp.where(dead, count.mean(), count), count.mean()
            total = jnp.where(dead[:, None], average * vectors, total)
            scalars["restarts"] = dead.sum().astype(jnp.float32)
        n = count.sum()
        smooth = (count + EPSILON) / (n + self.num_codes * EPSILON) * n
        return stats | {"book": total / smooth[:, None], "sum": total, "count": count}, scalars


@dataclasses.dataclass(frozen=True)
class Gumbel(Quantizer):
    """A relaxed draw from softmax(logits) in training, the likeliest code afterwards.

    Attributes:
      width: of the vectors that the decoder reads.
      tau, beta: (start, end, steps) of a cosine: temperature, weight of the KL divergence.
      values_per_code: values of a picture for each of its codes. The KL is summed over positions and divided
        by the values of a picture, like the likelihood: so beta is that of the paper.
      bias: the vectors have a common bias (the first convolution of DALL-E's decoder).
    """

    width: int = 128
    tau: tuple[float, float, float] = (1.0, 1 / 16, 150_000)
    beta: tuple[float, float, float] = (0.0, 6.6, 5000)
    values_per_code: float = 192.0
    bias: bool = True
    relaxed = True

    @property
    def advice(self) -> str:
        """See `Quantizer`."""
        return "let model.quantizer.tau fall more slowly, or raise the end of beta"

    @property
    def in_width(self) -> int:
        """Channels that `quantize` reads: logits."""
        return self.num_codes

    @property
    def out_width(self) -> int:
        """Channels of z_q."""
        return self.width

    def init(self, key: jax.Array) -> tuple[dict, dict]:
        """Vectors of variance 1 / num_codes, as a convolution's of a one-hot input."""
        book = jax.random.normal(key, (self.num_codes, self.width)) / math.sqrt(self.num_codes)
        trained = {"embedding": book} | ({"bias": jnp.zeros(self.width)} if self.bias else {})
        return trained, super().init(key)[1]

    def encode(self, state: dict, z: jax.Array) -> jax.Array:
        """Logits [B, h, w, K] -> codes [B, h, w] int32."""
        return z.astype(jnp.float32).argmax(axis=-1).astype(jnp.int32)

    def lookup(self, state: dict, codes: jax.Array) -> jax.Array:
        """codes [B, h, w] -> [B, h, w, D] float32."""
        return state["embedding"][codes] + state.get("bias", 0)

    def quantize(self, state: dict, z: jax.Array, key: jax.Array, step, train: bool) -> Quantized:
        """Logits z [B, h, w, K] -> relaxed vectors; with train=False those of the codes."""
        logits = z.astype(jnp.float32)
        codes = self.encode(state, logits)
        log_p = jax.nn.log_softmax(logits)
        # of the distribution itself, without noise and temperature
        kl = (jnp.exp(log_p) * log_p).sum(axis=-1).mean() + math.log(self.num_codes)
        tau, beta = cosine(self.tau, step), cosine(self.beta, step)
        if train:
            soft = jax.nn.softmax((logits + jax.random.gumbel(key, logits.shape)) / tau)
            z_q = jnp.einsum("bhwk,kd->bhwd", soft, state["embedding"]) + state.get("bias", 0)
        else:
            z_q = self.lookup(state, codes)
        statistics = {"counts": one_hot(codes, self.num_codes).sum(axis=0)}
        scalars = {"kl": kl, "tau": tau, "beta": beta}
        return Quantized(z_q, codes, beta * kl / self.values_per_code, scalars, statistics)


@dataclasses.dataclass(frozen=True)
class FSQ(Quantizer):
    """Finite scalar quantization. num_codes: the product of `levels`, the values of each channel."""

    levels: tuple[int, ...] = ()

    @property
    def advice(self) -> str:
        """See `Quantizer`."""
        return "give fewer or smaller model.quantizer.levels: the pictures need fewer codes"

    @property
    def in_width(self) -> int:
        """Channels that `quantize` reads."""
        return len(self.levels)

    out_width = in_width

    def _bounded(self, z: jax.Array) -> jax.Array:
        """z -> (-L/2, L/2) for odd L, (-L/2 - .5, L/2 - .5) for even L, so that rounding gives L integers."""
        levels = jnp.array(self.levels, jnp.float32)
        half = (levels - 1) * (1 - 1e-3) / 2
        offset = jnp.where(levels % 2 == 0, 0.5, 0.0)
        return jnp.tanh(z.astype(jnp.float32) + jnp.tan(offset / half)) * half - offset

    def encode(self, state: dict, z: jax.Array) -> jax.Array:
        """z [B, h, w, channels] -> codes [B, h, w] int32."""
        digits = jnp.round(self._bounded(z)).astype(jnp.int32) + jnp.array(self.levels) // 2
        return (digits * self._radix()).sum(axis=-1).astype(jnp.int32)

    def _radix(self) -> jax.Array:
        return jnp.array([math.prod(self.levels[:i]) for i in range(len(self.levels))], jnp.int32)

    def lookup(self, state: dict, codes: jax.Array) -> jax.Array:
        """codes [B, h, w] -> [B, h, w, channels] float32 in [-1, 1]."""
        levels = jnp.array(self.levels)
        digits = codes[..., None] // self._radix() % levels
        return (digits - levels // 2) / (levels // 2).astype(jnp.float32)

    def quantize(self, state: dict, z: jax.Array, key: jax.Array, step, train: bool) -> Quantized:
        """z [B, h, w, channels] -> rounded, with the gradient of the bounded values."""
        bounded = self._bounded(z)
        rounded = bounded + jax.lax.stop_gradient(jnp.round(bounded) - bounded)
        codes = self.encode(state, z)
        statistics = {"counts": one_hot(codes, self.num_codes).sum(axis=0)}
        half = jnp.array([level // 2 for level in self.levels], jnp.float32)
        return Quantized(rounded / half, codes, jnp.float32(0), {}, statistics)
