"""A stage's diffusion: its noise process, what its network predicts, how it is trained and sampled."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dalle2_jax.diffusion import process, sampling, schedules

# network(x_t [B, ...], t [B] int32) -> output, of twice as many channels where the variance is learned
Network = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class GaussianDiffusion:
    """What the diffusion stages have in common; see `schedules`, `process` and `sampling` for each setting.

    `num_steps`, `spacing`, `method` and `eta` are what `sample` does unless told. `limit` bounds |x0| in
    sampling (None: no bound); `data` is 'pixels' or 'latents'.
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

    def loss(
        self, key: jax.Array, network: Network, x0: jax.Array, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
        """(loss [B], its parts [B], the network's output) at one time an example; see `draw_timesteps`."""
        t_key, noise_key = jax.random.split(key)
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
            data=self.data,
        )
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
    ) -> jax.Array:
        """x0 [B, *shape] float32, one key an example.

        With a guidance scale (a number or [B]) the network is given 2 B rows, of which every second one is to
        be without condition: `interleave` puts conditions into that order, in which sharding over the batch
        does not part a pair.
        """

        def denoise(x_t, t):
            output = network(x_t, t)
            return process.to_prediction(self.schedule, output, x_t, t, self.objective, self.learned_variance)

        def pair(x_t, t):
            both = denoise(jnp.repeat(x_t, 2, axis=0), jnp.repeat(t, 2))
            return jax.tree.map(lambda y: y[0::2], both), jax.tree.map(lambda y: y[1::2], both)

        denoiser = denoise if guidance_scale is None else sampling.guided(pair, guidance_scale)
        if self.limit is not None:
            denoiser = sampling.clip_x0(denoiser, self.schedule, self.limit)
        num_steps = num_steps or self.num_steps
        # A list of steps such as fast27 fixes their number; another number falls back to even spacing.
        fits = num_steps == self.num_steps or self.spacing in ("uniform", "trailing")
        spacing = self.spacing if fits else "uniform"
        return sampling.sample(
            denoiser,
            self.schedule,
            sampling.init_noise(keys, shape),
            keys,
            timesteps=schedules.space_timesteps(num_steps, self.schedule.num_timesteps, spacing),
            method=method or self.method,
            eta=self.eta if eta is None else eta,
            variance="learned" if self.learned_variance else "fixed_small",
        )


def interleave(conditional, unconditional):
    """Two trees of arrays [B, ...] as one of [2 B, ...]: c0, u0, c1, u1, ..."""
    return jax.tree.map(
        lambda c, u: jnp.stack([c, u], 1).reshape(-1, *c.shape[1:]), conditional, unconditional
    )


def is_guided(guidance_scale: float | jax.Array) -> bool:
    """Whether a scale needs the unconditional half: all but the Python number 1 do; an array is traced."""
    return not (isinstance(guidance_scale, int | float) and guidance_scale == 1)
