"""The noise process, the meaning of outputs, and the losses, against float64 numpy and against what must
hold."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.diffusion import process, schedules, weights

COSINE = schedules.make_schedule("cosine")
TIMES = np.array([0, 1, 37, 500, 900, 999])
SHAPE = (len(TIMES), 4, 4, 3)


def pixels(draw, shape=SHAPE):
    """8-bit values in [-1, 1], both ends among them."""
    levels = draw.integers(0, 256, shape)
    levels[:, 0, 0, :2] = 0, 255
    return (levels / 127.5 - 1.0).astype(np.float32)


q_sample = jax.jit(functools.partial(process.q_sample, COSINE))
to_prediction = jax.jit(functools.partial(process.to_prediction, COSINE), static_argnums=(3, 4))


@pytest.fixture
def example():
    draw = np.random.default_rng(0)
    x0, noise, output = pixels(draw), draw.standard_normal(SHAPE), draw.standard_normal((*SHAPE[:-1], 6))
    noise, output = noise.astype(np.float32), output.astype(np.float32)
    return dict(x0=x0, noise=noise, x_t=np.asarray(q_sample(x0, TIMES, noise)), output=output)


@functools.partial(jax.jit, static_argnames=("objective", "learned_variance", "weighting", "vlb_weight"))
def loss_of(example, output, objective="eps", learned_variance=True, **options):
    return process.training_loss(
        COSINE,
        output,
        process.Noised(example["x0"], example["x_t"], TIMES, example["noise"]),
        objective=objective,
        learned_variance=learned_variance,
        **options,
    )


def test_times_cover_the_schedule_at_random_in_training_and_evenly_otherwise():
    key = jax.random.key(0)
    drawn = process.draw_timesteps(key, 20_000, 1000, train=True)
    assert (int(drawn.min()), int(drawn.max())) == (0, 999)
    assert float(drawn.mean()) == pytest.approx(499.5, abs=5 * 1000 / math.sqrt(12 * 20_000))
    fixed = process.draw_timesteps(key, 4, 1000, train=False)
    assert fixed.tolist() == [125, 375, 625, 875]  # the middles of four quarters, whatever the key
    assert process.draw_timesteps(jax.random.key(1), 4, 1000, train=False).tolist() == fixed.tolist()
    assert drawn.dtype == fixed.dtype == jnp.int32


@pytest.mark.parametrize("t", [0, 300, 999])
def test_q_sample_has_the_moments_of_its_definition(t):
    n = 200_000
    noise = np.random.default_rng(t).standard_normal((1, n)).astype(np.float32)
    x_t = np.asarray(q_sample(np.full((1, n), 0.7, np.float32), np.array([t]), noise))
    alpha_bar = COSINE.alpha_bar[t]
    std = math.sqrt(1 - alpha_bar)
    assert x_t.mean() == pytest.approx(0.7 * math.sqrt(alpha_bar), abs=5 * std / math.sqrt(n))
    assert x_t.std() == pytest.approx(std, rel=5 / math.sqrt(2 * n))


def test_times_are_per_sample(example):
    """Each row of a batch of mixed times is what it is alone."""
    for i in range(len(TIMES)):
        row = slice(i, i + 1)
        alone = q_sample(example["x0"][row], TIMES[row], example["noise"][row])
        np.testing.assert_array_equal(alone, example["x_t"][row])


@pytest.mark.parametrize("objective", weights.OBJECTIVES)
def test_the_target_of_every_objective_gives_back_x0_and_eps(example, objective):
    """To float32's rounding, which 1 / sqrt(alpha_bar) = 2e4 at t = 999 and 1 / sigma = 156 at t = 0
    amplify."""
    signal, sigma = (np.asarray(y, np.float64) for y in process.signal_and_sigma(COSINE, TIMES, 4))
    x0, noise = np.asarray(example["x0"], np.float64), np.asarray(example["noise"], np.float64)
    target = {"eps": noise, "x0": x0, "v": signal * noise - sigma * x0, "flow": noise - x0}[objective]
    output = target.astype(np.float32)
    prediction = to_prediction(output, example["x_t"], TIMES, objective, False)
    assert prediction.var_frac is None
    rounding = 8e-7
    x0_gain = {"eps": 1 / signal, "x0": 1.0, "v": 1.0, "flow": 1.0}[objective]
    eps_gain = {"eps": 1.0, "x0": 1 / sigma, "v": 1.0, "flow": 1.0}[objective]
    assert np.all(np.abs(prediction.x0 - x0) <= rounding * 4 * x0_gain)
    assert np.all(np.abs(prediction.eps - noise) <= rounding * 4 * eps_gain)


@pytest.mark.parametrize("objective", weights.OBJECTIVES)
def test_x0_and_eps_of_any_output_are_consistent_with_x_t(example, objective):
    prediction = to_prediction(example["output"], example["x_t"], TIMES, objective, True)
    x_t = q_sample(prediction.x0, TIMES, prediction.eps)
    np.testing.assert_allclose(x_t, example["x_t"], atol=1e-5)


def test_the_second_half_of_the_channels_is_the_variance_fraction(example):
    prediction = to_prediction(example["output"], example["x_t"], TIMES, "eps", True)
    np.testing.assert_array_equal(prediction.eps, example["output"][..., :3])
    np.testing.assert_allclose(prediction.var_frac, (example["output"][..., 3:] + 1) / 2)


@pytest.mark.parametrize("weighting", weights.WEIGHTINGS)
@pytest.mark.parametrize("objective", weights.OBJECTIVES)
def test_a_perfect_output_has_no_loss(example, objective, weighting):
    signal, sigma = map(np.asarray, process.signal_and_sigma(COSINE, TIMES, 4))
    x0, noise = example["x0"], example["noise"]
    output = {"eps": noise, "x0": x0, "v": signal * noise - sigma * x0, "flow": noise - x0}[objective]
    loss, metrics = loss_of(example, output, objective, False, weighting=weighting)
    assert loss.shape == metrics["mse"].shape == (len(TIMES),) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 0.0, atol=1e-9)


@pytest.mark.parametrize("weighting", ["min_snr", "p2", "v", "flow"])
def test_weightings_do_not_depend_on_the_objective(example, weighting):
    """One guess of x0, expressed as each objective's output, must cost the same at every time."""
    guess = 0.5 * example["x0"] + 0.1
    signal, sigma = map(np.asarray, process.signal_and_sigma(COSINE, TIMES, 4))
    eps = (example["x_t"] - signal * guess) / sigma
    outputs = {"eps": eps, "x0": guess, "v": signal * eps - sigma * guess, "flow": eps - guess}
    losses = [loss_of(example, y, name, False, weighting=weighting)[0] for name, y in outputs.items()]
    # The last time is left out: its error in eps is 5e-5 of eps, which float32 does not resolve.
    np.testing.assert_allclose(losses[0][:-1], losses[1][:-1], rtol=2e-3)
    for other in losses[2:]:
        np.testing.assert_allclose(other, losses[1], rtol=2e-3)


