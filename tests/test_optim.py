"""The optimizer against AdamW worked out by hand, and the schedules against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from optax import contrib

from dalle2_jax.runtime import checkpoint, modeldir, partition
from dalle2_jax.train import optim

SETTINGS = dict(learning_rate=0.1, num_steps=100, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5)


def trees():
    params = {
        "kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]]),
        "bias": jnp.array([0.3, -0.7]),
        "logit_scale": jnp.array(2.0),
    }
    grads = {
        "kernel": jnp.array([[0.1, 0.2], [-0.3, 0.0]]),
        "bias": jnp.array([1.0, -1.0]),
        "logit_scale": jnp.array(0.5),
    }
    return params, grads


def updated(optimizer, params, grads, steps=1):
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def by_hand(p, g, steps, decay, lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3):
    p, g = np.float64(p), np.float64(g)
    m = v = np.zeros_like(p)
    for n in range(1, steps + 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        p = p - lr * (m / (1 - beta1**n) / (np.sqrt(v / (1 - beta2**n)) + eps) + decay * p)
    return p


@pytest.mark.parametrize("steps", [1, 4])
def test_steps_are_those_of_adamw_and_only_matrices_decay(steps):
    params, grads = trees()
    got = updated(optim.make_optimizer(**SETTINGS), params, grads, steps)
    for name, decay in (("kernel", 0.5), ("bias", 0.0), ("logit_scale", 0.0)):
        np.testing.assert_allclose(got[name], by_hand(params[name], grads[name], steps, decay), rtol=2e-6)


def test_first_step_in_plain_numbers():
    """Bias correction makes the first step g / (|g| + eps): for g = 1, lr / 1.001."""
    params, grads = trees()
    got = updated(optim.make_optimizer(**SETTINGS), params, grads)
    np.testing.assert_allclose(got["bias"], [0.3 - 0.1 / 1.001, -0.7 + 0.1 / 1.001], rtol=1e-6)
    np.testing.assert_allclose(
        got["kernel"][1, 1], 0.5 * (1 - 0.1 * 0.5), rtol=1e-6
    )  # no gradient: decay alone


def test_muon_steps_hidden_kernels_orthogonally_and_adam_the_rest():
    shapes = {
        "net": {
            "conv_in": {"kernel": (3, 3, 3, 8), "bias": (8,)},
            "patches_out": {"kernel": (8, 12)},
            "conv1": {"kernel": (3, 3, 4, 8)},
            "fc1": {"kernel": (6, 24)},
            "embedding": (10, 6),
        }
    }
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = [jax.random.normal(key, shape) for key, shape in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(structure, draw)
    grads = jax.tree.map(lambda p: p + 0.5, params)
    settings = dict(learning_rate=0.1, num_steps=10, eps=1e-8)
    adam = updated(optim.make_optimizer(**settings), params, grads)["net"]
    muon = updated(optim.make_optimizer(**settings, muon_learning_rate=0.01), params, grads)["net"]
    for got, kept, scale in (
        (muon["conv1"]["kernel"], params["net"]["conv1"]["kernel"], 1.0),
        (muon["fc1"]["kernel"], params["net"]["fc1"]["kernel"], 2.0),  # sqrt(24 / 6)
    ):
        step = np.asarray(got - kept).reshape(-1, got.shape[-1])
        values = np.linalg.svd(step, compute_uv=False) / (0.01 * scale)
        assert values.min() > 0.5 and values.max() < 1.3  # what five Newton-Schulz iterations promise
    for name in ("conv_in", "patches_out", "embedding"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), muon[name], adam[name])


def test_muon_steps_queries_keys_and_values_as_matrices_of_their_own():
    """Values have the larger gradients, which in one matrix would leave little to queries and keys."""
    parts = {name: jax.random.normal(jax.random.key(i), (6, 6)) for i, name in enumerate("qkv")}
    parts["v"] *= 100
    optimizer = optim.make_optimizer(learning_rate=0.1, num_steps=10, muon_learning_rate=0.01)

    def step(params):
        return jax.tree.map(lambda after, before: after - before, updated(optimizer, params, params), params)

    apart = step({name: {"kernel": part} for name, part in parts.items()})
    for names, layer in (("qkv", "qkv"), ("kv", "kv"), ("kv", "text_kv")):
        fused = step({layer: {"kernel": jnp.concatenate([parts[name] for name in names], axis=1)}})
        for got, name in zip(jnp.split(fused[layer]["kernel"], len(names), axis=1), names, strict=True):
            np.testing.assert_allclose(got, apart[name]["kernel"], atol=1e-6)


@pytest.mark.parametrize("shape", [(27, 8), (8, 27), (8, 8)])
def test_orthogonal_is_optaxs_newton_schulz(shape):
    """Through the Gram matrix, as optax goes step by step; zeros stay zeros, and a kernel of low rank is no
    trouble."""
    keys = jax.random.split(jax.random.key(2), 3)
    low_rank = jax.random.normal(keys[0], (shape[0], 1)) @ jax.random.normal(keys[1], (1, shape[1]))
    matrices = [jax.random.normal(keys[2], shape), 1e-3 * low_rank, jnp.zeros(shape)]
    theirs = contrib.scale_by_muon(
        ns_coeffs=optim.NEWTON_SCHULZ, ns_steps=optim.NEWTON_SCHULZ_STEPS, beta=0.0, preconditioning="aol"
    )
    for got, x in zip(optim.orthogonal(matrices), matrices, strict=True):
        want, _ = theirs.update(x, theirs.init(x))
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_muon_is_the_same_with_kernels_shared_over_devices():
    key = jax.random.key(1)
    params = {f"block_{i}": {"kernel": jax.random.normal(key, (2, 3, 8)) * (i + 1)} for i in range(3)}
    optimizer = optim.make_optimizer(**SETTINGS | dict(weight_decay=0.0), muon_learning_rate=0.01)
    alone = updated(optimizer, params, params, steps=2)
    with partition.use_mesh(partition.make_mesh(2, devices=jax.devices()[:2])):
        shared = jax.jit(lambda params: updated(optimizer, params, params, steps=2))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone, shared)
    state = jax.eval_shape(optimizer.init, params)
    assert partition.shardings(state, partition.make_mesh(1, fsdp=8))  # every array has a rule
    state = jax.eval_shape(optimizer.init, params)
    assert partition.shardings(state, partition.make_mesh(fsdp=8, data=1))  # every array has a rule


def large_trees():
    """Arrays that Adafactor factors (two axes of 128 or more), and others; gradients of each step."""
    shapes = dict(fc1=(128, 136), conv1=(3, 3, 128, 128), conv_out=(3, 3, 128, 4), q=(2, 2))
    shapes = {f"{name}/kernel": shape for name, shape in shapes.items()} | {"norm/scale": (7,), "rate": ()}
    draw = np.random.default_rng(0)
    params, *grads = (
        modeldir.unflatten({name: draw.normal(size=s).astype(np.float32) for name, s in shapes.items()})
        for _ in range(4)
    )
    return params, grads


def test_adafactor_is_optaxs():
    """Three steps with a schedule and no weight decay; of a kernel that is factored, rows and columns."""
    params, grads = large_trees()
    ours = optim.make_optimizer(learning_rate=0.1, num_steps=9, schedule="cosine", optimizer="adafactor")
    theirs = optax.adafactor(optim.make_schedule(0.1, 9, "cosine"))
    found, expected = params, params
    state, other = ours.init(params), theirs.init(params)
    for g in grads:
        updates, state = ours.update(g, state, found)
        found = optax.apply_updates(found, updates)
        updates, other = theirs.update(g, other, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
    kept = modeldir.flatten({"v_row": optax.tree_utils.tree_get(state, "v_row")})
    assert kept["v_row/fc1/kernel"].shape == (128,) and kept["v_row/conv1/kernel"].shape == (3, 3, 128)
    assert kept["v_row/conv_out/kernel"].shape == (1,)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state) if x.ndim)


def test_adafactor_is_the_same_on_a_mesh_and_after_a_restart(tmp_path):
    """The state has a sharding on 2 x 2 x 2 devices; saved, restored and stepped there: the same bits."""
    params, grads = large_trees()
    settings = dict(learning_rate=0.1, num_steps=9, weight_decay=0.1, grad_clip=1.0, warmup_steps=2)
    optimizer = optim.make_optimizer(**settings, optimizer="adafactor")
    mesh = partition.make_mesh(2, 2, 2)

    def step(state, g):
        updates, opt_state = optimizer.update(g, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    begun = {"params": params, "opt_state": optimizer.init(params)}
    where = partition.shardings(begun, mesh)
    factored = optax.tree_utils.tree_get(where["opt_state"], "v_row")
    assert factored["conv1"]["kernel"].spec == P()
    assert optax.tree_utils.tree_get(where["opt_state"], "v")["conv_out"]["kernel"].spec != P()
    alone, spread = jax.jit(step), jax.jit(step, out_shardings=where)
    one, here = begun, jax.device_put(begun, where)
    for number, g in enumerate(grads):
        one, here = alone(one, g), spread(here, jax.device_put(g, where["params"]))
        if number == 1:
            with checkpoint.Checkpointer(tmp_path) as saver:
                saver.save(2, here, {})
                saver.wait()
                shapes = jax.tree.map(
                    lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), begun, where
                )
                restored, _ = saver.restore(shapes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), here, one)
    again = spread(restored, jax.device_put(grads[2], where["params"]))
    jax.tree.map(np.testing.assert_array_equal, again, here)


def test_clipping_scales_the_gradient_to_the_limit():
    """Seen through a large eps, where the update is nearly g / eps: norm 5 clipped to 1 is a fifth of it."""
    params = {"kernel": jnp.zeros((1, 2))}
    grads = {"kernel": jnp.array([[3.0, 4.0]])}
    settings = dict(learning_rate=1.0, num_steps=10, eps=1e6)
    whole = updated(optim.make_optimizer(**settings), params, grads)["kernel"]
    clipped = updated(optim.make_optimizer(**settings, grad_clip=1.0), params, grads)["kernel"]
    np.testing.assert_allclose(whole / clipped, [[5, 5]], rtol=1e-4)
    untouched = updated(optim.make_optimizer(**settings, grad_clip=6.0), params, grads)["kernel"]
    np.testing.assert_array_equal(untouched, whole)


def test_decay_mask_follows_the_rank():
    params, _ = trees()
    assert optim.decay_mask(params) == {"kernel": True, "bias": False, "logit_scale": False}
    assert optim.decay_mask({"stats": params})["stats"] == dict.fromkeys(params, False)  # as a code book
    assert optim.decay_mask(jax.eval_shape(lambda: params)) == {
        "kernel": True,
        "bias": False,
        "logit_scale": False,
    }


def test_all_of_the_state_is_float32():
    params, _ = trees()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    state = optim.make_optimizer(**SETTINGS).init(params)
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert moments and all(x.dtype == jnp.float32 for x in moments)
    updates, state = optim.make_optimizer(**SETTINGS).update(half, state, params)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state) if x.ndim)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(updates))


def test_the_schedule_reaches_the_optimizer():
    """With a constant gradient of 1 a step moves by lr(n), up to the rounding of 1 - beta2^n."""
    settings = dict(learning_rate=0.1, num_steps=10, warmup_steps=2, schedule="linear", eps=1e-12)
    optimizer, lr = optim.make_optimizer(**settings), optim.make_schedule(0.1, 10, "linear", 2)
    params = {"kernel": jnp.zeros((2, 2))}
    state = optimizer.init(params)
    for n in range(10):
        updates, state = optimizer.update({"kernel": jnp.ones((2, 2))}, state, params)
        np.testing.assert_allclose(updates["kernel"], -float(lr(n)), rtol=1e-4)


class TestSchedule:
    def test_warmup_is_linear_and_moves_at_once(self):
        lr = optim.make_schedule(0.4, 100, "constant", warmup_steps=4)
        np.testing.assert_allclose([lr(n) for n in range(7)], [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4], rtol=1e-6)

    def test_cosine(self):
        """Ten steps of warm-up, then 90: full, half and nothing at their start, middle and end."""
        lr = optim.make_schedule(2.0, 100, "cosine", warmup_steps=10)
        np.testing.assert_allclose([lr(9), lr(10), lr(55), lr(100), lr(1000)], [2, 2, 1, 0, 0], atol=1e-6)
        np.testing.assert_allclose(lr(40), 1 + np.cos(np.pi / 3), rtol=1e-6)

    def test_linear_and_the_floor(self):
        lr = optim.make_schedule(1.0, 11, "linear", warmup_steps=1, final_fraction=0.2)
        np.testing.assert_allclose([lr(1), lr(6), lr(11)], [1, 0.6, 0.2], rtol=1e-6)
        lr = optim.make_schedule(1.0, 10, "cosine", final_fraction=0.2)
        np.testing.assert_allclose([lr(0), lr(5), lr(10)], [1, 0.6, 0.2], rtol=1e-6)

    def test_the_rate_falls_over_the_last_steps_alone(self):
        """Ten steps of warm-up, and the last fifth of the 50 after it: from step 50 to 60."""
        for name in ("linear", "cosine"):
            lr = optim.make_schedule(1.0, 60, name, 10, final_fraction=0.2, decay_fraction=0.2)
            np.testing.assert_allclose([lr(9), lr(50), lr(55), lr(60)], [1, 1, 0.6, 0.2], rtol=1e-6)
        longer = optim.make_schedule(1.0, 110, "linear", 10, final_fraction=0.2, decay_fraction=0.2)
        assert all(longer(n) == lr(n) for n in range(51))  # what was trained before the fall goes on
        early = optim.make_schedule(1.0, 110, "cosine", 10, 0.2, decay_steps=60, decay_fraction=0.2)
        assert [early(n) for n in range(60)] == [lr(n) for n in range(60)]

    def test_warmup_joins_without_a_jump(self):
        for name in optim.SCHEDULES:
            lr = optim.make_schedule(1.0, 1000, name, warmup_steps=100)
            values = np.array([float(lr(n)) for n in range(1000)])
            assert np.abs(np.diff(values)).max() <= 0.0101
            assert values.min() >= 0 and values.max() == 1

    def test_it_can_be_traced(self):
        lr = optim.make_schedule(1.0, 10, "cosine", warmup_steps=2)
        np.testing.assert_allclose(jax.jit(lr)(jnp.int32(6)), lr(6), rtol=1e-6)
        assert lr(3).dtype == jnp.float32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(schedule="cosin"), "did you mean 'cosine'"),
        (dict(schedule="zzz"), "use one of constant, cosine, linear"),
        (dict(learning_rate=-1.0), "optim.learning_rate"),
        (dict(warmup_steps=100), "optim.warmup_steps"),
        (dict(warmup_steps=-1), "optim.warmup_steps"),
        (dict(final_fraction=2.0), "optim.final_fraction"),
        (dict(decay_fraction=0.0), "optim.decay_fraction"),
        (dict(decay_fraction=1.5), "optim.decay_fraction"),
        (dict(beta2=1.0), "optim.beta2"),
        (dict(eps=0.0), "optim.eps"),
        (dict(weight_decay=-0.1), "optim.weight_decay"),
        (dict(grad_clip=-1.0), "optim.grad_clip"),
        (dict(muon_learning_rate=-1.0), "optim.muon_learning_rate"),
        (dict(optimizer="adafacto"), "optim.optimizer='adafacto' is unknown .did you mean 'adafactor'"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        optim.make_optimizer(**(SETTINGS | wrong))


def test_a_rate_of_0_changes_no_parameter():
    """With which a trained stage measures itself again, as docs/training.md says."""
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    optimizer = optim.make_optimizer(learning_rate=0.0, num_steps=1, weight_decay=0.1, grad_clip=1.0)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), updates)
