"""Whole walks against diffusers' schedulers, which share no code with ours; both sides get the same noise.

The schedulers compute their tables in float32; they are given float64 ones made here from betas, and run in
float64.
"""

import math

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is the other side of the comparison")
diffusers = pytest.importorskip("diffusers", reason="diffusers' schedulers are the oracle")

import jax  # noqa: E402

from dalle2_jax.models.diffusion import gaussian, guidance, process, sampling, schedules  # noqa: E402

COSINE = schedules.make_schedule("cosine")
SHAPE = (2, 3, 3, 3)  # [B, H, W, C]; on the other side a learned variance splits axis 1, so C goes there


def betas(num_timesteps=1000):
    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    T = num_timesteps
    return torch.tensor([min(1 - f((i + 1) / T) / f(i / T), 0.999) for i in range(T)], dtype=torch.float64)


def in_float64(scheduler):
    scheduler.betas = betas()
    scheduler.alphas = 1.0 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    return scheduler


def network(xp, x, t):
    """A smooth function of x and t with twice the channels of x (axis -1); xp is numpy or jax.numpy."""
    mean = 0.5 * xp.sin(x) + 0.3 * x + 0.1 * xp.sin(0.01 * t)
    return xp.concatenate([mean, 0.8 * xp.cos(2 * x)], -1)


def ours(start, noise, times, monkeypatch, learned, objective="eps", method="ddpm", **options):
    """Our walk, with the noise of time t taken from noise[t]."""
    monkeypatch.setattr(sampling, "_normal", lambda keys, t, shape: jnp.asarray(noise, jnp.float32)[t])

    def denoise(x_t, t):
        output = network(jnp, x_t, t[0].astype(jnp.float32))
        output = output if learned else output[..., : x_t.shape[-1]]
        return process.to_prediction(COSINE, output, x_t, t, objective, learned)

    denoise = guidance.clip_x0(denoise, COSINE)
    keys = jax.random.split(jax.random.key(0), len(start))
    sampler = sampling.SAMPLERS[method](schedules.two_time(COSINE, times), **options)
    walk = jax.jit(lambda x_T, keys: sampling.walk(denoise, sampler, x_T, keys))
    return walk(start, keys)


def to_torch(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def from_torch(x):
    return np.moveaxis(x.numpy(), 1, -1)


@pytest.fixture
def start_and_noise():
    generator = np.random.default_rng(0)
    return generator.standard_normal(SHAPE), generator.standard_normal((1000, *SHAPE))


def test_cosine_tables_agree():
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    np.testing.assert_allclose(COSINE.alpha_bar, torch.cumprod(1 - betas(), 0).numpy(), rtol=1e-12)
    # Its float32 table is off by what 1000 float32 products cost.
    np.testing.assert_allclose(COSINE.alpha_bar, scheduler.alphas_cumprod.numpy(), rtol=1e-3)


@pytest.mark.parametrize("variance_type, learned", [("learned_range", True), ("fixed_small_log", False)])
@pytest.mark.parametrize("num_steps", [2, 25, 64])
def test_unclip_scheduler(num_steps, variance_type, learned, start_and_noise, monkeypatch):
    import diffusers.schedulers.scheduling_unclip as module

    start, noise = start_and_noise
    scheduler = in_float64(diffusers.UnCLIPScheduler(variance_type=variance_type))
    scheduler.set_timesteps(num_steps)
    times = scheduler.timesteps.numpy()
    np.testing.assert_array_equal(schedules.space_timesteps(num_steps), times)
    x = to_torch(start)
    for i, t in enumerate(times.tolist()):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, t=t, **__: to_torch(noise[t]))
        output = network(np, from_torch(x), t)
        output = to_torch(output if learned else output[..., :3])
        before = int(times[i + 1]) if i + 1 < len(times) else None
        x = scheduler.step(output, t, x, prev_timestep=before).prev_sample
    variance = "learned" if learned else "fixed_small"
    got = ours(start, noise, times, monkeypatch, learned, variance=variance)
    np.testing.assert_allclose(got, from_torch(x), atol=2e-4)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("objective, name", [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
@pytest.mark.parametrize("spacing, num_steps", [("trailing", 20), ("leading", 25)])
def test_ddim_scheduler(spacing, num_steps, objective, name, eta, start_and_noise, monkeypatch):
    """Spacings whose stride is T / n, as this scheduler supposes: for other choices it steps to times it
    never visits."""
    start, noise = start_and_noise
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        timestep_spacing=spacing,
        set_alpha_to_one=True,
        clip_sample=True,
        prediction_type=name,
    )
    scheduler = in_float64(scheduler)
    scheduler.set_timesteps(num_steps)
    times = scheduler.timesteps.numpy()
    if spacing == "trailing":
        np.testing.assert_array_equal(schedules.space_timesteps(num_steps, 1000, "trailing"), times)
    x = to_torch(start)
    for t in times.tolist():
        output = to_torch(network(np, from_torch(x), t)[..., :3])
        step_noise = to_torch(noise[t]) if eta else None
        x = scheduler.step(
            output, t, x, eta=eta, use_clipped_model_output=True, variance_noise=step_noise
        ).prev_sample
    got = ours(start, noise, times, monkeypatch, False, objective, method="ddim", eta=eta)
    np.testing.assert_allclose(got, from_torch(x), atol=2e-4)


def test_ddim_scheduler_over_every_timestep(start_and_noise, monkeypatch):
    """Its 'linspace' spacing, which is our 'uniform', strides by T / n only when no time is left out."""
    start, noise = start_and_noise
    scheduler = in_float64(diffusers.DDIMScheduler(timestep_spacing="linspace", set_alpha_to_one=True))
    scheduler.set_timesteps(1000)
    times = scheduler.timesteps.numpy()
    np.testing.assert_array_equal(schedules.space_timesteps(1000), times)
    x = to_torch(start)
    for t in times.tolist():
        output = to_torch(network(np, from_torch(x), t)[..., :3])
        x = scheduler.step(output, t, x, use_clipped_model_output=True).prev_sample
    got = ours(start, noise, times, monkeypatch, False, method="ddim")
    np.testing.assert_allclose(got, from_torch(x), atol=2e-4)


def test_noising_and_velocity(start_and_noise):
    x0, noise = start_and_noise[0], start_and_noise[1][0]
    scheduler = in_float64(diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    t = np.array([3, 998])
    x_t = scheduler.add_noise(to_torch(x0), to_torch(noise), torch.from_numpy(t))
    got = process.q_sample(COSINE, jnp.asarray(x0), jnp.asarray(t), jnp.asarray(noise))
    np.testing.assert_allclose(got, from_torch(x_t), atol=1e-6)
    v = from_torch(scheduler.get_velocity(to_torch(x0), to_torch(noise), torch.from_numpy(t)))
    prediction = process.to_prediction(COSINE, jnp.asarray(v), got, jnp.asarray(t), "v", False)
    np.testing.assert_allclose(prediction.x0, x0, atol=1e-5)
    np.testing.assert_allclose(prediction.eps, noise, atol=1e-5)


def flow_sigmas(scheduler, num_steps):
    """The scheduler's distinct sigmas, which are times u, without the clean end."""
    scheduler.set_timesteps(num_steps)
    return np.unique(scheduler.sigmas.numpy().astype(np.float64))[:0:-1]


def even_log_snr(scheduler, num_steps):
    """Steps of one length: of longer and longer ones diffusers extrapolates farther than our solver."""
    scheduler.set_timesteps(num_steps)
    sigmas = 1 / (1 + np.exp(np.linspace(-6, 5, num_steps)))
    scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0.0))
    scheduler.timesteps = torch.from_numpy(1000 * sigmas)
    return sigmas


