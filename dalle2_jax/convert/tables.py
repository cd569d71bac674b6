"""The engine of the formats: a table maps our parameters to their tensors, in both directions.

A row is one of our leaves, the tensors that it consists of, and their layout. `imported` reads a table from
theirs to ours, `exported` from ours to theirs; both are exact, since a layout only moves numbers. Names and
shapes of all tensors are compared before anything is read.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from dalle2_jax.convert.tensors import Tensors
from dalle2_jax.runtime import modeldir

Arrays = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How `count` tensors of theirs hold a leaf of ours. split: (leaf, count) -> theirs. join: inverse."""

    split: Callable[[np.ndarray, int], Arrays]
    join: Callable[[Arrays], np.ndarray]


# The same array: biases, gains, tables, class tokens.
SAME = Layout(lambda x, n: np.split(x, n, axis=-1) if x.ndim else [x], lambda xs: _concatenate(xs, -1))
# Dense kernels [in, out] as weights [out, in]; several weights are concatenated along the outputs.
DENSE = Layout(lambda x, n: np.split(x.T, n, axis=0), lambda xs: _concatenate(xs, 0).T)
# Convolutions [kh, kw, in, out] as [out, in, kh, kw].
CONV = Layout(lambda x, n: [x.transpose(3, 2, 0, 1)], lambda xs: xs[0].transpose(2, 3, 1, 0))
# The same array with a leading axis of length 1.
LEADING = Layout(lambda x, n: [x[None]], lambda xs: xs[0][0])