@pytest.mark.parametrize(
    "objective, weighting, expected",
    [
        ("eps", "uniform", lambda snr: 1.0),
        ("eps", "p2", lambda snr: 1 / (1 + snr)),
        ("eps", "p2:0.5", lambda snr: (1 + snr) ** -0.5),
        ("eps", "min_snr", lambda snr: min(snr, 5) / snr),
        ("eps", "min_snr:50", lambda snr: min(snr, 50) / snr),
        ("x0", "min_snr", lambda snr: min(snr, 5)),
        ("v", "min_snr", lambda snr: min(snr, 5) / (snr + 1)),
        ("x0", "v", lambda snr: min(snr + 1, 400)),  # JiT: sigma is at least .05
        ("x0", "snr:1,0.1,5", lambda snr: min(max(snr, 0.1), 5)),
        ("v", "snr:0.65,0.04,10", lambda snr: min(max(snr**0.65, 0.04), 10) / (snr + 1)),
    ],
)
def test_weights_are_those_of_their_papers(objective, weighting, expected):
    by_time = weights.loss_weights(COSINE, objective, weighting)
    for t in (0, 250, 999):
        alpha_bar = COSINE.alpha_bar[t]
        assert by_time[t] == pytest.approx(expected(alpha_bar / (1 - alpha_bar)))


