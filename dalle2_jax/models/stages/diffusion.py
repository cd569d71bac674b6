"""The one stage that draws pictures by diffusion: a denoiser network, a noise process, and conditions.

`decoder` and `upsampler` build it. With x0 the picture, t uniform in 0 .. T-1 and y the conditions, training
minimises the error of the network's prediction at x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps; each
condition is dropped by itself, and classifier-free guidance drops all of them. The small picture of an
upsampler and known pixels are inputs that are never dropped.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.models.diffusion import gaussian, guidance, process
from dalle2_jax.models.nets.denoiser import Conditioning, DenoiserNet
from dalle2_jax.models.stages import Loss, Op, narrow_in_loop
from dalle2_jax.models.stages.building import check_side
from dalle2_jax.models.stages.conditions import (
    Caption,
    ClipImage,
    Label,
    LowRes,
    known_pixels,
    random_mask,
)


@dataclasses.dataclass(frozen=True)
class DiffusionStage:
    """A picture stage's network, noise process, conditions and defaults; parameters go to every call.

    Attributes:
      image_size: side of the pictures. crop_size: side of the training windows, for an upsampler.
      conditions: those with a null, each dropped at a rate of its own. joint_drop: how often training drops
        all of them, besides. low_res: the small picture of an upsampler.
      inpaint: the network also gets the known pixels.
      tile: side of the windows in which to draw; None draws the whole picture at once.
      last_step: whether a second network of the same shape, parameters 'last', takes the last step. Karlo's
        authors trained theirs against a discriminator; training here leaves it as it is.
    """

    ops = {"sample": Op(("image",)), "invert": Op(("x_T",))}
    net: DenoiserNet
    diffusion: gaussian.GaussianDiffusion
    image_size: int
    conditions: tuple[ClipImage | Label | Caption, ...] = ()
    joint_drop: float = 0.0
    low_res: LowRes | None = None
    crop_size: int | None = None
    guidance_scale: float = 1.0
    inpaint: bool = False
    tile: int | None = None
    last_step: bool = False

    def __post_init__(self):
        if self.tile is not None:
            check_side(self.net.body, "tile", self.tile)

    def condition(self, kind: type) -> Any:
        """The condition of that class, or None."""
        return next((condition for condition in self.conditions if isinstance(condition, kind)), None)

    @property
    def embed_dim(self) -> int:
        """Size of CLIP's embeddings; 0: reads none."""
        found = self.condition(ClipImage)
        return found.embed_dim if found else 0

    @property
    def context_length(self) -> int | None:
        """Positions of captions; None: reads none."""
        found = self.condition(Caption)
        return found.context_length if found else None

    @property
    def states_width(self) -> int:
        """Width of the frozen CLIP's text states used as caption input; 0: reads tokens, or no captions."""
        found = self.condition(Caption)
        return found.states_width if found else 0

    @property
    def null_tokens(self) -> int:
        """How many positions the null caption has whose states may be read."""
        found = self.condition(Caption)
        return found.null_tokens if found else 0

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0: reads none."""
        found = self.condition(Label)
        return found.num_classes if found else 0

    @property
    def label_drop(self) -> float:
        """How often training drops the class, at least; 0: the class has no null."""
        found = self.condition(Label)
        return max(found.drop, self.joint_drop) if found else 0.0

    @property
    def low_res_size(self) -> int | None:
        """Side of the small picture of an upsampler."""
        return self.low_res.size if self.low_res else None

    @property
    def conditional(self) -> bool:
        """Whether it draws from anything besides noise."""
        return bool(self.conditions or self.low_res)

    @property
    def guidable(self) -> bool:
        """Whether there is a null for guidance to lead away from."""
        if self.low_res:
            return bool(self.joint_drop) or any(condition.drop for condition in self.conditions)
        return bool(self.embed_dim or self.context_length or self.label_drop)

    @property
    def sampling(self) -> dict:
        """The settings of `sample` and their defaults."""
        own, scale = self.diffusion.settings, dict(guidance_scale=self.guidance_scale)
        if self.low_res:
            names = ("num_steps", "method", "eta", *(("threshold",) if self.guidable else ()))
            found = {name: own[name] for name in names} | {"tile": self.tile}
            return found | scale | guidance.NO_RULES if self.guidable else found
        return dict(num_steps=0) | scale | own | guidance.NO_RULES

    def check(self, settings: dict) -> None:
        """Raise ValueError for settings of `sample` that this stage cannot take."""
        scale = settings.get("guidance_scale", 1)
        if scale != 1 and not self.guidable:
            raise ValueError(
                f"guidance_scale {scale} has no meaning for a stage that was never trained without its "
                "condition: leave it out, or steer with a classifier"
            )
        guidance.check_rules(settings, self.diffusion.schedule)
        names = ("num_steps", "method", "spacing", "threshold")
        self.diffusion.with_settings(**{name: settings.get(name) for name in names}).timesteps()
        if settings.get("tile") is not None:
            check_side(self.net.body, "tile", settings["tile"])

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields that `loss` reads; `sample` reads them without `image` and `crop_yx`."""
        side = self.crop_size or self.image_size
        specs: dict[str, tuple[tuple[int, ...], Any]] = {"image": ((side, side, 3), jnp.float32)}
        if self.low_res:
            specs |= {"low_res": ((self.low_res.size, self.low_res.size, 3), jnp.float32)}
            specs |= {"crop_yx": ((2,), jnp.int32)}
        for condition in self.conditions:
            specs |= condition.specs
        return {
            name: jax.ShapeDtypeStruct((batch_size, *shape), dtype) for name, (shape, dtype) in specs.items()
        }

    def init(self, key: jax.Array, batch: dict) -> dict:
        """Float32 parameters."""
        t = jnp.zeros(batch["image"].shape[0], jnp.int32)
        inputs = {}
        if self.low_res:
            inputs = dict(low_res_up=batch["image"], low_res_t=t if self.low_res.noise else None)
        kept = {condition.name: jnp.zeros(t.shape, bool) for condition in self.conditions}
        params = self.net.init(key, batch["image"], t, self._read(batch, kept), **inputs)["params"]
        if self.diffusion.loss_kind == "vlb":
            params = params | {"stats": process.init_history(self.diffusion.schedule.num_timesteps)}
        return params | {"last": params} if self.last_step else params

    def update(self, params: dict, statistics: dict, key: jax.Array) -> tuple[dict, dict]:
        """(`params` whose history of L_vlb has the terms of a step, no scalars).

        statistics: 't' and 'values' [grad_accum, B] with loss 'vlb', else {}.
        """
        if not statistics:
            return params, {}
        t, values = (statistics[name].reshape(-1) for name in ("t", "values"))
        return params | {"stats": process.observe(params["stats"], t, values)}, {}

    def loss(
        self, params: dict, key: jax.Array, batch: dict, *, step: jax.Array | int = 0, train: bool = True
    ) -> Loss:
        """Mean loss over the batch and its scalars; `image` is the window at `crop_yx` for an upsampler.

        `train=False` keeps conditions, units and small pictures: no dropping, no dropout, no noise in them.
        """
        keys, size = training_keys(key), len(batch["image"])
        drops = {
            condition.name: jax.random.bernoulli(keys[condition.name], condition.drop, (size,)) & train
            for condition in self.conditions
        }
        if self.joint_drop:
            together = jax.random.bernoulli(keys["joint"], self.joint_drop, (size,)) & train
            drops = {name: drop | together for name, drop in drops.items()}
        conditions = self._read(batch, drops)
        inputs: dict[str, jax.Array] = {}
        if self.low_res:
            inputs |= self.low_res.for_training(keys, batch, self.diffusion.schedule, train)
        if self.inpaint:
            mask = random_mask(keys["mask"], size, self.crop_size or self.image_size)
            inputs["known"] = known_pixels(batch["image"], mask)
        trained, *_ = self._networks(params)

        def network(x_t, t):
            return self.net.apply(
                {"params": trained},
                x_t,
                t,
                conditions,
                **inputs,
                deterministic=not train,
                rngs={"dropout": keys["dropout"]},
            )

        losses, metrics, _ = self.diffusion.loss(
            keys["diffusion"], network, batch["image"], train=train, history=params.get("stats")
        )
        statistics = metrics.pop("statistics", {})
        return Loss(losses.mean(), {name: value.mean() for name, value in metrics.items()}, statistics)

    def sample(
        self,
        params: dict,
        keys: jax.Array,
        batch: dict,
        *,
        log_p: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
        strength: float = 1.0,
        resample: int = 1,
        return_path: bool = False,
        **settings,
    ) -> jax.Array:
        """Pictures [B, H, W, 3] in [-1, 1] for what `batch` says (see `batch_spec`), one key a picture.

        low_res [B, h, w, 3] of an upsampler may have any size. Optional fields of the batch: negative_tokens
        and negative_token_mask, a caption that guidance leads away from, in the place of none; x_T and init
        [B, H, W, 3], see `gaussian.Start`; inpaint_image [B, H, W, 3] with inpaint_mask [B, H, W, 1], of
        which the image comes back where the mask is 0.

        log_p(x_t, t) -> [B], of a classifier or a CLIP of noised pictures, steers on top of guidance.
        resample: see `sampling.resampled`. return_path: the picture after every step, [B, n, H, W, 3].

        settings: values in the place of those in `sampling`, None for those; also image_size, the side. A
        guidance scale given as the Python number 1 saves the unconditional half of the work; an array is
        traced. Other guidance_RULE: see `guidance.Guidance`. tile: see `in_tiles`.
        """
        settings = self.sampling | {name: value for name, value in settings.items() if value is not None}
        scale, rules = settings.pop("guidance_scale", 1), guidance.pop_rules(settings)
        side, tile = settings.pop("image_size", self.image_size), settings.pop("tile", None)
        diffusion = self.diffusion.with_settings(**settings)
        shape: tuple[int, ...] = (side, side, 3)
        inputs: dict[str, jax.Array] = {}
        inpaint = None
        if self.low_res:
            inputs |= self.low_res.for_sampling(keys, batch["low_res"], diffusion.schedule)
            shape = inputs["low_res_up"].shape[1:]
        if "inpaint_image" in batch:
            inpaint = batch["inpaint_image"], batch["inpaint_mask"]
            inputs |= {"known": known_pixels(*inpaint)} if self.inpaint else {}
        if tile is not None:
            check_side(self.net.body, "tile", tile)
            tile = None if tile >= max(shape[:2]) else tile
        last_time = diffusion.timesteps()[-1] if self.last_step else None
        conditionings = self._conditionings(params, batch, len(keys))
        network, guide = self._network(params, conditionings, inputs, last_time, tile), None
        if guidance.is_guided(scale):
            null = self._conditionings(params, batch, len(keys), null=True)
            both, both_inputs = guidance.interleave((conditionings, inputs), (null, inputs))
            paired = self._network(params, both, both_inputs, last_time, tile)
            guide = guidance.Guidance(paired, scale, **rules)
        x0 = diffusion.sample(
            diffusion.denoiser(network, guidance=guide, log_p=log_p, inpaint=inpaint),
            keys,
            shape,
            start=gaussian.Start(batch.get("x_T"), batch.get("init"), strength),
            resample=resample,
            return_path=return_path,
        )
        drawn: Any = jnp.moveaxis(x0[1], 0, 1) if return_path else x0
        return jnp.clip(drawn, -1.0, 1.0)

    def invert(self, params: dict, batch: dict, *, num_steps: int | None = None) -> jax.Array:
        """x_T [B, H, W, 3], from which 'ddim' with eta 0, guidance 1, the same conditions and as many steps
        returns to about `image` (section 3 of the paper). Reads what `loss` reads."""
        diffusion = self.diffusion.with_settings(num_steps)
        conditionings = self._conditionings(params, batch, len(batch["image"]))
        return diffusion.invert(self._network(params, conditionings, {}), batch["image"])

    def bits_per_dim(self, params: dict, keys: jax.Array, batch: dict, num_steps: int | None = None) -> dict:
        """The bound on -log2 p(image | conditions) of a decoder, see `GaussianDiffusion.bits_per_dim`."""
        network = self._network(params, self._conditionings(params, batch, len(keys)), {})
        return self.diffusion.bits_per_dim(network, keys, batch["image"], num_steps)

    def _networks(self, params: dict) -> list[dict]:
        """Parameters of the network, and of the one that takes the last step, if it is another."""
        first = {name: value for name, value in params.items() if name != "last"}
        return [first, params["last"]] if self.last_step else [first]

    def _read(self, batch: dict, drops: dict[str, jax.Array], null: bool = False) -> dict:
        """Keywords of `DenoiserNet.condition`; drops: condition's name -> [B] bool."""
        read: dict[str, Any] = {}
        for condition in self.conditions:
            read |= condition.read(batch, drops[condition.name], null)
        return read

    def _conditionings(self, params: dict, batch: dict, count: int, null: bool = False) -> list[Conditioning]:
        """The embedded conditions of `count` examples, by each of `_networks`; `null` drops all of them, or
        puts a negative caption in the caption's place."""
        if not self.conditions:
            return [Conditioning() for _ in self._networks(params)]
        drops = {condition.name: jnp.full(count, null) for condition in self.conditions}
        read = self._read(batch, drops, null)
        embed: Any = functools.partial(self.net.apply, **read, method="condition")
        return [embed({"params": own}) for own in self._networks(params)]

    def _network(
        self,
        params: dict,
        conditionings: list[Conditioning],
        inputs: dict[str, jax.Array],
        last_time: int | None = None,
        tile: int | None = None,
    ) -> process.Network:
        """The network of a sampler; inputs: keywords of `DenoiserNet.denoise`. last_time: when the second
        network, if there is one, takes over; None: never."""

        def network(x_t, t, inputs):
            def apply(own, conditioning):
                own, x = narrow_in_loop(own, x_t)
                return self.net.apply({"params": own}, x, t, conditioning, **inputs, method="denoise")

            first, *last = (
                lambda own=own, conditioning=conditioning: apply(own, conditioning)
                for own, conditioning in zip(self._networks(params), conditionings, strict=True)
            )
            return first() if last_time is None else jax.lax.cond(t[0] == last_time, *last, first)

        if tile is None:
            return lambda x_t, t: network(x_t, t, inputs)
        pictures = {name: inputs[name] for name in ("low_res_up", "known") if name in inputs}

        def tiled(x_t, t):
            def window(parts):
                x_t, *others = parts
                return network(x_t, t, inputs | dict(zip(pictures, others, strict=True)))

            return in_tiles(window, (x_t, *pictures.values()), tile)

        return tiled


