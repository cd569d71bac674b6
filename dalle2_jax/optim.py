"""The optimizer: AdamW with decoupled weight decay, Muon for kernels on request; schedules and clipping.

One step (Loshchilov & Hutter, arXiv:1711.05101), with g the clipped gradient and n = 1, 2, ... its number:

    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    u = (m / (1 - beta1^n)) / (sqrt(v / (1 - beta2^n)) + eps)
    params = params - lr(n - 1) (u + weight_decay params)

With `muon_learning_rate` the kernels of hidden layers take Muon's steps instead (Jordan et al. 2024, as in
optax.contrib): the momentum, made orthogonal by Newton-Schulz iterations. A convolution counts as the matrix
[height x width x in, out]. A small U-Net then needs about half the steps, each a quarter longer.

Weight decay is left off gains, biases and temperatures, that is off every array of rank 0 and 1, as CLIP does
(arXiv:2103.00020, section 2.5). Moments are float32 whatever the gradients are.
"""

import re

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from dalle2_jax import partition

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
    """Returns a tree of bools: True where weight decay applies, to all of rank 2 and more but statistics."""

    def decays(path, p):
        return len(p.shape) >= 2 and getattr(path[0], "key", None) != "stats"

    return jax.tree_util.tree_map_with_path(decays, params)


def is_hidden_kernel(path, p) -> bool:
    """Whether Muon may step an array: kernels, but those between a network and its input or output."""
    name = "/".join(str(getattr(key, "key", key)) for key in path)
    return len(p.shape) >= 2 and re.search(r"(^|/)(?!conv_in|conv_out)\w+/kernel$", name) is not None


def _scale_by_muon() -> optax.GradientTransformation:
    """Muon's direction for a tree of kernels, times sqrt(max(1, out / in)).

    Kernels are looked at as matrices, and those of one shape are handled as one array [k, in, out]: fewer and
    larger products, which are split over the devices where these outnumber one. Preconditioning by AOL saves
    one of the five Newton-Schulz iterations (arXiv:2512.04632).
    """

    def stack(tree):
        groups = {}
        for leaf in jax.tree.leaves(tree):
            matrix = leaf.reshape(-1, leaf.shape[-1])
            groups.setdefault("{}x{}".format(*matrix.shape), []).append(matrix)
        # Zeros, which stay zeros, fill up to a number that a few devices can share evenly.
        return {
            shape: {"kernel": jnp.pad(jnp.stack(group), ((0, len(group) % 2), (0, 0), (0, 0)))}
            for shape, group in groups.items()
        }

    def unstack(groups, like):
        taken = {shape: iter(group["kernel"]) for shape, group in groups.items()}
        leaves, structure = jax.tree.flatten(like)
        matrices = [f"{x.size // x.shape[-1]}x{x.shape[-1]}" for x in leaves]
        matrices = [next(taken[shape]) for shape in matrices]
        return structure.unflatten([m.reshape(x.shape) for m, x in zip(matrices, leaves, strict=True)])

    views = contrib.MuonDimensionNumbers((1,), (2,))
    inner = contrib.scale_by_muon(
        ns_steps=4,
        preconditioning="aol",
        mu_dtype=jnp.float32,
        weight_dimension_numbers=lambda groups: {shape: {"kernel": views} for shape in groups},
    )

    def update(updates, state, params=None):
        groups = jax.tree.map(partition.constrain, stack(updates))
        groups, state = inner.update(groups, state)
        directions = unstack(groups, updates)
        gain = jax.tree.map(lambda x: max(1.0, x.shape[-1] / (x.size / x.shape[-1])) ** 0.5, updates)
        return jax.tree.map(lambda x, c: c * x, directions, gain), state

    return optax.GradientTransformation(lambda params: inner.init(stack(params)), update)


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

    def chain(direction, peak):
        """Direction, weight decay, learning rate."""
        decay = [optax.add_decayed_weights(weight_decay, mask=decay_mask)] if weight_decay else []
        rate = make_schedule(peak, num_steps, schedule, warmup_steps, final_fraction)
        return optax.chain(direction, *decay, optax.scale_by_learning_rate(rate))

    adam = optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps, mu_dtype=jnp.float32)
    optimizer = chain(adam, learning_rate)
    if muon_learning_rate:

        def labels(params):
            return jax.tree_util.tree_map_with_path(
                lambda path, p: "muon" if is_hidden_kernel(path, p) else "adam", params
            )

        muon = chain(_scale_by_muon(), muon_learning_rate)
        optimizer = optax.partition({"muon": muon, "adam": optimizer}, labels)
    return optax.chain(optax.clip_by_global_norm(grad_clip), optimizer) if grad_clip else optimizer
