"""A stage's diffusion: its noise process, what its network predicts, how it is trained and sampled."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.models.diffusion import process, sampling, schedules

# network(x_t [B, ...], t [B] int32) -> output, of twice as many channels where the variance is learned
Network = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class GaussianDiffusion:
    """What the diffusion stages have in common; see `schedules`, `process` and `sampling` for each setting.

    `num_steps`, `spacing`, `method` and `eta` are what `sample` does unless told. `limit` bounds |x0| in
    sampling (None: no bound), and `threshold` in (0, 100] is the percentile of dynamic thresholding in its
    place. `data` is 'pixels' or 'latents', `data_variance` that of an entry, which bounds method 'analytic'.
    `loss_kind` is 'hybrid' (the weighted error, with a little of the bound where the variance is learned) or
    'vlb' (the bound, its times drawn by importance).
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

    def __post_init__(self):
        if self.method not in sampling.METHODS:
            raise ValueError(
                f"method {self.method!r} is unknown: choose one of {', '.join(sampling.METHODS)}"
            )
        if self.loss_kind not in ("hybrid", "vlb"):
            raise ValueError(f"loss {self.loss_kind!r} is unknown: choose 'hybrid' or 'vlb'")
        if self.loss_kind == "vlb" and not self.learned_variance:
            raise ValueError("loss 'vlb' is the bound of a learned variance: set learned_variance=True")
        if self.threshold is not None and (self.limit is None or not 0 < self.threshold <= 100):
            raise ValueError(f"threshold {self.threshold} must be a percentile in (0, 100], of pixels")

    def loss(
        self,
        key: jax.Array,
        network: Network,
        x0: jax.Array,
        *,
        train: bool,
        history: dict[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
        """(loss [B], its parts [B], the network's output) at one time an example; see `draw_timesteps`.

        With a `history` (of 'vlb', in training) times are drawn by importance, and among the parts is
        'statistics': the times and values that `process.observe` takes.
        """
        t_key, noise_key = jax.random.split(key)
        by_importance = train and history is not None
        if by_importance:
            t, weight = process.draw_by_importance(t_key, x0.shape[0], history)
        else:
            t = process.draw_timesteps(t_key, x0.shape[0], self.schedule.num_timesteps, train=train)
        noise = jax.random.normal(noise_key, x0.shape)
        x_t = process.q_sample(self.schedule, x0, t, noise)
        output = network(x_t, t)
        losses, metrics = process.training_loss(
            self.schedule,
            output,
            x0,
            x_t,
            t,
            noise,
            objective=self.objective,
            learned_variance=self.learned_variance,
            weighting=self.weighting,
            bound_alone=self.loss_kind == "vlb",
            data=self.data,
        )
        if by_importance:
            metrics["statistics"] = {"t": t, "values": losses}
            losses = losses * weight
        return losses, metrics, output

    def sample(
        self,
        network: Network,
        keys: jax.Array,
        shape: tuple[int, ...],
        *,
        guidance_scale: float | jax.Array | None = None,
        num_steps: int | None = None,
        method: str | None = None,
        eta: float | None = None,
        eps_sq: jax.Array | None = None,
        log_p: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
        log_p_scale: float | jax.Array = 1.0,
        x_T: jax.Array | None = None,
        init: jax.Array | None = None,
        strength: float = 1.0,
        known: tuple[jax.Array, jax.Array] | None = None,
        resample: int = 1,
        return_path: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """x0 [B, *shape] float32, one key an example; `eps_sq` [T] is for method 'analytic'.

        log_p(x_t [B, ...], t [B]) -> [B] steers the samples to where it is large: see `sampling.steered`.

        With a guidance scale (a number or [B]) the network is given 2 B rows, of which every second one is to
        be without condition: `interleave` puts conditions into that order, in which sharding over the batch
        does not part a pair.

        x_T [B, *shape] is the noise to start from, drawn from the keys unless given. With a `strength` below
        1 only that share of the steps is taken, from `init` [B, *shape] noised up to where they begin. known:
        (x0 [B, *shape], repaint [B, ..., 1]), of which the first comes back where the second is 0; resample,
        return_path: see `sampling.sample`.
        """
        denoiser = self._denoiser(network, guidance_scale)
        if log_p is not None:
            denoiser = sampling.steered(denoiser, self.schedule, log_p, log_p_scale)
        denoiser = self._bounded(denoiser)
        if known is not None:
            denoiser = sampling.keep_known(denoiser, self.schedule, *known)
        timesteps = self.timesteps(num_steps)
        noise = sampling.init_noise(keys, shape) if x_T is None else x_T
        if strength < 1.0:
            if init is None:
                raise ValueError(f"strength {strength} needs what to start from: give init")
            timesteps = timesteps[len(timesteps) - max(1, round(strength * len(timesteps))) :]
            rows = jnp.full(noise.shape[:1], timesteps[0], jnp.int32)
            noise = process.q_sample(self.schedule, init, rows, noise)
        return sampling.sample(
            denoiser,
            self.schedule,
            noise,
            keys,
            timesteps=timesteps,
            method=method or self.method,
            eta=self.eta if eta is None else eta,
            variance="learned" if self.learned_variance else "fixed_small",
            eps_sq=eps_sq,
            data_variance=self.data_variance,
            resample=resample,
            return_path=return_path,
        )

    def invert(self, network: Network, x0: jax.Array, *, num_steps: int | None = None) -> jax.Array:
        """The noise x_T from which `sample` by 'ddim' with eta 0, no guidance, and as many steps returns to
        about x0 [B, ...]; see `sampling.invert`."""
        denoiser = self._bounded(self._denoiser(network, None))
        return sampling.invert(denoiser, self.schedule, x0, timesteps=self.timesteps(num_steps))

    def _denoiser(self, network: Network, guidance_scale: float | jax.Array | None) -> sampling.Denoiser:
        def denoise(x_t, t):
            output = network(x_t, t)
            return process.to_prediction(self.schedule, output, x_t, t, self.objective, self.learned_variance)

        def pair(x_t, t):
            both = denoise(jnp.repeat(x_t, 2, axis=0), jnp.repeat(t, 2))
            return jax.tree.map(lambda y: y[0::2], both), jax.tree.map(lambda y: y[1::2], both)

        return denoise if guidance_scale is None else sampling.guided(pair, guidance_scale)

    def _bounded(self, denoiser: sampling.Denoiser) -> sampling.Denoiser:
        if self.threshold is not None:
            return sampling.dynamic_threshold(denoiser, self.schedule, self.threshold)
        return denoiser if self.limit is None else sampling.clip_x0(denoiser, self.schedule, self.limit)

    def timesteps(self, num_steps: int | None = None) -> np.ndarray:
        """The times that `sample` visits, descending.

        A list of steps such as fast27 fixes their number; another number falls back to even spacing.
        """
        num_steps = num_steps or self.num_steps
        fits = num_steps == self.num_steps or self.spacing in ("uniform", "trailing")
        spacing = self.spacing if fits else "uniform"
        return schedules.space_timesteps(num_steps, self.schedule.num_timesteps, spacing)

    def measure_eps_sq(self, network: Network, key: jax.Array, x0: jax.Array) -> jax.Array:
        """m_t = E mean(eps^2) [T] float32 of the network's eps over data x0 [B, ...]: what 'analytic' needs.

        Measured at the times of `sample`, with noise of their own, and interpolated linearly between them.
        """
        times = jnp.asarray(self.timesteps()[::-1].copy(), jnp.int32)

        def at(t):
            rows = jnp.full(x0.shape[:1], t, jnp.int32)
            noise = jax.random.normal(jax.random.fold_in(key, t), x0.shape)
            x_t = process.q_sample(self.schedule, x0, rows, noise)
            prediction = process.to_prediction(
                self.schedule, network(x_t, rows), x_t, rows, self.objective, self.learned_variance
            )
            return jnp.square(prediction.eps).mean()

        return jnp.interp(jnp.arange(self.schedule.num_timesteps), times, jax.lax.map(at, times))


def interleave(conditional, unconditional):
    """Two trees of arrays [B, ...] as one of [2 B, ...]: c0, u0, c1, u1, ..."""
    return jax.tree.map(
        lambda c, u: jnp.stack([c, u], 1).reshape(-1, *c.shape[1:]), conditional, unconditional
    )


def is_guided(guidance_scale: float | jax.Array) -> bool:
    """Whether a scale needs the unconditional half: all but the Python number 1 do; an array is traced."""
    return not (isinstance(guidance_scale, int | float) and guidance_scale == 1)
