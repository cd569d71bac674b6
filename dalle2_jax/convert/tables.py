"""The engine of the formats: a table says which of our parameters is which of their tensors, both ways.

A row is one of our leaves, the tensors that it is made of, and how they are laid out. `imported` reads along
a table, `exported` against it; either is exact, because a layout only moves numbers. Nothing is read before
the names and shapes of all tensors have been compared.
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
    """How a leaf of ours is laid out in `count` tensors of theirs: (leaf, count) -> them, and back."""

    split: Callable[[np.ndarray, int], Arrays]
    join: Callable[[Arrays], np.ndarray]


# The same array: biases, gains, tables, class tokens.
SAME = Layout(lambda x, n: np.split(x, n, axis=-1) if x.ndim else [x], lambda xs: _concatenate(xs, -1))
# Dense kernels [in, out] as weights [out, in]; of several weights the outputs stand side by side.
DENSE = Layout(lambda x, n: np.split(x.T, n, axis=0), lambda xs: _concatenate(xs, 0).T)
# Convolutions [kh, kw, in, out] as [out, in, kh, kw].
CONV = Layout(lambda x, n: [x.transpose(3, 2, 0, 1)], lambda xs: xs[0].transpose(2, 3, 1, 0))
# The same array behind an axis of length 1.
LEADING = Layout(lambda x, n: [x[None]], lambda xs: xs[0][0])


def entry_major(count: int) -> Layout:
    """A Dense whose output is `count` vectors, as a weight whose output is read as [entries, count]."""

    def turned(x, rows):
        return np.swapaxes(x.reshape(rows, -1, *x.shape[1:]), 0, 1).reshape(x.shape)

    return Layout(lambda x, n: [turned(x.T, count)], lambda xs: turned(xs[0], len(xs[0]) // count).T)


# A convolution of width 1 over a sequence, [out, in, 1], in the place of a Dense.
POINTWISE = Layout(lambda x, n: [x.T[..., None]], lambda xs: xs[0][..., 0].T)


def per_head(parts: int, head_dim: int, pointwise: bool = False) -> tuple[Layout, Layout]:
    """(kernel, bias) of a Dense whose output is `parts` blocks (q | k | v), as a weight whose rows are the
    first head's parts, then the next one's (OpenAI's old order); `pointwise`: in a convolution of width 1."""

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
    """A Dense of one layer of theirs, or of several side by side; layouts are DENSE and SAME unless given."""
    # torch's fused attention has in_proj_weight and in_proj_bias, all else layer.weight and layer.bias
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
    """What a format calls the parts of a pre-LN transformer block."""

    norm1: str
    norm2: str
    qkv: tuple[str, ...]
    out: str
    fc1: str
    fc2: str

    def rows(
        self, ours: str, theirs: str, depth: int, qkv: tuple[Layout | None, Layout | None] = (None, None)
    ) -> list[Row]:
        """The rows of `depth` blocks; `theirs` has their number in the place of {}.

        qkv: the layouts of kernel and bias of queries, keys and values, which are in blocks unless given.
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
    """An array that is made when numpy asks for it; its shape and type are known before."""

    def __init__(self, shape: tuple[int, ...], make: Callable[[], np.ndarray], dtype=np.float32):
        self.shape, self.dtype, self.ndim = tuple(shape), np.dtype(dtype), len(shape)
        self._make = make

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = np.asarray(self._make(), self.dtype)
        if array.shape != self.shape:
            raise ValueError(f"an array was to have shape {self.shape}, it has {array.shape}")
        return array if dtype is None else array.astype(dtype)


def expected_shapes(table: Iterable[Row], abstract: Any) -> dict[str, tuple[int, ...]]:
    """Their tensors' names and shapes for parameters of ours with the shapes of `abstract`."""
    shapes = {name: tuple(leaf.shape) for name, leaf in modeldir.flatten(abstract).items()}
    return {
        name: shape
        for row in table
        for name, shape in zip(row.theirs, _theirs_shapes(row, shapes[row.ours]), strict=True)
    }


def _theirs_shapes(row: Row, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of a row's tensors, by laying out an array that takes no memory."""
    empty = np.broadcast_to(np.float32(0), shape)
    return [part.shape for part in row.layout.split(empty, len(row.theirs))]


def imported(
    table: Iterable[Row],
    tensors: Tensors,
    abstract: Any,
    *,
    given: Mapping[str, Any] | None = None,
    ignored: str = r"(?!)",
) -> dict:
    """Parameters as `abstract` has them, whose leaves are read from `tensors` when they are needed.

    Args:
      table: rows for all leaves but the given ones.
      tensors: theirs.
      abstract: our parameters' shapes.
      given: leaves that come from elsewhere.
      ignored: pattern of whole names of tensors that are no parameters, such as counters.

    Raises:
      ValueError: names every tensor that is missing, surplus or misshapen, with the shape that is expected.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in modeldir.flatten(abstract).items()}
    given = dict(given or {})
    rows = {row.ours: row for row in table}
    unknown = sorted(shapes.keys() ^ (rows.keys() | given.keys()))
    if unknown:
        raise ValueError(
            f"the table and the model differ in {', '.join(unknown[:10])}: a mistake in the format"
        )
    expected = expected_shapes(rows.values(), abstract)
    found = {name: shape for name, shape in tensors.shapes.items() if not re.fullmatch(ignored, name)}
    # What is one number of ours may be a vector of one of theirs, as OpenCLIP's logit_scale is.
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

    return modeldir.unflatten(
        {name: given.get(name, None) if name in given else lazy(rows[name]) for name in shapes}
    )


def exported(table: Iterable[Row], params: Any, *, dropped: Iterable[str] = ()) -> dict[str, Lazy]:
    """Their tensors of our parameters; inverse to `imported`, to the bit.

    dropped: names of our leaves that their layout has no place for. Raises ValueError if any other has none.
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
                whole = np.asarray(ours, np.float32)
                return row.layout.split(whole, len(row.theirs))[number]

            yield name, Lazy(shape, make)


@dataclasses.dataclass
class Imported:
    """What a format has made of a source.

    Attributes:
      stages: role ('clip', 'prior', 'decoder', 'upsampler64') -> (config, parameters, some of them lazy).
      tokenizer: of the source, None if it has none.
      tensors: the files that were read.
      licence: the terms of the weights, where they are known; '' otherwise.
    """

    stages: dict[str, tuple[dict, Any]]
    tokenizer: Any
    tensors: list[Tensors]
    licence: str = ""
