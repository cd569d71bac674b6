"""A classifier of noised pictures, for classifier guidance (ADM, arXiv:2105.05233, section 4).

    x_t  = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps,      loss = cross entropy of p(label | x_t, t)

with t uniform. Its noise has to be that of the decoder that it guides. Without a schedule it reads clean
pictures and judges what others draw (`evaluate --metrics=class_accuracy`). Records without a label (-1) are
left out of the loss.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.models.diffusion import process, schedules
from dalle2_jax.models.nets.unet import ClassifierNet
from dalle2_jax.models.stages import Loss, Op
from dalle2_jax.models.stages.building import unet_style


@dataclasses.dataclass(frozen=True)
class Classifier:
    """The classifier's network and noise (None: clean pictures); parameters are passed to every call."""

    ops = {"score": Op(("score",), ("image", "label"))}
    net: ClassifierNet
    schedule: schedules.Schedule | None
    image_size: int
    num_classes: int

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields that `loss` reads."""
        return {
            "image": jax.ShapeDtypeStruct((batch_size, self.image_size, self.image_size, 3), jnp.float32),
            "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        }

    def init(self, key: jax.Array, batch: dict) -> dict:
        """Float32 parameters."""
        return self.net.init(key, batch["image"], jnp.zeros(batch["image"].shape[0], jnp.int32))["params"]

    def loss(
        self, params: dict, key: jax.Array, batch: dict, *, step: jax.Array | int = 0, train: bool = True
    ) -> Loss:
        """Mean cross entropy over the labelled examples, in nats, and scalars; see `draw_timesteps`."""
        t_key, noise_key, dropout_key = jax.random.split(key, 3)
        x_t, label = batch["image"], batch["label"]
        t = jnp.zeros(len(x_t), jnp.int32)
        if self.schedule is not None:
            t = process.draw_timesteps(t_key, len(x_t), self.schedule.num_timesteps, train=train)
            x_t = process.q_sample(self.schedule, x_t, t, jax.random.normal(noise_key, x_t.shape))
        logits: Any = self.net.apply(
            {"params": params}, x_t, t, deterministic=not train, rngs={"dropout": dropout_key}
        )
        known = (label >= 0).astype(jnp.float32)
        count = jnp.maximum(known.sum(), 1.0)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(label, 0)[:, None], axis=1)[:, 0]
        loss = -(log_p * known).sum() / count
        right = (logits.argmax(axis=1) == label).astype(jnp.float32)
        return Loss(loss, {"loss": loss, "accuracy": right.sum() / count, "labelled": known.mean()})

    def log_p(self, params: dict, x_t: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
        """log p(label | x_t, t) [B] of pictures x_t [B, S, S, 3] at times t [B], for labels [B]."""
        logits: Any = self.net.apply({"params": params}, x_t, t)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)[:, 0]

    def classify(self, params: dict, image: jax.Array) -> jax.Array:
        """log p(label | image) [B, C] of pictures [B, S, S, 3] in [-1, 1], at t = 0."""
        logits: Any = self.net.apply({"params": params}, image, jnp.zeros(len(image), jnp.int32))
        return jax.nn.log_softmax(logits)

    def score(self, params: dict, image: jax.Array, label: jax.Array) -> jax.Array:
        """log p(label | image) [B] of pictures [B, S, S, 3] in [-1, 1], without noise, for labels [B]."""
        return jnp.take_along_axis(self.classify(params, image), label[:, None], axis=1)[:, 0]


def build(
    *,
    num_classes: int,
    image_size: int = 64,
    channels: int = 128,
    channel_mult: tuple[int, ...] = (1, 2, 3, 4),
    num_res_blocks: int = 4,
    attention_resolutions: tuple[int, ...] = (32, 16, 8),
    head_dim: int = 64,
    dropout: float = 0.0,
    scale_shift: bool = True,
    schedule: str | None = "cosine",
    num_timesteps: int = 1000,
    net: dict | None = None,
    remat: bool | str = "none",
    dtype: str = "float32",
) -> Classifier:
    """The classifier of a config; defaults are ADM's at 64 x 64 (its table 12).

    schedule: of the noise; None: pictures are not noised. net: see `unet.Style`.

    Raises ValueError for settings that cannot go together.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes {num_classes} must be 2 or more: as many as data.classes has names")
    halvings = 2 ** (len(channel_mult) - 1)
    if image_size % halvings:
        raise ValueError(f"image_size {image_size} must be a multiple of {halvings}, for {channel_mult=}")
    width = channels * channel_mult[-1]
    unet = dict(
        out_channels=num_classes,
        channels=channels,
        channel_mult=tuple(channel_mult),
        num_res_blocks=num_res_blocks,
        attention_resolutions=tuple(attention_resolutions),
        head_dim=head_dim,
        dropout=dropout,
        scale_shift=scale_shift,
        remat=remat,
        num_pool_heads=max(1, width // head_dim),
    )
    if net:
        unet["style"] = unet_style(net)
    return Classifier(
        net=ClassifierNet(unet=unet, image_size=image_size, dtype=jnp.dtype(dtype)),
        schedule=None if schedule is None else schedules.make_schedule(schedule, num_timesteps),
        image_size=image_size,
        num_classes=num_classes,
    )
