"""PixelSNAIL priors of a tokenizer's codes, one a level, the top first (VQ-VAE-2, arXiv 1906.00446).

    p(codes | class) = p(top | class) p(bottom | top, class),     each by codes in raster order
    loss = cross entropy of a code, the mean over all levels, in nats

The top has attention, the levels below it have none and read the level above. The levels have a network each
and share nothing, so that training them together is training each alone. Drawing a code evaluates the whole
map: there is no cache.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.models.diffusion.guidance import interleave
from dalle2_jax.models.nets.pixelsnail import PixelSnail
from dalle2_jax.models.stages import Loss, check_settings, code_sampling, narrow_in_loop
from dalle2_jax.models.stages.code_sampling import CodeModel
from dalle2_jax.models.tokens.decode import Options, decode

SETTINGS = code_sampling.SETTINGS
NET = ("width", "hidden", "num_blocks", "num_res_blocks")
NET_OPTIONAL = ("num_heads", "kernel", "attention", "out_blocks", "upper_blocks", "dropout")


@dataclasses.dataclass(frozen=True)
class PixelSnailPrior(CodeModel):
    """The networks of the levels and sampling defaults; parameters {'level0': ..., 'level1': ...} go to every
    call."""

    nets: tuple[PixelSnail, ...]
    num_classes: int = 0
    label_drop: float = 0.0

    context_length = None  # it reads no captions

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields that `loss` reads; `sample` reads the same without codes."""
        count = sum(h * w for h, w in self.grids)
        spec = {"label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)} if self.num_classes else {}
        return spec | {"codes": jax.ShapeDtypeStruct((batch_size, count), jnp.int32)}

    def _split(self, codes: jax.Array) -> list[jax.Array]:
        """codes [B, N] -> [B, h, w] of each level."""
        return code_sampling.maps(codes, self.grids)

    def _logits(self, params: dict, level: int, codes, upper, label, **how) -> Any:
        """Logits [B, h, w, V] of a level's codes [B, h, w]; upper: the level above; label: -1 for none."""
        if label is not None:
            label = jnp.where(label < 0, self.num_classes, label)
        return self.nets[level].apply({"params": params[f"level{level}"]}, codes, upper, label, **how)

    def init(self, key: jax.Array, batch: dict) -> dict:
        """Float32 parameters."""
        maps, label = self._split(batch["codes"]), batch.get("label")
        pairs = zip(self.nets, maps, [None, *maps[:-1]], strict=True)
        return {
            f"level{i}": net.init(jax.random.fold_in(key, i), codes, upper, label)["params"]
            for i, (net, codes, upper) in enumerate(pairs)
        }

    def loss(
        self, params: dict, key: jax.Array, batch: dict, *, step: jax.Array | int = 0, train: bool = True
    ) -> Loss:
        """Mean cross entropy of a code in nats, and scalars; `train=False` drops nothing."""
        maps, label = self._split(batch["codes"]), batch.get("label")
        drop_key, dropout_key = jax.random.split(key)
        if label is not None:
            label = jnp.where(jax.random.bernoulli(drop_key, self.label_drop, label.shape) & train, -1, label)
        found, right = [], []
        for level, (codes, upper) in enumerate(zip(maps, [None, *maps[:-1]], strict=True)):
            rngs = {"dropout": jax.random.fold_in(dropout_key, level)}
            logits = self._logits(params, level, codes, upper, label, deterministic=not train, rngs=rngs)
            found.append(code_sampling.cross_entropy(logits, codes).reshape(len(codes), -1))
            right.append((logits.argmax(axis=-1) == codes).reshape(len(codes), -1))
        value = jnp.concatenate(found, axis=1).mean()
        scalars = {"loss": value, "accuracy": jnp.concatenate(right, axis=1).mean()}
        if len(found) > 1:
            scalars |= {f"level{level}_loss": x.mean() for level, x in enumerate(found)}
        return Loss(value, scalars)

    def _decode(self, params: dict, keys: jax.Array, batch: dict, options: Options) -> jax.Array:
        label, size = batch.get("label"), len(keys)
        guided = options.guidance_scale is not None
        if guided:
            label = interleave(label, jnp.full(size, -1))
        given: list[Any] = [None] * len(self.grids)
        if options.forced is not None:
            given = [x.reshape(size, -1) for x in self._split(options.forced)]
        drawn: list[jax.Array] = []
        upper = None
        for level, (h, w) in enumerate(self.grids):

            def step(x, k, codes, level=level, upper=upper, h=h, w=w):
                # x is code k - 1; before the first one it is written behind the last, and written over later
                codes = jax.lax.dynamic_update_slice_in_dim(codes, x[:, None], (k - 1) % (h * w), axis=1)
                own, codes = narrow_in_loop(params, codes)
                logits = self._logits(own, level, codes.reshape(-1, h, w), upper, label)
                logits = logits.reshape(len(codes), h * w, -1)
                return jax.lax.dynamic_index_in_dim(logits, k, axis=1, keepdims=False), codes

            of_level = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, level)
            blank = jnp.zeros((size * (1 + guided), h * w), jnp.int32)
            how = options._replace(forced=given[level])
            codes = decode(step, lambda x: x, blank[:, 0], blank, of_level, h * w, how)
            drawn.append(codes)
            upper = jnp.repeat(codes, 1 + guided, axis=0).reshape(-1, h, w)
        return jnp.concatenate(drawn, axis=1)