def test_loss_is_the_weighted_error_plus_a_thousandth_of_the_bound(example):
    """With T terms in the bound, one of them at lambda T = T / 1000: 1 for T = 1000."""
    loss, metrics = jax.device_get(loss_of(example, example["output"], weighting="p2"))
    by_time = weights.loss_weights(COSINE, "eps", "p2")[TIMES]
    np.testing.assert_allclose(loss, by_time * metrics["mse"] + metrics["vb"], rtol=1e-6)
    half, _ = loss_of(example, example["output"], weighting="p2", vlb_weight=5e-4)
    np.testing.assert_allclose(loss - half, 0.5 * metrics["vb"], rtol=1e-4)
    short = schedules.make_schedule("cosine", 100)
    t = np.array([7] * len(TIMES))

    @jax.jit
    def of_short(output, x0, noise):
        x_t = process.q_sample(short, x0, t, noise)
        options = dict(objective="eps", learned_variance=True)
        return process.training_loss(short, output, process.Noised(x0, x_t, t, noise), **options)

    loss, metrics = jax.device_get(of_short(*(example[name] for name in ("output", "x0", "noise"))))
    np.testing.assert_allclose(loss, metrics["mse"] + 0.1 * metrics["vb"], rtol=1e-6)


@pytest.mark.parametrize("objective", weights.OBJECTIVES)
def test_the_bound_is_the_kl_between_textbook_gaussians(example, objective):
    """KL(N(m1, v1) || N(m2, v2)) in float64, the means from x0, x_t and betas (Ho et al. 2020, equation
    7)."""
    _, metrics = loss_of(example, example["output"], objective)
    prediction = to_prediction(example["output"], example["x_t"], TIMES, objective, True)
    predicted_x0, var_frac, x0, x_t = (
        np.asarray(y, np.float64) for y in (prediction.x0, prediction.var_frac, example["x0"], example["x_t"])
    )
    for i, t in enumerate(np.asarray(TIMES)):
        if t == 0:
            continue
        now, before = COSINE.alpha_bar[t], COSINE.alpha_bar[t - 1]
        beta = 1 - now / before
        beta_tilde = beta * (1 - before) / (1 - now)

        def mean(x0, x_t, now=now, before=before, beta=beta):
            return (math.sqrt(before) * beta * x0 + math.sqrt(1 - beta) * (1 - before) * x_t) / (1 - now)

        v2 = beta ** var_frac[i] * beta_tilde ** (1 - var_frac[i])
        gap = mean(x0[i], x_t[i]) - mean(predicted_x0[i], x_t[i])
        kl = 0.5 * (np.log(v2 / beta_tilde) + (beta_tilde + gap**2) / v2 - 1)
        assert metrics["vb"][i] == pytest.approx(kl.mean() / math.log(2), rel=2e-4, abs=1e-6)


def test_the_bound_at_the_first_time_is_the_likelihood_of_8_bit_pixels():
    """Against bin masses by the exact normal distribution, for predictions within a few bins of the truth."""
    draw, shape = np.random.default_rng(3), (2, 8, 8, 3)
    x0 = pixels(draw, shape)
    predicted = (x0 + 0.006 * draw.standard_normal(shape)).astype(np.float32)
    raw = draw.uniform(-1, 1, shape).astype(np.float32)
    t = np.zeros(2, np.int32)
    # x_t is of no consequence: the mean of the last step is the predicted x0.
    loss = functools.partial(process.training_loss, COSINE, objective="x0", learned_variance=True)
    _, metrics = jax.jit(loss)(np.concatenate([predicted, raw], -1), process.Noised(x0, x0, t, x0))
    beta = 1 - COSINE.alpha_bar[:2] / np.array([1.0, COSINE.alpha_bar[0]])
    beta_tilde_1 = beta[1] * (1 - COSINE.alpha_bar[0]) / (1 - COSINE.alpha_bar[1])
    frac = (np.asarray(raw, np.float64) + 1) / 2
    std = np.sqrt(beta[0] ** frac * beta_tilde_1 ** (1 - frac))
    z = np.asarray(x0, np.float64) - np.asarray(predicted, np.float64)
    cdf = np.vectorize(lambda a: 0.5 * math.erfc(-a / math.sqrt(2)))
    upper, lower = cdf((z + 1 / 255) / std), cdf((z - 1 / 255) / std)
    levels = np.rint((np.asarray(x0) + 1) * 127.5)
    mass = np.where(levels == 0, upper, np.where(levels == 255, 1 - lower, upper - lower))
    assert (levels == 0).any() and (levels == 255).any()
    expected = -np.log2(mass).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(metrics["vb"], expected, rtol=5e-3)  # the tanh form is good to about 1e-3