def training_keys(key: jax.Array) -> dict[str, jax.Array]:
    """The keys of everything that a training step draws, by name."""
    names = ("diffusion", "image", "caption", "dropout")
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    # Beside the split, so that a key that is added here changes none of the others.
    return keys | {
        name: jax.random.fold_in(key, i)
        for i, name in enumerate(("mask", "label", "level", "noise", "joint"))
    }


def in_tiles(function, pictures: tuple[jax.Array, ...], tile: int) -> jax.Array:
    """function(windows) [B, t, t, C] of `pictures` [B, H, W, *], blended to [B, H, W, C]; one tile at a time.

    Windows have side `tile` (or the picture's, if that is less) and overlap by at least a quarter, over which
    their weights rise from the border: a window knows least of what lies there.
    """
    height, width = pictures[0].shape[1:3]

    def starts(length):
        side = min(tile, length)
        count = 1 if length == side else -(-(length - side) // (side - side // 4)) + 1
        return side, np.rint(np.linspace(0, length - side, count)).astype(np.int32)

    (rows, tops), (columns, lefts) = starts(height), starts(width)

    def ramp(side):
        from_border = np.minimum(np.arange(side) + 1, side - np.arange(side))
        return np.minimum(from_border / max(1, side // 4), 1.0)

    weight = jnp.asarray(ramp(rows)[:, None] * ramp(columns), jnp.float32)[None, :, :, None]
    corners = jnp.asarray([(top, left) for top in tops for left in lefts])

    def window(picture, corner):
        sizes = (picture.shape[0], rows, columns, picture.shape[3])
        return jax.lax.dynamic_slice(picture, (0, corner[0], corner[1], 0), sizes)

    def add(sums, corner):
        drawn = function(tuple(window(picture, corner) for picture in pictures)).astype(jnp.float32)
        parts = (weight * drawn, jnp.broadcast_to(weight, (1, rows, columns, 1)))
        at = (0, corner[0], corner[1], 0)
        return tuple(
            jax.lax.dynamic_update_slice(total, window(total, corner) + part, at)
            for total, part in zip(sums, parts, strict=True)
        ), None

    spec = jax.eval_shape(lambda: function(tuple(window(picture, corners[0]) for picture in pictures)))
    zeros = jnp.zeros((spec.shape[0], height, width, spec.shape[3]), jnp.float32)
    (total, weights), _ = jax.lax.scan(add, (zeros, jnp.zeros((1, height, width, 1))), corners)
    return total / weights
