"""The optimizer: AdamW with decoupled weight decay, Muon for kernels on request; schedules and clipping.

One step (Loshchilov & Hutter, arXiv:1711.05101), with g the clipped gradient and n = 1, 2, ... its number:

    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    u = (m / (1 - beta1^n)) / (sqrt(v / (1 - beta2^n)) + eps)
    params = params - lr(n - 1) (u + weight_decay params)

With `muon_learning_rate` the kernels inside networks (those that map hidden channels to hidden channels) take
Muon's steps instead (Jordan et al. 2024, as in optax.contrib): the momentum, made orthogonal by Newton-Schulz
iterations. A convolution counts as the matrix [height x width x in, out]. Small networks need about half the
steps; the iterations cost as much as some ten passes over the parameters a step.

Weight decay is left off gains, biases and temperatures, that is off every array of rank 0 and 1, as CLIP does
(arXiv:2103.00020, section 2.5). Moments are float32 whatever the gradients are.
"""

import re

import jax
import jax.numpy as jnp
import optax
from optax import contrib

SCHEDULES = ("constant", "cosine", "linear")


def make_schedule(
    learning_rate: float,
    num_steps: int,
    schedule: str = "constant",
    warmup_steps: int = 0,
    final_fraction: float = 0.0,
) -> optax.Schedule:
    """Returns lr(n) for n = 0 .. num_steps - 1, float32.

    During the warm-up lr(n) = learning_rate (n + 1) / warmup_steps, so that the first step already moves.
    After it, with p = (n - warmup_steps) / (num_steps - warmup_steps) in [0, 1]:
      constant: learning_rate
      linear:   learning_rate (1 - p (1 - final_fraction))
      cosine:   learning_rate (final_fraction + (1 - final_fraction) (1 + cos(pi p)) / 2)
    """
    if schedule not in SCHEDULES:
        import difflib

        near = difflib.get_close_matches(str(schedule), SCHEDULES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"optim.schedule={schedule!r} is unknown{hint}: use one of {', '.join(SCHEDULES)}")
    if learning_rate <= 0:
        raise ValueError(f"optim.learning_rate={learning_rate} must be > 0")
    if not 0 <= warmup_steps < max(1, num_steps):
        raise ValueError(f"optim.warmup_steps={warmup_steps} must be in [0, num_steps={num_steps})")
    if not 0 <= final_fraction <= 1:
        raise ValueError(f"optim.final_fraction={final_fraction} must be in [0, 1]")

    def lr(n: jax.Array | int) -> jax.Array:
        n = jnp.asarray(n, jnp.float32)
        p = jnp.clip((n - warmup_steps) / (num_steps - warmup_steps), 0.0, 1.0)
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
    """Returns a tree of bools: True where weight decay applies, that is for arrays of rank 2 and more."""
    return jax.tree.map(lambda p: len(p.shape) >= 2, params)


def is_hidden_kernel(path, p) -> bool:
    """Whether Muon may step an array: kernels, but those between a network and its input or output."""
    name = "/".join(str(getattr(key, "key", key)) for key in path)
    return len(p.shape) >= 2 and re.search(r"(^|/)(?!conv_in|conv_out)\w+/kernel$", name) is not None


def _matrix_view(p) -> contrib.MuonDimensionNumbers:
    return contrib.MuonDimensionNumbers(tuple(range(len(p.shape) - 1)), len(p.shape) - 1)


def make_optimizer(
    *,
    learning_rate: float,
    num_steps: int,
    warmup_steps: int = 0,
    schedule: str = "constant",
    final_fraction: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_clip: float | None = None,
    muon_learning_rate: float = 0.0,
) -> optax.GradientTransformation:
    """Returns the optax transformation of the module's docstring, with the learning rate of `make_schedule`.

    Args:
      learning_rate: the peak.
      num_steps: length of the run; cosine and linear schedules end there at `final_fraction` of the peak.
      warmup_steps: steps of linear warm-up.
      schedule: 'constant', 'cosine' or 'linear'.
      beta1, beta2, eps: of Adam, each beta in [0, 1).
      weight_decay: decoupled, multiplied by the learning rate; only on arrays of rank 2 and more.
      grad_clip: largest global norm of the gradient; None or 0 for no clipping.
      muon_learning_rate: peak for the arrays of `is_hidden_kernel`, on the same schedule; it multiplies
        sqrt(max(1, out / in)) and an orthogonal matrix, so 0.02 is usual. 0 for AdamW everywhere.

    Raises:
      ValueError: for a value outside its range; the message names the setting.
    """
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"optim.{name}={value} must be in [0, 1)")
    if eps <= 0:
        raise ValueError(f"optim.eps={eps} must be > 0")
    if weight_decay < 0:
        raise ValueError(f"optim.weight_decay={weight_decay} must be >= 0 (0 for none)")
    if grad_clip is not None and grad_clip < 0:
        raise ValueError(f"optim.grad_clip={grad_clip} must be >= 0 (0 or None for none)")
    if muon_learning_rate < 0:
        raise ValueError(f"optim.muon_learning_rate={muon_learning_rate} must be >= 0 (0 for AdamW alone)")

    def scheduled(peak):
        return make_schedule(peak, num_steps, schedule, warmup_steps, final_fraction)

    steps = [optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps, mu_dtype=jnp.float32)]
    if weight_decay:
        steps.append(optax.add_decayed_weights(weight_decay, mask=decay_mask))
    steps.append(optax.scale_by_learning_rate(scheduled(learning_rate)))
    optimizer = optax.chain(*steps)
    if muon_learning_rate:
        muon = contrib.muon(
            scheduled(muon_learning_rate),
            weight_decay=weight_decay,
            mu_dtype=jnp.float32,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(_matrix_view, params),
        )

        def labels(params):
            return jax.tree_util.tree_map_with_path(
                lambda path, p: "muon" if is_hidden_kernel(path, p) else "adam", params
            )

        optimizer = optax.partition({"muon": muon, "adam": optimizer}, labels)
    return optax.chain(optax.clip_by_global_norm(grad_clip), optimizer) if grad_clip else optimizer
