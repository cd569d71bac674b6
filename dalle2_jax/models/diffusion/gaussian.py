"""A stage's diffusion: its noise process, what its network predicts, how it is trained and sampled."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.models.diffusion import likelihood, process, sampling, schedules
from dalle2_jax.models.diffusion.guidance import (
    Guidance,
    clip_x0,
    dynamic_threshold,
    keep_known,
    steered,
)
from dalle2_jax.models.diffusion.process import Denoiser, Network


class Start(NamedTuple):
    """Where a walk starts: noise x_T [B, ...], or an image that is noised part of the way.

    Attributes:
      x_T: None draws it from the keys.
      init, strength: with a strength below 1 only this share of the steps is taken, from `init` [B, ...]
        noised up to where they begin.
    """

    x_T: jax.Array | None = None
    init: jax.Array | None = None
    strength: float = 1.0


FROM_NOISE = Start()


@dataclasses.dataclass(frozen=True)
class GaussianDiffusion:
    """What the diffusion stages have in common; see `schedules`, `process` and `sampling` for each setting.

    `num_steps`, `spacing`, `method`, `eta` and `threshold` are settings of `sample`, see `with_settings`.
    `limit` bounds |x0| in sampling (None: no bound); `threshold` in (0, 100] is the percentile of dynamic
    thresholding in its place, `threshold_max` the most that it divides by. `data` is 'pixels' or 'latents',
    `data_variance` that of an entry, which bounds method 'analytic'. `loss_kind` is 'hybrid' (the weighted
    error, with a little of the bound where the variance is learned) or 'vlb' (the bound, its times drawn by
    importance). `fixed_variance` is the fraction f of log beta in the variance of 'ddpm' where it is not
    learned: 0 is beta_tilde, 1 is beta (DDPM's 'fixed large'). `noise_scale` is a factor of the first noise
    (GLIDE's upsampler: 0.997). `times` is how training draws its times.

    `guide_rule` is how a guide steers. 'score' shifts eps, then x0 is bounded. 'adm' does as ADM's authors:
    x0 is bounded first, then 'ddpm' shifts its mean by the variance, and others shift eps. At the last steps
    'score' shifts up to seven times as far.
    """

    schedule: schedules.Schedule
    objective: str
    learned_variance: bool
    weighting: str
    num_steps: int
    spacing: str
    method: str
    eta: float
    limit: float | None = 1.0
    data: str = "pixels"
    data_variance: float = 1.0
    threshold: float | None = None
    loss_kind: str = "hybrid"
    fixed_variance: float = 0.0
    threshold_max: float | None = None
    guide_rule: str = "score"
    noise_scale: float = 1.0
    times: process.Times = process.UNIFORM

    def __post_init__(self):
        if self.method not in sampling.METHODS:
            raise ValueError(
                f"method {self.method!r} is unknown: choose one of {', '.join(sampling.METHODS)}"
            )
        if self.loss_kind not in ("hybrid", "vlb"):
            raise ValueError(f"loss {self.loss_kind!r} is unknown: choose 'hybrid' or 'vlb'")
        if self.loss_kind == "vlb" and not self.learned_variance:
            raise ValueError("loss 'vlb' is the bound of a learned variance: set learned_variance=True")
        if self.guide_rule not in ("score", "adm"):
            raise ValueError(f"guide_rule {self.guide_rule!r} is unknown: choose 'score' or 'adm'")
        if not 0 <= self.fixed_variance <= 1 or (self.fixed_variance and self.learned_variance):
            raise ValueError(
                f"fixed_variance {self.fixed_variance} must be in 0 .. 1, and 0 where the variance is learned"
            )
        if self.threshold is not None and (self.limit is None or not 0 < self.threshold <= 100):
            raise ValueError(f"threshold {self.threshold} must be a percentile in (0, 100], of pixels")
        if self.schedule.alpha_bar[-1] == 0:
            zero = f"divides by alpha_bar, and schedule {self.schedule.name!r} begins with alpha_bar = 0"
            if self.objective == "eps":
                raise ValueError(f"objective 'eps' {zero}: choose 'flow', 'x0' or 'v'")
            if self.method == "analytic":
                raise ValueError(f"method 'analytic' {zero}: choose 'euler', 'heun' or 'dpm++'")
        if self.times.check() != process.UNIFORM and self.learned_variance:
            raise ValueError("a learned variance is trained at uniform times: set learned_variance=False")

    def loss(
        self,
        key: jax.Array,
        network: Network,
        x0: jax.Array,
        *,
        train: bool,
        history: dict[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, Any], jax.Array]:
        """(loss [B], its parts [B], the predicted x0) at one time an example; see `draw_timesteps`.

        With a `history` (of 'vlb', in training) times are drawn by importance, and among the parts is
        'statistics': the times and values that `process.observe` takes.
        """
        t_key, noise_key = jax.random.split(key)
        weight, size, num_timesteps = None, x0.shape[0], self.schedule.num_timesteps
        if train and history is not None:
            t, weight = process.draw_by_importance(t_key, size, history)
        elif train and self.times != process.UNIFORM:
            t = process.draw_path_times(t_key, size, num_timesteps, self.times)
        else:
            t = process.draw_timesteps(t_key, size, num_timesteps, train=train)
        noise = jax.random.normal(noise_key, x0.shape)
        x_t = process.q_sample(self.schedule, x0, t, noise)
        output = network(process.network_input(self.schedule, x_t, t), t)
        losses, metrics = process.training_loss(
            self.schedule,
            output,
            process.Noised(x0, x_t, t, noise),
            objective=self.objective,
            learned_variance=self.learned_variance,
            weighting=self.weighting,
            vlb_weight=math.inf if self.loss_kind == "vlb" else 1e-3,
            data=self.data,
        )
        predicted = self._prediction(output, x_t, t).x0
        if weight is not None:
            return losses * weight, {**metrics, "statistics": {"t": t, "values": losses}}, predicted
        return losses, metrics, predicted

    def with_settings(
        self,
        num_steps: int | None = None,
        method: str | None = None,
        eta: float | None = None,
        spacing: str | None = None,
        threshold: float | None = None,
    ) -> "GaussianDiffusion":
        """The same process with other settings of sampling; None keeps one.

        A list of steps such as fast27 fixes their number. Another number falls back to even spacing, unless
        another spacing is asked for.
        """
        given = dict(num_steps=num_steps, method=method, eta=eta, spacing=spacing, threshold=threshold)
        settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        own_spacing = settings.get("spacing", self.spacing) == self.spacing
        fixed = self.spacing.startswith(("fast", "sections"))
        if own_spacing and fixed and settings.get("num_steps", self.num_steps) != self.num_steps:
            settings["spacing"] = "uniform"
        return dataclasses.replace(self, **settings)

    @property
    def settings(self) -> dict:
        """The settings of sampling that a picture's stage has, and their values."""
        return {name: getattr(self, name) for name in ("num_steps", "method", "eta", "spacing", "threshold")}

    def timesteps(self) -> np.ndarray:
        """The times that `sample` visits, descending."""
        return schedules.space_timesteps(self.num_steps, self.schedule.num_timesteps, self.spacing)

    def denoiser(
        self,
        network: Network,
        *,
        guidance: Guidance | None = None,
        log_p: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
        inpaint: tuple[jax.Array, jax.Array] | None = None,
    ) -> Denoiser:
        """The denoiser of a network: guided, steered, bounded, and made to keep known pixels, in this order.

        log_p(x_t [B, ...], t [B]) -> [B] steers samples to where it is large, see `guidance.steered`.
        inpaint: (image [B, ...], mask [B, ..., 1]); the image comes back where the mask is 0.
        """
        denoise = self._predict(network)
        if guidance is not None:
            denoise = guidance.denoiser(denoise, self._predict(guidance.network), self.schedule)
        if log_p is not None and self.guide_rule == "score":
            denoise = steered(denoise, self.schedule, log_p)
        denoise = self._bounded(denoise)
        if log_p is not None and self.guide_rule == "adm":
            denoise = steered(denoise, self.schedule, log_p, mean=self.method == "ddpm")
        return denoise if inpaint is None else keep_known(denoise, self.schedule, *inpaint)

    def sample(
        self,
        denoise: Denoiser,
        keys: jax.Array,
        shape: tuple[int, ...],
        *,
        start: Start = FROM_NOISE,
        resample: int = 1,
        eps_sq: jax.Array | None = None,
        return_path: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """x0 [B, *shape] float32, one key an example, by a `denoiser`.

        resample: how often every step is taken, see `sampling.resampled`. eps_sq [T] is for method
        'analytic'. return_path: also x after every step, see `sampling.walk`.
        """
        x, timesteps = self._begin(keys, shape, start)
        steps = schedules.two_time(self.schedule, timesteps)
        sampler = self._sampler(steps, eps_sq)
        if resample != 1:
            sampler = sampling.resampled(sampler, steps, resample)
        return sampling.walk(denoise, sampler, x, keys, return_path=return_path)

    def _begin(self, keys: jax.Array, shape: tuple[int, ...], start: Start) -> tuple[jax.Array, np.ndarray]:
        """(the state [B, *shape] that a walk starts from, the times that it visits)."""
        timesteps = self.timesteps()
        noise = sampling.init_noise(keys, shape) if start.x_T is None else start.x_T
        if self.noise_scale != 1 and start.x_T is None:
            noise = noise * self.noise_scale
        if start.strength >= 1.0:
            return noise, timesteps
        if start.init is None:
            raise ValueError(f"strength {start.strength} needs what to start from: give init")
        timesteps = timesteps[len(timesteps) - max(1, round(start.strength * len(timesteps))) :]
        t = jnp.full(noise.shape[:1], timesteps[0], jnp.int32)
        return process.q_sample(self.schedule, start.init, t, noise), timesteps

    def _sampler(self, steps: schedules.TwoTime, eps_sq: jax.Array | None) -> sampling.Sampler:
        if self.method == "analytic" and (eps_sq is None or eps_sq.shape != (self.schedule.num_timesteps,)):
            raise ValueError(
                f"method 'analytic' needs the measured eps_sq of all {self.schedule.num_timesteps} times: "
                "measure it (Prior.measure), or use 'ddpm'"
            )
        names: dict[float, str | float] = {0: "fixed_small", 1: "fixed_large"}
        fixed = names.get(self.fixed_variance, self.fixed_variance)
        options: dict[str, dict[str, Any]] = {
            "ddpm": dict(variance="learned" if self.learned_variance else fixed),
            "ddim": dict(eta=self.eta),
            "analytic": dict(eps_sq=eps_sq, data_variance=self.data_variance),
        }
        sampler: Any = sampling.SAMPLERS[self.method]
        return sampler(steps, **options.get(self.method, {}))

    def bits_per_dim(
        self, network: Network, keys: jax.Array, x0: jax.Array, num_steps: int | None = None
    ) -> dict[str, jax.Array]:
        """The bound on -log2 p(x0) of 8-bit pictures x0 [B, H, W, C] in [-1, 1], see `likelihood`.

        keys [B]: of each picture's noise. num_steps: the steps of the bound, evenly spaced; None: all T.
        """
        times = schedules.space_timesteps(
            num_steps or self.schedule.num_timesteps, self.schedule.num_timesteps
        )
        denoise = clip_x0(self._predict(network), self.schedule)
        fraction = None if self.learned_variance else self.fixed_variance
        return likelihood.bits_per_dim(denoise, self.schedule, keys, x0, times, fraction)

    def invert(self, network: Network, x0: jax.Array) -> jax.Array:
        """The noise x_T from which `sample` by 'ddim' with eta 0, no guidance, and as many steps returns to
        about x0 [B, ...]; see `sampling.invert`."""
        return sampling.invert(self.denoiser(network), self.schedule, x0, timesteps=self.timesteps())

    def _predict(self, network: Network) -> Denoiser:
        def denoise(x_t, t):
            return self._prediction(network(process.network_input(self.schedule, x_t, t), t), x_t, t)

        return denoise

    def _prediction(self, output: jax.Array, x_t: jax.Array, t: jax.Array) -> process.Prediction:
        return process.to_prediction(self.schedule, output, x_t, t, self.objective, self.learned_variance)

    def _bounded(self, denoise: Denoiser) -> Denoiser:
        if self.threshold is not None:
            return dynamic_threshold(denoise, self.schedule, self.threshold, self.threshold_max)
        return denoise if self.limit is None else clip_x0(denoise, self.schedule, self.limit)

    def measure_eps_sq(self, network: Network, key: jax.Array, x0: jax.Array) -> jax.Array:
        """m_t = E mean(eps^2) [T] float32 of the network's eps over data x0 [B, ...]: what 'analytic' needs.

        Measured at the times of `sample`, with noise of their own, and interpolated linearly between them.
        """
        times = jnp.asarray(self.timesteps()[::-1].copy(), jnp.int32)

        def at(t):
            rows = jnp.full(x0.shape[:1], t, jnp.int32)
            noise = jax.random.normal(jax.random.fold_in(key, t), x0.shape)
            x_t = process.q_sample(self.schedule, x0, rows, noise)
            return jnp.square(self._predict(network)(x_t, rows).eps).mean()

        return jnp.interp(jnp.arange(self.schedule.num_timesteps), times, jax.lax.map(at, times))