@pytest.mark.parametrize("num_steps", [2, 9])
@pytest.mark.parametrize(
    "method, name, sigmas_of, options",
    [
        ("euler", "FlowMatchEulerDiscreteScheduler", flow_sigmas, dict(shift=3.0)),
        ("heun", "FlowMatchHeunDiscreteScheduler", flow_sigmas, dict(shift=2.0)),
        (
            "dpm++",
            "DPMSolverMultistepScheduler",
            even_log_snr,
            dict(use_flow_sigmas=True, prediction_type="flow_prediction"),
        ),
    ],
)
def test_flow_schedulers(method, name, sigmas_of, options, num_steps, start_and_noise):
    scheduler = getattr(diffusers, name)(**options)
    u = sigmas_of(scheduler, num_steps)
    if method != "dpm++":
        shift = scheduler.config.shift  # which diffusers applies to the least time twice
        even = np.linspace(1, schedules.shifted(0.001, shift), num_steps)
        np.testing.assert_allclose(u, schedules.shifted(even, shift), rtol=1e-6)
    x = to_torch(start_and_noise[0])
    for t in scheduler.timesteps:
        output = to_torch(network(np, from_torch(x), t.item())[..., :3])
        x = scheduler.step(output, t, x.float()).prev_sample.double()
    signal, times = (1 - u) / np.hypot(1 - u, u), jnp.asarray(1000 * u[::-1], jnp.float32)
    own = gaussian.GaussianDiffusion(
        schedules.Schedule("oracle", signal[::-1] ** 2, 1.0),
        objective="flow",
        learned_variance=False,
        weighting="uniform",
        num_steps=num_steps,
        spacing="uniform",
        method=method,
        eta=0.0,
        limit=None,
    )
    # A walk begins at x_t, the scheduler at the straight path.
    x_T = jnp.asarray(start_and_noise[0] / own.schedule.path_scale[-1])
    denoise = own.denoiser(lambda z, t: network(jnp, z, times[t[0]])[..., :3])
    keys = jax.random.split(jax.random.key(0), len(x_T))
    sample = jax.jit(lambda x_T: own.sample(denoise, keys, SHAPE[1:], start=gaussian.Start(x_T=x_T)))
    np.testing.assert_allclose(sample(x_T), from_torch(x), atol=1e-5)
