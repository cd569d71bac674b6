"""The optimizer: AdamW or Adafactor, Muon for kernels on request; weight decay, schedules, clipping.

One step of AdamW (Loshchilov & Hutter, arXiv:1711.05101), with g the clipped gradient and n = 1, 2, ... its
number:

    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    u = (m / (1 - beta1^n)) / (sqrt(v / (1 - beta2^n)) + eps)
    params = params - lr(n - 1) (u + weight_decay params)

Adafactor (Shazeer & Stern, arXiv:1804.04235) keeps of v its means over rows and columns alone, and no m: see
`_adafactor`.

With `muon_learning_rate` the kernels of hidden layers take Muon's steps instead (Jordan et al. 2024): the
momentum, made orthogonal by Newton-Schulz iterations. A convolution counts as the matrix
[height x width x in, out], and queries, keys and values of one kernel as matrices of their own. A small U-Net
then needs about half the steps, each a tenth longer.

Weight decay is left off gains, biases and temperatures, that is off every array of rank 0 and 1, as CLIP does
(arXiv:2103.00020, section 2.5). Moments are float32 whatever the gradients are.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dalle2_jax.runtime import partition
from dalle2_jax.runtime.names import nearest

# Names in the paths of parameters that get no gradient: statistics, an upsampler's last-step network, the
# states of a null caption that is "".
UNTRAINED = ("stats", "last", "null_text_states")
SCHEDULES = ("constant", "cosine", "linear")
OPTIMIZERS = ("adamw", "adafactor")
FUSED = {"qkv": 3, "kv": 2, "text_kv": 2}  # layers whose kernel is several matrices side by side
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS = (3.4445, -4.7750, 2.0315), 4


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError for a value of the setting `name` that is not among `choices`."""
    if value not in choices:
        near = nearest(value, choices)
        hint = f" (did you mean {near}?)" if near else ""
        raise ValueError(f"optim.{name}={value!r} is unknown{hint}: use one of {', '.join(choices)}")


def make_schedule(
    learning_rate: float,
    num_steps: int,
    schedule: str = "constant",
    warmup_steps: int = 0,
    final_fraction: float = 0.0,
    decay_steps: int = 0,
    decay_fraction: float = 1.0,
) -> optax.Schedule:
    """Returns lr(n) for n = 0 .. num_steps - 1, float32.

    During the warm-up lr(n) = learning_rate (n + 1) / warmup_steps, so that the first step already moves.
    After it, with D = decay_steps or num_steps, S = D - decay_fraction (D - warmup_steps) in whole steps, and
    p = (n - S) / (D - S) in [0, 1]:
      constant: learning_rate
      linear:   learning_rate (1 - p (1 - final_fraction))
      cosine:   learning_rate (final_fraction + (1 - final_fraction) (1 + cos(pi p)) / 2)
    """
    check_choice("schedule", schedule, SCHEDULES)
    if learning_rate < 0:
        raise ValueError(f"optim.learning_rate={learning_rate} must be >= 0 (0 changes no parameter)")
    if not 0 <= warmup_steps < max(1, num_steps):
        raise ValueError(f"optim.warmup_steps={warmup_steps} must be in [0, num_steps={num_steps})")
    if decay_steps and not warmup_steps < decay_steps <= num_steps:
        raise ValueError(
            f"optim.decay_steps={decay_steps} must be above warmup_steps={warmup_steps} and at most "
            f"num_steps={num_steps}; 0: num_steps"
        )
    if not 0 <= final_fraction <= 1:
        raise ValueError(f"optim.final_fraction={final_fraction} must be in [0, 1]")
    if not 0 < decay_fraction <= 1:
        raise ValueError(f"optim.decay_fraction={decay_fraction} must be in (0, 1]; 1: all after the warm-up")
    end = decay_steps or num_steps
    start = end - max(1, round(decay_fraction * (end - warmup_steps)))

    def lr(n: jax.Array | int) -> jax.Array:
        n = jnp.asarray(n, jnp.float32)
        p = jnp.clip((n - start) / (end - start), 0.0, 1.0)
        if schedule == "cosine":
            shape = final_fraction + (1 - final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * p))
        elif schedule == "linear":
            shape = 1 - p * (1 - final_fraction)
        else:
            shape = jnp.ones_like(p)
        warmup = jnp.minimum(1.0, (n + 1) / warmup_steps) if warmup_steps else 1.0
        return jnp.float32(learning_rate) * shape * warmup

    return lr