def build(
    *,
    grids: tuple[tuple[int, int], ...],
    num_codes: tuple[int, ...],
    nets: tuple[dict, ...],
    num_classes: int = 0,
    label_drop: float = 0.0,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    dtype: str = "float32",
) -> PixelSnailPrior:
    """The PixelSNAIL priors of a config.

    Args:
      grids: (h, w) of each level of the tokenizer's codes, the top first, each dividing the next.
      num_codes: entries of each level's code book.
      nets: a dict a level: width, hidden, num_blocks, num_res_blocks, and num_heads, kernel, attention,
        out_blocks, upper_blocks, dropout; see `nets.pixelsnail.PixelSnail`.
      num_classes: of labels; 0: it reads none. label_drop: how often the class is dropped in training.
      guidance_scale, temperature, top_k, top_p: defaults of sampling; top_k 0 and top_p 1 leave all codes.
      dtype: compute type of the networks.

    Raises:
      ValueError: for settings that are unknown, missing or do not go together.
    """
    if not len(grids) == len(num_codes) == len(nets) or not grids:
        raise ValueError(f"{grids=}, {num_codes=} and nets must have a value for each level of codes")
    for upper, grid in zip(grids, grids[1:], strict=False):
        if any(side % above for side, above in zip(grid, upper, strict=True)):
            raise ValueError(f"the grid {grid} must be a multiple of the one above it, {upper}")
    if not 0 <= label_drop < 1:
        raise ValueError(f"{label_drop=} must be in [0, 1)")
    common = code_sampling.common(grids, num_codes, guidance_scale, temperature, top_k, top_p)
    found = []
    for level, net in enumerate(nets):
        check_settings(net, NET, NET_OPTIONAL, f"nets[{level}]")
        if net.get("kernel", 5) < 3 or net.get("kernel", 5) % 2 == 0:
            raise ValueError(f"nets[{level}].kernel {net['kernel']} must be odd, 3 or more")
        if (net["width"] // 2) % net.get("num_heads", 8):
            raise ValueError(f"nets[{level}].num_heads must divide half of its width {net['width']}")
        sizes = dict(num_codes=num_codes[level], num_upper=num_codes[level - 1] if level else 0)
        how: dict[str, Any] = dict(sizes, num_classes=num_classes, attention=level == 0) | net
        found.append(PixelSnail(**how, dtype=jnp.dtype(dtype)))
    return PixelSnailPrior(tuple(found), num_classes, label_drop, **common)