def entry_major(count: int) -> Layout:
    """A Dense with an output of [count, entries], as a weight with an output of [entries, count]."""

    def turned(x, rows):
        return np.swapaxes(x.reshape(rows, -1, *x.shape[1:]), 0, 1).reshape(x.shape)

    return Layout(lambda x, n: [turned(x.T, count)], lambda xs: turned(xs[0], len(xs[0]) // count).T)


# A convolution of width 1 over a sequence, [out, in, 1], instead of a Dense.
POINTWISE = Layout(lambda x, n: [x.T[..., None]], lambda xs: xs[0][..., 0].T)


def per_head(parts: int, head_dim: int, pointwise: bool = False) -> tuple[Layout, Layout]:
    """(kernel, bias) layouts of a Dense with an output of `parts` blocks (q | k | v), as a weight with rows
    ordered by head, then by part (OpenAI's old order). pointwise: the weight is a convolution of width 1."""

    def regrouped(x, before, after):
        """Rows [before, after, head_dim, ...] as [after, before, head_dim, ...]."""
        return np.swapaxes(x.reshape(before, after, head_dim, *x.shape[1:]), 0, 1).reshape(x.shape)

    def heads(x):
        return len(x) // (parts * head_dim)

    def split(x, n):
        return [regrouped(x, parts, heads(x))]

    def join(xs):
        return regrouped(xs[0], heads(xs[0]), parts)

    def split_kernel(x, n):
        return [split(x.T, n)[0][..., None]] if pointwise else split(x.T, n)

    def join_kernel(xs):
        return join([xs[0][..., 0]] if pointwise else xs).T

    return Layout(split_kernel, join_kernel), Layout(split, join)


def _concatenate(arrays: Arrays, axis: int) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)


@dataclasses.dataclass(frozen=True)
class Row:
    """Our leaf ('text/norm_out/scale'), their tensors, and their layout."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = SAME


def leaf(ours: str, theirs: str, layout: Layout = SAME) -> list[Row]:
    """One leaf of one tensor."""
    return [Row(ours, (theirs,), layout)]


def norm(ours: str, theirs: str) -> list[Row]:
    """A layer or group norm."""
    return [Row(f"{ours}/scale", (f"{theirs}.weight",)), Row(f"{ours}/bias", (f"{theirs}.bias",))]


def dense(
    ours: str,
    *theirs: str,
    layout: Layout | None = None,
    bias_layout: Layout | None = None,
    bias: bool = True,
) -> list[Row]:
    """A Dense of one layer of theirs, or of several concatenated; default layouts are DENSE and SAME."""
    # torch's fused attention has in_proj_weight and in_proj_bias, other layers layer.weight and layer.bias
    named = [name if name.endswith("_") else f"{name}." for name in theirs]
    rows = [Row(f"{ours}/kernel", tuple(f"{name}weight" for name in named), layout or DENSE)]
    return rows + [Row(f"{ours}/bias", tuple(f"{name}bias" for name in named), bias_layout or SAME)] * bias


def conv(ours: str, theirs: str, bias: bool = True) -> list[Row]:
    """A convolution."""
    return [Row(f"{ours}/kernel", (f"{theirs}.weight",), CONV)] + [
        Row(f"{ours}/bias", (f"{theirs}.bias",))
    ] * bias


def under(prefix: str, rows: Iterable[Row]) -> list[Row]:
    """The rows with our names below `prefix`."""
    return [dataclasses.replace(row, ours=f"{prefix}/{row.ours}") for row in rows]


@dataclasses.dataclass(frozen=True)
class BlockNames:
    """A format's names for the parts of a pre-LN transformer block."""

    norm1: str
    norm2: str
    qkv: tuple[str, ...]
    out: str
    fc1: str
    fc2: str

    def rows(
        self, ours: str, theirs: str, depth: int, qkv: tuple[Layout | None, Layout | None] = (None, None)
    ) -> list[Row]:
        """The rows of `depth` blocks; `theirs` has {} in the place of the block's number.

        qkv: layouts of kernel and bias of queries, keys and values; default: three blocks.
        """
        rows = []
        for number in range(depth):
            a, b = f"{ours}/block_{number}", theirs.format(number)
            rows += norm(f"{a}/norm1", f"{b}.{self.norm1}") + norm(f"{a}/norm2", f"{b}.{self.norm2}")
            names = (f"{b}.{name}" for name in self.qkv)
            rows += dense(f"{a}/attn/qkv", *names, layout=qkv[0], bias_layout=qkv[1])
            rows += dense(f"{a}/attn/out", f"{b}.{self.out}")
            rows += dense(f"{a}/mlp/fc1", f"{b}.{self.fc1}") + dense(f"{a}/mlp/fc2", f"{b}.{self.fc2}")
        return rows


class Lazy:
    """An array with known shape and dtype, computed when numpy reads it."""

    def __init__(self, shape: tuple[int, ...], make: Callable[[], np.ndarray], dtype=np.float32):
        self.shape, self.dtype, self.ndim = tuple(shape), np.dtype(dtype), len(shape)
        self._make = make

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = np.asarray(self._make(), self.dtype)
        if array.shape != self.shape:
            raise ValueError(f"an array was to have shape {self.shape}, it has {array.shape}")
        return array if dtype is None else array.astype(dtype)


def expected_shapes(table: Iterable[Row], abstract: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of their tensors for parameters of ours with the shapes of `abstract`."""
    shapes = {name: tuple(leaf.shape) for name, leaf in modeldir.flatten(abstract).items()}
    return {
        name: shape
        for row in table
        for name, shape in zip(row.theirs, _theirs_shapes(row, shapes[row.ours]), strict=True)
    }


def _theirs_shapes(row: Row, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of a row's tensors, found by splitting an array without memory."""
    empty = np.broadcast_to(np.float32(0), shape)
    return [part.shape for part in row.layout.split(empty, len(row.theirs))]


def imported(
    table: Iterable[Row],
    tensors: Tensors,
    abstract: Any,
    *,
    leaves: Mapping[str, Any] | None = None,
    ignored: str = r"(?!)",
) -> dict:
    """Parameters with the leaves of `abstract`; a leaf is read from `tensors` when it is used.

    Args:
      table: rows for all leaves except those of `leaves`.
      tensors: theirs.
      abstract: shapes of our parameters.
      leaves: leaves of another origin, by name.
      ignored: pattern of full names of tensors that are not parameters, such as counters.

    Raises:
      ValueError: lists missing, surplus and misshapen tensors with the expected shapes.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in modeldir.flatten(abstract).items()}
    leaves = dict(leaves or {})
    rows = {row.ours: row for row in table}
    unknown = sorted(shapes.keys() ^ (rows.keys() | leaves.keys()))
    if unknown:
        raise ValueError(
            f"the table and the model differ in {', '.join(unknown[:10])}: a mistake in the format"
        )
    expected = expected_shapes(rows.values(), abstract)
    found = {name: shape for name, shape in tensors.shapes.items() if not re.fullmatch(ignored, name)}
    # A scalar of ours may be a vector of length 1, such as OpenCLIP's logit_scale.
    found |= {name: () for name, shape in expected.items() if shape == () and found.get(name) == (1,)}
    complaints = modeldir.differences(found, expected)
    if complaints:
        raise ValueError(
            f"{tensors.source} does not have the tensors that its settings promise:\n" + "\n".join(complaints)
        )

    def lazy(row: Row) -> Lazy:
        shape = shapes[row.ours]

        def make():
            made = row.layout.join([tensors[name] for name in row.theirs])
            return made.reshape(()) if shape == () and made.shape == (1,) else made

        return Lazy(shape, make)

    return modeldir.unflatten({name: leaves[name] if name in leaves else lazy(rows[name]) for name in shapes})


def exported(table: Iterable[Row], params: Any, *, dropped: Iterable[str] = ()) -> dict[str, Lazy]:
    """Their tensors from our parameters; the exact inverse of `imported`.

    dropped: names of our leaves that their format does not hold. Raises ValueError for another such leaf.
    """
    flat = modeldir.flatten(params)
    rows = list(table)
    homeless = sorted(flat.keys() - {row.ours for row in rows} - set(dropped))
    if homeless:
        raise ValueError(f"there is no place in this format for {', '.join(homeless[:10])}")
    return dict(_exported(rows, flat))


def _exported(rows: list[Row], flat: Mapping[str, Any]) -> Iterator[tuple[str, Lazy]]:
    for row in rows:
        ours = flat[row.ours]
        shapes = _theirs_shapes(row, tuple(np.shape(ours)))
        for number, (name, shape) in enumerate(zip(row.theirs, shapes, strict=True)):

            def make(row=row, ours=ours, number=number):
                return row.layout.split(np.asarray(ours, np.float32), len(row.theirs))[number]

            yield name, Lazy(shape, make)


@dataclasses.dataclass
class Imported:
    """The result of reading a source.

    Attributes:
      stages: role ('clip', 'prior', 'decoder', 'upsampler64') -> (config, parameters, some of them lazy).
      tokenizer: of the source, or None.
      tensors: the files that were read.
      licence: the terms of the weights, '' if unknown.
    """

    stages: dict[str, tuple[dict, Any]]
    tokenizer: Any
    tensors: list[Tensors]
    licence: str = ""
