"""Short trainings, and bounds on what they reach.

Sums round differently on another CPU and in another release of jax. A network of a hundred steps then learns
something else, as it does with another seed. So a test that trains asserts bounds that every seed keeps.

    python -m tests.learned [NAME ...]    NAME: classifier, prior, ... (default: all); ten seeds each, minutes

prints each quantity's mean and standard deviation over ten seeds, and the distance of its bound from the mean
in standard deviations. The status is 1 where a distance is less than 3. Run it after a change to such a test,
on the oldest and the newest jax.
"""

import importlib
import sys
import tempfile
from collections.abc import Callable

import jax
import numpy as np
import optax

# name: (module with `reached(seed, ...) -> {quantity: number}` and `BOUNDS`, what is handed to `reached`)
TRAININGS = {
    "classifier": ("tests.models.stages.test_classifier", {}),
    "prior": ("tests.models.stages.test_prior", {}),
    "ar_prior": ("tests.models.stages.test_ar_prior", {}),
    "decoder": ("tests.models.stages.test_decoder", {}),
    "upsampler": ("tests.models.stages.test_upsampler", {}),
    "clip_vit": ("tests.models.stages.test_clip", {"vision": "vit"}),
    "clip_resnet": ("tests.models.stages.test_clip", {"vision": "resnet"}),
}
NUM_SEEDS, DEVIATIONS = 10, 3


def key_of(seed: int) -> jax.Array:
    """A key whose draws compile fast: a program full of the default's takes half a minute."""
    return jax.random.key(seed, impl="rbg")


def descend(stage, params, key, batch, *, steps: int, learning_rate: float, draw: Callable | None = None):
    """Train a stage by Adam; its statistics stay as they are.

    Args:
        params: of the stage, to begin with. key: for all steps. batch: arrays of every step, or what
        draw(key, batch) makes the batch of a step from.

    Returns:
        (parameters, {metric: [steps]}), `loss` among the metrics.
    """
    draw = draw or (lambda key, batch: batch)
    fixed = {name: tree for name, tree in params.items() if name == "stats"}
    optimizer = optax.adam(learning_rate)
    update = getattr(stage, "update", lambda params, statistics, key: (params, {}))

    # The batch is an argument and no constant, so that one compiled program serves every seed.
    @jax.jit
    def run(trained, fixed, keys, batch):
        def step(carry, key):
            trained, state = carry

            def loss(trained):
                loss = stage.loss(trained | fixed, key, draw(key, batch))
                return loss.value, loss.scalars

            (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trained)
            updates, state = optimizer.update(grads, state)
            trained, _ = update(optax.apply_updates(trained, updates), {}, key)
            return (trained, state), metrics | {"loss": value}

        (trained, _), history = jax.lax.scan(step, (trained, optimizer.init(trained)), keys)
        return trained, history

    trained = {name: tree for name, tree in params.items() if name not in fixed}
    trained, history = run(trained, fixed, jax.random.split(key, steps), batch)
    return trained | fixed, history


def assert_within(reached: dict[str, float], bounds: dict[str, tuple[str, float]]) -> None:
    """Every quantity keeps its bound, ('<', limit) or ('>', limit)."""
    assert reached.keys() == bounds.keys()
    for name, (side, limit) in bounds.items():
        value = float(reached[name])
        assert value < limit if side == "<" else value > limit, f"{name} {value:.4g} is not {side} {limit}"


def share_nearest(similarity: np.ndarray) -> float:
    """Of [n, n]: the share of rows that are most like their own column; 1 / n by chance."""
    return float((np.asarray(similarity).argmax(axis=1) == np.arange(len(similarity))).mean())


def main(names: list[str]) -> int:
    """Print the table; return the exit status."""
    too_near = 0
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    print(f"jax {jax.__version__}, {NUM_SEEDS} seeds")
    for name in names or TRAININGS:
        module, arguments = TRAININGS[name]
        module = importlib.import_module(module)
        found = [module.reached(seed, **arguments) for seed in range(NUM_SEEDS)]
        for quantity, (side, limit) in module.BOUNDS.items():
            values = np.array([float(each[quantity]) for each in found])
            mean, deviation = values.mean(), values.std(ddof=1)
            room = (limit - mean) * (1 if side == "<" else -1)
            off = room / deviation if deviation else np.sign(room) * np.inf
            too_near += off < DEVIATIONS
            print(
                f"{name:12} {quantity:28} {mean:9.4g} +- {deviation:8.3g}   worst "
                f"{values.max() if side == '<' else values.min():9.4g}   wanted {side} {limit:<6g} "
                f"{off:6.1f} deviations off{'' if off >= DEVIATIONS else '   TOO NEAR'}",
                flush=True,
            )
    return 1 if too_near else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