def test_the_whole_bound_in_float64_is_that_of_independent_recurrences():
    """L_vlb at every time of a short schedule and what it is made of, to 1e-10: betas by recurrence, KL from
    means and variances in full, the first time by the tanh form (Ho et al. 2020, equations 5, 7, 13)."""
    draw, T = np.random.default_rng(0), 60
    schedule = schedules.make_schedule("cosine", T)
    x0 = draw.integers(0, 256, (T, 3, 3, 2)) / 127.5 - 1
    x0[:, 0, 0] = [-1.0, 1.0]
    noise, output = draw.standard_normal(x0.shape), draw.standard_normal((T, 3, 3, 4))
    output[..., 2:] = np.tanh(output[..., 2:])
    with jax.enable_x64(True):

        @jax.jit
        def bound(x0, noise, output):
            t = jnp.arange(T)
            x_t = process.q_sample(schedule, x0, t, noise)
            made = process.to_prediction(schedule, output, x_t, t, "eps", True)
            return x_t, made, process.vb_bits_per_dim(schedule, made, x0, x_t, t)

        x_t, made, found = bound(x0, noise, output)
        assert x_t.dtype == found.dtype == jnp.float64
        x_t, predicted, found = (np.asarray(y) for y in (x_t, made.x0, found))

    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - f((i + 1) / T) / f(i / T), 0.999) for i in range(T)]
    before, tilde_1 = 1.0, betas[1] * betas[0] / (1 - (1 - betas[0]) * (1 - betas[1]))
    for i, beta in enumerate(betas):
        now = before * (1 - beta)
        np.testing.assert_allclose(
            x_t[i], math.sqrt(now) * x0[i] + math.sqrt(1 - now) * noise[i], rtol=1e-10, atol=1e-12
        )
        eps, frac = output[i, ..., :2], (output[i, ..., 2:] + 1) / 2
        guess = (x_t[i] - math.sqrt(1 - now) * eps) / math.sqrt(now)
        np.testing.assert_allclose(predicted[i], guess, rtol=1e-10, atol=1e-10)
        tilde = beta * (1 - before) / (1 - now) if i else tilde_1
        log_var = frac * math.log(beta) + (1 - frac) * math.log(tilde)
        if i == 0:
            std = np.exp(0.5 * log_var)

            def cdf(z):
                return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

            upper, lower = cdf((x0[0] - guess + 1 / 255) / std), cdf((x0[0] - guess - 1 / 255) / std)
            mass = np.where(x0[0] < -0.999, upper, np.where(x0[0] > 0.999, 1 - lower, upper - lower))
            expected = -np.log(np.maximum(mass, 1e-12))
        else:

            def mean(x, at=x_t[i], now=now, before=before, beta=beta):
                to_x0 = math.sqrt(before) * beta / (1 - now)
                return to_x0 * x + math.sqrt(1 - beta) * (1 - before) / (1 - now) * at

            gap = mean(x0[i]) - mean(guess)
            expected = 0.5 * (log_var - math.log(tilde) + (tilde + gap**2) / np.exp(log_var) - 1)
        assert found[i] == pytest.approx(expected.mean() / math.log(2), rel=1e-10), i
        before = now


log_likelihood = jax.jit(process.discretized_log_likelihood)