def decay_mask(params) -> object:
    """Returns a tree of bools: True where weight decay applies, to what is trained and of rank 2 or more."""

    def decays(path, p):
        return len(p.shape) >= 2 and not {getattr(key, "key", None) for key in path} & set(UNTRAINED)

    return jax.tree_util.tree_map_with_path(decays, params)


def is_hidden_kernel(path, p) -> bool:
    """Whether Muon may step an array: kernels, but those between a network and its input or output."""
    name = "/".join(str(getattr(key, "key", key)) for key in path)
    return len(p.shape) >= 2 and re.search(r"(^|/)(?!conv_in|conv_out|patches_)\w+/kernel$", name) is not None


def orthogonal(matrices: Sequence[jax.Array]) -> list[jax.Array]:
    """Every matrix [m, n], U S V', made nearly U V': its singular values land in about 0.7 .. 1.2.

    Four of Muon's Newton-Schulz iterations (Jordan et al. 2024), the first preconditioned by AOL, which saves
    a fifth (arXiv:2512.04632). They multiply X by polynomials of its Gram matrix, which commute; so the
    iterations run on the Gram matrices, all of one size together, and X is multiplied once at the end. That
    is half the arithmetic for kernels of convolutions, in a tenth of the products. They are split over the
    devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else partition.batch_shards()
    groups: dict[tuple[int, ...], list[int]] = {}
    stacks: dict[tuple[int, ...], jax.Array] = {}
    grams: dict[int, dict[tuple[int, ...], jax.Array]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault(matrix.shape, []).append(i)
    for (m, n), members in groups.items():
        x = jnp.stack([matrices[i] for i in members])
        # Zeros, which stay zeros, fill up to a number that the devices can share evenly.
        x = jnp.pad(x, ((0, -len(members) % shards), (0, 0), (0, 0))).reshape(shards, -1, m, n)
        x = stacks[m, n] = partition.constrain(x)
        gram = "skmn,skmp->sknp" if m > n else "skmn,skpn->skmp"
        grams.setdefault(min(m, n), {})[m, n] = jnp.einsum(gram, x, x)
    done: list[Any] = [None] * len(matrices)
    for parts in grams.values():
        scale, factor = _polynomial(jnp.concatenate(list(parts.values()), axis=1))
        bounds = np.cumsum([part.shape[1] for part in parts.values()])[:-1]
        split = zip(parts, jnp.split(scale, bounds, axis=1), jnp.split(factor, bounds, axis=1), strict=True)
        for (m, n), s, f in split:
            if m > n:
                x = jnp.einsum("skmn,sknp->skmp", stacks[m, n], s[..., :, None] * f)
            else:
                x = jnp.einsum("skmp,skpn->skmn", f * s[..., None, :], stacks[m, n])
            for i, matrix in zip(groups[m, n], x.reshape(-1, m, n), strict=False):
                done[i] = matrix
    return done


def _polynomial(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(s [..., n], P [..., n, n]) of Gram matrices [..., n, n] of X: X diag(s) P is what the iterations lead
    to."""
    a, b, c = NEWTON_SCHULZ
    scale = jax.lax.rsqrt(jnp.maximum(jnp.abs(gram).sum(axis=-1), 1e-8))
    gram = gram * scale[..., :, None] * scale[..., None, :]
    identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    product: Any = None
    for i in range(NEWTON_SCHULZ_STEPS):
        factor = a * identity + b * gram + c * (gram @ gram)
        product = factor if product is None else product @ factor
        if i + 1 < NEWTON_SCHULZ_STEPS:
            gram = gram @ factor @ factor
    return scale, product


def _muon() -> optax.GradientTransformation:
    """Muon's direction for a tree of kernels: Nesterov's momentum of 0.95, `orthogonal`, times
    sqrt(max(1, out / in)). Queries, keys and values that lie in one kernel are matrices of their own."""

    def update(updates, state, params=None):
        leaves, structure = jax.tree_util.tree_flatten_with_path(updates)
        flat = [leaf.reshape(-1, leaf.shape[-1]) for _, leaf in leaves]
        counts = [FUSED.get(getattr(path[-2], "key", ""), 1) for path, _ in leaves]
        parts = [part for x, n in zip(flat, counts, strict=True) for part in jnp.split(x, n, axis=1)]
        directions = iter(max(1.0, x.shape[1] / x.shape[0]) ** 0.5 * x for x in orthogonal(parts))
        scaled = [
            jnp.concatenate([next(directions) for _ in range(n)], axis=1).reshape(leaf.shape)
            for n, (_, leaf) in zip(counts, leaves, strict=True)
        ]
        return structure.unflatten(scaled), state

    momentum = optax.trace(0.95, nesterov=True, accumulator_dtype=jnp.float32)
    return optax.chain(momentum, optax.GradientTransformation(optax.init_empty_state, update))


