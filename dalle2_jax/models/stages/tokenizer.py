"""A discrete autoencoder: pictures as codes of a book, and back (VQ-VAE, VQ-VAE-2, DALL-E 1's dVAE, VQGAN).

    z = encoder(x),   q = quantizer(z),   x^ = decoder(q),      loss = -log p(x | x^) + the quantizer's

Codes are a tuple of int32 [B, h, w], one map a level, the top (coarsest) first. A batch's field `codes` has
all of them in one row, level after level. See `tokens.quantize`, `reconstruction` and `adversarial` for the
parts of the loss. The likelihood is a mean over the values of a picture.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.models.nets.dvae import DVAENet
from dalle2_jax.models.nets.vqgan import Sizes, VQGANNet
from dalle2_jax.models.nets.vqvae import VQVAENet
from dalle2_jax.models.stages import Loss, Op, adversarial, check_settings, reconstruction
from dalle2_jax.models.stages.adversarial import Adversarial
from dalle2_jax.models.stages.reconstruction import Likelihood, psnr
from dalle2_jax.models.tokens import quantize


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The networks and settings; parameters go to every call.

    Attributes:
      net: with `features`, `project` and `decode`, see `nets.vqvae`.
      quantizers: of the levels, top first: classes of `tokens.quantize`.
      strides: pixels a code of each level, top first.
      adversarial: None: no discriminator and no loss on features.
      decode_only: it has no encoder; what needs one raises ValueError.
    """

    net: Any
    quantizers: tuple[Any, ...]
    strides: tuple[int, ...]
    image_size: int
    likelihood: Likelihood
    adversarial: Adversarial | None = None
    decode_only: bool = False
    ops = {
        "encode_sequence": Op(("codes",), ("image",)),
        "decode_sequence": Op(("image",), ("codes",)),
        "reconstruct": Op(("image",), ("image",)),
    }
    stored_dtype = "float32"  # of a model directory: rounding changes codes
    other_loss_in_training = True  # which `models.flops` counts

    @property
    def uses(self) -> tuple[str, ...]:
        """The frozen stages that `loss` calls."""
        return ("features",) if self.adversarial and self.adversarial.features == "lpips" else ()

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each level's map, top first."""
        return tuple((self.image_size // stride,) * 2 for stride in self.strides)

    @property
    def num_codes(self) -> tuple[int, ...]:
        """Size of each level's book, top first."""
        return tuple(quantizer.num_codes for quantizer in self.quantizers)

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields that `loss` reads."""
        side = self.image_size
        return {"image": jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.float32)}

    @property
    def encoded_specs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of one example's codes, of all levels in one row."""
        count = sum(height * width for height, width in self.grids)
        return {"codes": jax.ShapeDtypeStruct((1, count), jnp.int32)}

    def check_encodes(self) -> None:
        """Raise ValueError for a tokenizer without an encoder."""
        if self.decode_only:
            raise ValueError(
                "this tokenizer has no encoder (model.decode_only): it makes pictures of codes, and no codes "
                "of pictures. Take a tokenizer with both halves"
            )

    def init(self, key: jax.Array, batch: dict) -> dict:
        """Float32 parameters: 'net', 'book_L' of a level with trained vectors, 'discriminator', 'stats'."""
        made = self._init_decoder(key) if self.decode_only else self.net.init(key, batch["image"])
        params: dict = {"net": made["params"], "stats": {}}
        for level, quantizer in enumerate(self.quantizers):
            trained, stats = quantizer.init(jax.random.fold_in(key, level))
            params |= {f"book_{level}": trained} if trained else {}
            params["stats"] |= {f"{name}_{level}": x for name, x in stats.items()}
        if self.adversarial:
            params["discriminator"] = self.adversarial.init(
                jax.random.fold_in(key, len(self.quantizers)), batch["image"]
            )
        return params

    def _init_decoder(self, key: jax.Array) -> dict:
        pairs = zip(self.grids, self.quantizers, strict=True)
        vectors = [jnp.zeros((1, *grid, quantizer.out_width)) for grid, quantizer in pairs]
        return self.net.init(key, vectors, method="decode")

    def _state(self, params: dict, level: int) -> dict:
        """The quantizer's arrays of a level, without the level in their names."""
        end = f"_{level}"
        stats = {name.removesuffix(end): x for name, x in params["stats"].items() if name.endswith(end)}
        return stats | params.get(f"book_{level}", {})

    def _net(self, params: dict, method: str, *args):
        return self.net.apply({"params": params["net"]}, *args, method=method)

    def _levels(self, params: dict, image: jax.Array, quantized_of: Callable) -> list[tuple[jax.Array, Any]]:
        """[(z_q, found)] of quantized_of(quantizer, state, z, level), top first.

        What is quantized at a level depends on the levels above it.
        """
        self.check_encodes()
        features = self._net(params, "features", image)
        made: list[tuple[jax.Array, Any]] = []
        for level, quantizer in enumerate(self.quantizers):
            z = self._net(params, "project", level, features, [z_q for z_q, _ in made])
            made.append(quantized_of(quantizer, self._state(params, level), z, level))
        return made

    def loss(
        self,
        params: dict,
        key: jax.Array,
        batch: dict,
        *,
        step: jax.Array | int = 0,
        train: bool = True,
        frozen: Mapping | None = None,
    ) -> Loss:
        """The likelihood and the losses beside it. train=False: with hard codes, as they are stored."""
        x = batch["image"]

        def quantized_of(quantizer, state, z, level):
            made = quantizer.quantize(state, z, jax.random.fold_in(key, level), step, train)
            return made.z_q, made

        levels = self._levels(params, x, quantized_of)
        vectors = [z_q for z_q, _ in levels]
        maps = self._net(params, "decode", vectors)
        recon = self.likelihood.nll(maps, x).mean()
        value, scalars, statistics = recon, {"recon": recon}, {}
        if self.adversarial and train:
            value, found = self._adversarial(self.adversarial, params, x, vectors, step, frozen)
            scalars |= found
        scalars["psnr"] = psnr(self.likelihood.picture(maps), x).mean()
        for level, (_, made) in enumerate(levels):
            value = value + made.loss
            statistics[str(level)] = jax.lax.stop_gradient(made.statistics)
            even = quantize.perplexity(made.statistics["counts"])
            scalars |= self._named(made.scalars | {"perplexity": even}, level)
        if not train and any(quantizer.relaxed for quantizer in self.quantizers):
            # what hard codes cost: the loss with them less that of the relaxed draw
            soft = self.loss(params, key, batch, step=step).value
            scalars["hard_gap"] = value - soft
        return Loss(value, scalars | {"loss": value}, statistics)

    def _adversarial(self, losses: Adversarial, params: dict, x: jax.Array, vectors: list, step, frozen):
        """`Adversarial.loss` of the pictures decoded from vectors."""
        features, net = self._net(params, "last_features", vectors), params["net"]

        def maps_of(kernel: jax.Array) -> jax.Array:
            whole = {"net": net | {"decoder_out": net["decoder_out"] | {"kernel": kernel}}}
            return self._net(whole, "last", features)

        distance = (
            functools.partial(frozen["features"].stage.distance, frozen["features"].params)
            if frozen
            else None
        )
        last = maps_of, net["decoder_out"]["kernel"]
        nll = lambda maps: self.likelihood.nll(maps, x).mean()  # noqa: E731
        return losses.loss(params["discriminator"], x, last, nll, step, distance)

    def _named(self, scalars: Mapping, level: int) -> dict:
        """Scalars of a level, with its number where there are several."""
        end = f"_{level}" if len(self.quantizers) > 1 else ""
        return {f"{name}{end}": value for name, value in scalars.items()}

    def update(self, params: dict, statistics: dict, key: jax.Array) -> tuple[dict, dict]:
        """The books and the use of their codes, over the whole batch: `usage`, `perplexity`, `restarts`."""
        stats: dict = {}
        scalars: dict = {}
        for level, quantizer in enumerate(self.quantizers):
            state, added = self._state(params, level), statistics[str(level)]
            new, found = quantizer.update(state, added, jax.random.fold_in(key, level))
            stats |= {f"{name}_{level}": x for name, x in new.items()}
            scalars |= self._named(found, level)
        return params | {"stats": stats}, scalars

    def advice(self, scalars: Mapping[str, float]) -> str:
        """What to change where a step's scalars show a collapsed book; '' where they do not.

        A book has collapsed if less than a quarter of it was used over the window, or if some code was not
        and the perplexity is below a tenth of the book.
        """
        for level, quantizer in enumerate(self.quantizers):
            usage, spread = self._named({"usage": 0, "perplexity": 0}, level)
            used, even = scalars.get(usage, 1.0), scalars.get(spread, math.inf)
            if used < 0.25 or (used < 1 and even < quantizer.num_codes / 10):
                return (
                    f"the code book collapses: {usage} {used:.3f} of {quantizer.num_codes} codes over the "
                    f"last {quantize.WINDOW}, {spread} {even:.1f}; {quantizer.advice}"
                )
        return ""

    def encode(self, params: dict, images: jax.Array) -> tuple[jax.Array, ...]:
        """[B, H, W, 3] in [-1, 1] -> codes, int32 [B, h, w] of each level, top first."""

        def quantized_of(quantizer, state, z, level):
            codes = quantizer.encode(state, z)
            return quantizer.lookup(state, codes), codes

        return tuple(codes for _, codes in self._levels(params, images, quantized_of))

    def decode_codes(self, params: dict, codes: tuple[jax.Array, ...]) -> jax.Array:
        """Codes, int32 [B, h, w] of each level, top first -> [B, H, W, 3] in [-1, 1]."""
        vectors = [
            quantizer.lookup(self._state(params, level), codes[level])
            for level, quantizer in enumerate(self.quantizers)
        ]
        return self.likelihood.picture(self._net(params, "decode", vectors))

    def encode_sequence(self, params: dict, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] in [-1, 1] -> codes int32 [B, N] of all levels, row by row, top first."""
        codes = self.encode(params, images)
        return jnp.concatenate([level.reshape(len(images), -1) for level in codes], axis=1)

    def decode_sequence(self, params: dict, codes: jax.Array) -> jax.Array:
        """Codes int32 [B, N] of `encode_sequence` -> [B, H, W, 3] in [-1, 1]."""
        return self.decode_codes(params, self.split(codes))

    def split(self, codes: jax.Array) -> tuple[jax.Array, ...]:
        """Codes [B, N] -> [B, h, w] of each level, top first."""
        found, start = [], 0
        for height, width in self.grids:
            part = codes[:, start : start + height * width]
            found.append(part.reshape(-1, height, width))
            start += height * width
        return tuple(found)

    def reconstruct(self, params: dict, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] in [-1, 1] -> the pictures of their codes."""
        return self.decode_codes(params, self.encode(params, images))


# kind -> (class, required settings, optional ones)
QUANTIZERS: dict[str, tuple] = {
    "vq": (quantize.VQ, ("num_codes",), ("width", "beta", "decay", "restart")),
    "gumbel": (quantize.Gumbel, ("num_codes",), ("width", "tau", "beta", "bias")),
    "fsq": (quantize.FSQ, ("levels",), ()),
}
NETS: dict[str, tuple] = {
    "vqvae": (VQVAENet, ("channels", "residual_channels", "num_res_blocks", "strides"), ("halved",)),
    "dvae": (DVAENet, ("channels",), ("num_groups", "num_blocks")),
    "vqgan": (VQGANNet, ("channels",), tuple(name for name in Sizes._fields[2:])),
}


def build(
    *,
    image_size: int,
    net: dict,
    quantizer: dict,
    likelihood: str = "mse",
    data_variance: float = 1.0,
    min_scale: float = 0.0,
    adversarial: dict | None = None,
    decode_only: bool = False,
    dtype: str = "float32",
) -> Tokenizer:
    """The tokenizer of a config.

    Args:
      image_size: a multiple of the pixels of a code.
      net: kind, 'vqvae', 'dvae' or 'vqgan', and settings of that class in `nets`; `strides` of 'vqvae' are
        those of the levels, the bottom's first.
      quantizer: of every level: kind, 'vq', 'gumbel' or 'fsq', and settings of that class in
        `tokens.quantize`.
      likelihood, data_variance, min_scale: see `reconstruction.Likelihood`.
      adversarial: see `adversarial.build`; for 'vqgan' alone.
      decode_only: without an encoder, as some weights are published; it cannot be trained.

    Raises ValueError for settings that cannot go together.
    """
    if likelihood not in reconstruction.KINDS:
        raise ValueError(f"likelihood {likelihood!r} is unknown; choose one of {reconstruction.KINDS}")
    body, settings = _chosen(net, NETS, "net")
    if adversarial is not None and (body is not VQGANNet or decode_only):
        raise ValueError("model.adversarial needs net.kind='vqgan' with an encoder")
    strides = _strides(net["kind"], settings)
    if image_size % strides[0]:
        raise ValueError(f"image_size {image_size} must be a multiple of {strides[0]}, the pixels of a code")
    quantizers = tuple(_quantizer(quantizer, stride) for stride in strides)
    scored = Likelihood(likelihood, data_variance, min_scale)
    if body is VQGANNet:
        settings = dict(sizes=Sizes(image_size, **settings))
    network = body(
        **settings,
        in_width=quantizers[0].in_width,
        out_width=quantizers[0].out_width,
        out_channels=scored.channels,
        dtype=jnp.dtype(dtype),
    )
    losses = None if adversarial is None else _adversarial(adversarial)
    return Tokenizer(network, quantizers, strides, image_size, scored, losses, decode_only)


_adversarial = adversarial.build


def _chosen(settings: Mapping, kinds: Mapping[str, tuple], what: str) -> tuple[type, dict]:
    """(the class of settings.kind, its settings); ValueError for settings that it lacks or does not have."""
    kind = settings.get("kind", "")
    if kind not in kinds:
        raise ValueError(f"{what}.kind {kind!r} is unknown; choose one of {', '.join(kinds)}")
    made, required, optional = kinds[kind]
    check_settings(settings, ("kind", *required), optional, what)
    return made, {name: value for name, value in settings.items() if name != "kind"}


def _strides(kind: str, settings: Mapping) -> tuple[int, ...]:
    """Pixels a code of each level, top first; ValueError for halvings that are none."""
    if kind == "dvae":
        return (2 ** (settings.get("num_groups", 4) - 1),)
    if kind == "vqgan":
        return (2 ** (len(settings.get("channel_mult", Sizes._field_defaults["channel_mult"])) - 1),)
    strides = settings["strides"]
    if (
        not strides
        or any(stride < 2 or stride & (stride - 1) for stride in strides)
        or set(strides[1:]) - {2}
    ):
        raise ValueError(f"net.strides {strides} must be powers of two, those above the first level 2")
    return tuple(math.prod(strides[: i + 1]) for i in range(len(strides)))[::-1]


def _quantizer(settings: Mapping, stride: int) -> Any:
    """The quantizer of a level; ValueError for settings that are wrong."""
    made, settings = _chosen(settings, QUANTIZERS, "quantizer")
    if made is quantize.FSQ:
        if not settings["levels"] or min(settings["levels"]) < 2:
            raise ValueError(f"quantizer.levels {settings['levels']} must be 2 or more for each channel")
        settings["num_codes"] = math.prod(settings["levels"])
    elif made is quantize.Gumbel:
        settings["values_per_code"] = 3.0 * stride**2
    elif settings.get("restart") and not settings.get("decay", 0.99):
        raise ValueError(
            "quantizer.restart needs a book of moving averages: set quantizer.decay, such as 0.99"
        )
    if settings["num_codes"] < 2:
        raise ValueError(f"quantizer.num_codes {settings['num_codes']} must be 2 or more")
    return made(**settings)