@pytest.mark.parametrize("mean, std", [(0.0, 0.005), (-0.99, 0.02), (0.4, 0.5), (2.0, 1.0)])
def test_the_256_bins_share_out_the_whole_mass(mean, std):
    levels = (np.arange(256) / 127.5 - 1.0).astype(np.float32)
    log_mass = log_likelihood(levels, np.float32(mean), np.float32(math.log(std)))
    assert float(np.exp(log_mass).sum()) == pytest.approx(1.0, abs=1e-4)


def test_the_normal_distribution_is_close_to_the_exact_one():
    z = np.linspace(-4, 4, 99)
    exact = np.vectorize(lambda a: 0.5 * math.erfc(-a / math.sqrt(2)))(z)
    np.testing.assert_allclose(jax.jit(process._normal_cdf)(z.astype(np.float32)), exact, rtol=0, atol=1e-3)


def test_the_mean_half_learns_from_the_error_alone(example):
    """The bound sees the mean through a stop-gradient; the variance half learns from the bound alone."""

    @functools.partial(jax.jit, static_argnums=1, static_argnames="vlb_weight")
    @jax.grad
    def gradient(output, learned_variance, **options):
        return loss_of(example, output, learned_variance=learned_variance, **options)[0].mean()

    hybrid = gradient(example["output"], True)
    simple = gradient(example["output"][..., :3], False)
    np.testing.assert_array_equal(hybrid[..., :3], simple)
    assert np.all(np.abs(hybrid[..., 3:]).sum(axis=(1, 2, 3)) > 0)
    without = gradient(example["output"], True, vlb_weight=0.0)
    np.testing.assert_array_equal(without[..., 3:], 0.0)


def test_the_bound_trains_the_variance_to_the_error():
    """Where the mean is off by the posterior's own deviation and more, the bound asks for more variance,
    and for none where the mean is right: the gradient by the raw variance changes sign."""
    x0, t = np.zeros((1, 2, 2, 1), np.float32), np.array([100])
    noise = np.ones_like(x0)
    x_t = q_sample(x0, t, noise)

    @jax.jit
    @jax.grad
    def slope(raw, eps):
        output = jnp.concatenate([jnp.full(x0.shape, eps), jnp.full(x0.shape, raw)], -1)
        arguments = (COSINE, output, process.Noised(x0, x_t, t, noise))
        return process.training_loss(*arguments, objective="eps", learned_variance=True)[1]["vb"].sum()

    assert slope(0.0, 1.0) > 0
    assert slope(0.0, 30.0) < 0


def test_bf16_outputs_are_read_in_float32_and_stay_finite(example):
    output = (10 * example["output"]).astype(jnp.bfloat16)
    value = jax.jit(jax.value_and_grad(lambda y: loss_of(example, y)[0].sum()))
    loss, gradient = value(output)
    assert loss.dtype == jnp.float32 and bool(jnp.isfinite(loss)) and bool(jnp.isfinite(gradient).all())
    np.testing.assert_array_equal(loss, value(output.astype(np.float32))[0])


def test_loss_is_jittable_over_times(example):
    jitted = jax.jit(
        lambda output, x_t, t: process.training_loss(
            COSINE,
            output,
            process.Noised(example["x0"], x_t, t, example["noise"]),
            objective="v",
            learned_variance=True,
        )
    )
    loss, metrics = jitted(example["output"], example["x_t"], TIMES)
    expected, _ = loss_of(example, example["output"], "v")
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert set(metrics) == {"mse", "vb"}


def test_embeddings_have_no_learned_variance():
    x = jnp.zeros((2, 8))
    noised = process.Noised(x, x, jnp.array([1, 2]), x)
    with pytest.raises(ValueError, match="learned_variance=False"):
        process.training_loss(COSINE, jnp.zeros((2, 16)), noised, objective="x0", learned_variance=True)
    latents = jnp.zeros((2, 4, 4, 3))
    with pytest.raises(ValueError, match="8-bit pixels"):
        process.training_loss(
            COSINE,
            jnp.zeros((2, 4, 4, 6)),
            process.Noised(latents, latents, jnp.array([1, 2]), latents),
            objective="eps",
            learned_variance=True,
            data="latents",
        )
    loss, _ = process.training_loss(COSINE, x, noised, objective="x0", learned_variance=False)
    assert loss.shape == (2,)


