"""VQGAN's adversarial loss, and a loss on features (arXiv 2012.09841, section 3.1).

With reconstruction loss L_rec (feature loss included), last decoder kernel K and discriminator D:

    generator      L_rec + w L_gan,  L_gan = -mean D(x^),
                   w = weight min(|dL_rec/dK| / (|dL_gan/dK| + 1e-4), 1e4)
    discriminator  0.5 mean(relu(1 - D(x)) + relu(1 + D(x^)))

Both are parts of one loss: each holds the other's parameters fixed. They begin at step `start`.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from dalle2_jax.models.nets.vqgan import Discriminator
from dalle2_jax.models.stages import check_settings

FEATURES = ("", "lpips", "discriminator")


@dataclasses.dataclass(frozen=True)
class Adversarial:
    """The losses beside the likelihood.

    Attributes:
      net: the discriminator. weight: its factor beside the adaptive one. start: its first step.
      features: '', 'lpips' (of the frozen stage `features`, weights of the user), or 'discriminator': the
        mean absolute differences of the discriminator's activations, which needs no other network.
      feature_weight: of the feature loss.
    """

    net: Discriminator = Discriminator()
    weight: float = 0.8
    start: int = 250_001
    features: str = ""
    feature_weight: float = 1.0

    def init(self, key: jax.Array, image: jax.Array) -> dict:
        """The discriminator's parameters."""
        return self.net.init(key, image)["params"]

    def loss(
        self,
        params: dict,
        x: jax.Array,
        last: tuple[Callable, jax.Array],
        nll: Callable,
        step,
        distance: Callable | None = None,
    ) -> tuple[jax.Array, dict]:
        """(likelihood and all losses of this class, scalars).

        Args:
          params: of the discriminator. x: pictures [B, H, W, 3] in [-1, 1].
          last: (f, kernel), f(kernel) being the decoder's maps.
          nll: maps -> [], the likelihood's loss.
          distance: (x, maps) -> [], for features='lpips'.
        """
        maps_of, kernel = last
        fixed = jax.lax.stop_gradient(params)

        def judged(given: dict, images: jax.Array):
            return self.net.apply({"params": given}, images)

        def reconstruction(maps: jax.Array) -> tuple[jax.Array, jax.Array]:
            """(the likelihood's loss with that on features, the latter)."""
            extra = jnp.float32(0)
            if self.features == "discriminator":
                pairs = zip(judged(fixed, maps)[1], judged(fixed, x)[1], strict=True)
                for a, b in pairs:
                    extra += jnp.abs(a - jax.lax.stop_gradient(b)).mean()
            elif self.features and distance is not None:
                extra = distance(x, maps)
            return nll(maps) + self.feature_weight * extra, extra

        def generator(maps: jax.Array) -> jax.Array:
            return -judged(fixed, maps)[0].mean()

        maps = maps_of(kernel)
        held, back = jax.vjp(maps_of, jax.lax.stop_gradient(kernel))
        (of_rec,) = back(jax.grad(lambda m: reconstruction(m)[0])(jax.lax.stop_gradient(held)))
        (of_gan,) = back(jax.grad(generator)(jax.lax.stop_gradient(held)))
        adaptive = jnp.linalg.norm(of_rec) / (jnp.linalg.norm(of_gan) + 1e-4)
        adaptive = jax.lax.stop_gradient(jnp.clip(adaptive, 0, 1e4)) * self.weight

        begun = (jnp.asarray(step) >= self.start).astype(jnp.float32)
        value, extra = reconstruction(maps)
        gan = generator(maps)
        true, false = judged(params, x)[0], judged(params, jax.lax.stop_gradient(maps))[0]
        hinge = 0.5 * (jax.nn.relu(1 - true).mean() + jax.nn.relu(1 + false).mean())
        scalars = {"gan": gan, "gan_weight": begun * adaptive, "discriminator": hinge}
        scalars |= {f"{self.features}_features": extra} if self.features else {}
        return value + begun * (adaptive * gan + hinge), scalars


def build(settings: Mapping) -> Adversarial:
    """`adversarial` of a config: fields of `Adversarial`, and `widths` of the discriminator.

    Raises ValueError for settings that are wrong.
    """
    names = ("weight", "start", "features", "feature_weight", "widths")
    check_settings(settings, (), names, "adversarial")
    rest = {name: value for name, value in settings.items() if name != "widths"}
    if rest.get("features", "") not in FEATURES:
        raise ValueError(f"adversarial.features {rest['features']!r} is unknown; choose one of {FEATURES}")
    net = Discriminator(tuple(settings["widths"])) if "widths" in settings else Discriminator()
    return Adversarial(net, **rest)