def _adafactor() -> optax.GradientTransformation:
    """Adafactor's direction with optax's defaults, as Imagen's base model was trained (arXiv 2205.11487).

    g is divided by the root of v, which decays by 1 - n^-0.8 and is factored in arrays with two axes of 128
    or more. The result has an RMS of at most 1 in each array; it is multiplied by the parameter's RMS, or by
    1e-3 if that is more.
    """
    rms = optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
    return optax.chain(*rms, optax.scale_by_param_block_rms())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What `config.optim` holds, and the length of the run.

    Attributes:
      learning_rate: the peak.
      optimizer: 'adamw' or 'adafactor'; of Adafactor's a rate is relative to the RMS of each array.
      num_steps: length of the run; cosine and linear schedules end there at `final_fraction` of the peak.
      decay_steps: they end at this step instead, and stay there; 0: num_steps.
      decay_fraction: they fall over this last share of the steps after the warm-up, at the peak before it.
      warmup_steps: steps of linear warm-up.
      schedule: 'constant', 'cosine' or 'linear'.
      beta1, beta2, eps: of AdamW, each beta in [0, 1).
      weight_decay: decoupled, multiplied by the learning rate; only on arrays of rank 2 and more.
      grad_clip: largest global norm of the gradient; None or 0 for no clipping.
      muon_learning_rate: peak for the arrays of `is_hidden_kernel`, on the same schedule; it multiplies
        sqrt(max(1, out / in)) and an orthogonal matrix, so 0.02 is usual. 0: `optimizer` everywhere.

    Raises:
      ValueError: for a value outside its range; the message names the setting.
    """

    learning_rate: float
    num_steps: int
    optimizer: str = "adamw"
    warmup_steps: int = 0
    schedule: str = "constant"
    final_fraction: float = 0.0
    decay_steps: int = 0
    decay_fraction: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float | None = None
    muon_learning_rate: float = 0.0

    def __post_init__(self):
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be in [0, 1)")
        if self.eps <= 0:
            raise ValueError(f"optim.eps={self.eps} must be > 0")
        for name, none in (
            ("weight_decay", "0 for none"),
            ("grad_clip", "0 or None for none"),
            ("muon_learning_rate", "0 for none"),
        ):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be >= 0 ({none})")
        self.learning_rates(self.learning_rate)

    def learning_rates(self, peak: float) -> optax.Schedule:
        """`make_schedule` with this peak."""
        shape = self.schedule, self.warmup_steps, self.final_fraction, self.decay_steps, self.decay_fraction
        return make_schedule(peak, self.num_steps, *shape)


def make_optimizer(**settings) -> optax.GradientTransformation:
    """Returns the optax transformation of the module's docstring; `settings` are those of `Settings`.

    Raises ValueError for a value outside its range; the message names the setting.
    """
    made = Settings(**settings)

    def chain(direction, peak):
        """Direction, weight decay, learning rate."""
        decay = [optax.add_decayed_weights(made.weight_decay, mask=decay_mask)] if made.weight_decay else []
        rate = optax.scale_by_learning_rate(made.learning_rates(peak))
        return optax.chain(direction, *decay, rate)

    adam = optax.scale_by_adam(b1=made.beta1, b2=made.beta2, eps=made.eps, mu_dtype=jnp.float32)
    optimizer = chain(_adafactor() if made.optimizer == "adafactor" else adam, made.learning_rate)
    if made.muon_learning_rate:

        def labels(params):
            return jax.tree_util.tree_map_with_path(
                lambda path, p: "muon" if is_hidden_kernel(path, p) else "adam", params
            )

        muon = chain(_muon(), made.muon_learning_rate)
        optimizer = optax.partition({"muon": muon, "adam": optimizer}, labels)
    if not made.grad_clip:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(made.grad_clip), optimizer)