def test_mistakes_are_answered_with_what_to_change(example):
    with pytest.raises(ValueError, match="did you mean 'eps'"):
        loss_of(example, example["output"], "epsi")
    with pytest.raises(ValueError, match="did you mean 'min_snr'"):
        loss_of(example, example["output"], weighting="minsnr")
    wrong = [f"min_snr:{text}" for text in ("", "ten", "0", "inf", "5,1")]
    for weighting in (*wrong, "p2:x", "p2:1,2", "snr", "snr:1,5", "snr:1,5,1"):
        with pytest.raises(ValueError, match=f"'{weighting}' must look like 'min_snr:50'"):
            loss_of(example, example["output"], weighting=weighting)
    with pytest.raises(ValueError, match=r"must be \(6, 4, 4, 6\)"):
        loss_of(example, example["output"][..., :3])
    with pytest.raises(ValueError, match=r"must be \(6, 4, 4, 3\)"):
        loss_of(example, example["output"], learned_variance=False)


# L_vlb and its times


def test_the_bound_alone_trains_the_mean_too(example):
    x0, x_t, noise, t = example["x0"], example["x_t"], example["noise"], TIMES
    output = np.full((*x0.shape[:-1], 6), 0.1, np.float32)
    alone = jax.jit(jax.value_and_grad(lambda output: loss_of(example, output, vlb_weight=math.inf)[0].sum()))
    found, gradient = jax.device_get(alone(output))
    bits = jax.jit(functools.partial(process.vb_bits_per_dim, COSINE))
    expected = 1000 * bits(to_prediction(output, x_t, t, "eps", True), x0, x_t, t).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert float(np.abs(gradient[..., :3]).max()) > 0 and float(np.abs(gradient[..., 3:]).max()) > 0
    with pytest.raises(ValueError, match="set learned_variance=True"):
        process.training_loss(
            COSINE,
            noise,
            process.Noised(x0, x_t, t, noise),
            objective="eps",
            learned_variance=False,
            vlb_weight=math.inf,
        )


def test_times_are_drawn_by_the_size_of_their_term_without_bias():
    """The weighted mean of a function of the time is its plain mean, and the large terms come more often."""
    times, keys = 8, jax.random.split(jax.random.key(0), 40)
    term = np.array([100.0, 30, 10, 3, 1, 1, 1, 1], np.float32)
    history = process.init_history(times)
    np.testing.assert_allclose(process.importance(history), 1 / times)  # cold: uniform

    @jax.jit
    def warm(history, keys):
        def step(history, key):
            t, _ = process.draw_by_importance(key, 16, history)
            return process.observe(history, t, jnp.asarray(term)[t]), None

        return jax.lax.scan(step, history, keys)[0]

    history = jax.device_get(warm(history, keys))
    assert (history["vb_count"] >= 10).all() and float(history["vb_count"].sum()) == 40 * 16
    p = np.asarray(process.importance(history))
    np.testing.assert_allclose(p, 0.999 * term / term.sum() + 0.001 / times, rtol=1e-5)
    draw = jax.jit(lambda key, history: process.draw_by_importance(key, 200_000, history))
    t, weight = jax.device_get(draw(jax.random.key(1), history))
    np.testing.assert_allclose(np.bincount(t, minlength=times) / 200_000, p, atol=4e-3)
    assert float((weight * term[t]).mean()) == pytest.approx(float(term.mean()), rel=0.02)


def test_the_history_keeps_the_last_ten_values_of_a_time():
    history = process.init_history(3)
    t = np.array([1] * 13 + [2])
    history = jax.device_get(jax.jit(process.observe)(history, t, np.arange(14, dtype=np.float32)))
    assert sorted(history["vb_history"][1].tolist()) == list(range(3, 13))
    assert history["vb_history"][2].tolist() == [13.0] + [0.0] * 9
    assert history["vb_count"].tolist() == [0, 13, 1]
