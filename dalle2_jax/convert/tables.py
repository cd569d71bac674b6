"""The engine of the formats: a table maps our parameters to their tensors, in both directions.

A row is one of our leaves, the tensors that it consists of, and their layout. `imported` reads a table from
theirs to ours, `exported` from ours to theirs; both are exact, since a layout only moves numbers. Names and
shapes of all tensors are compared before anything is read.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from dalle2_jax.convert.tensors import Tensors
from dalle2_jax.models import models
from dalle2_jax.runtime import modeldir
from dalle2_jax.runtime.modeldir import Lazy

Arrays = list[np.ndarray]
OPENAI_LICENCE = "OpenAI's are MIT; of other weights in this layout ask their makers"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How `count` tensors of theirs hold a leaf of ours. split: (leaf, count) -> theirs. join: inverse."""

    split: Callable[[np.ndarray, int], Arrays]
    join: Callable[[Arrays], np.ndarray]


# The same array: biases, gains, tables, class tokens, and kernels that are multiplied from the right.
SAME = Layout(lambda x, n: np.split(x, n, axis=-1) if x.ndim else [x], lambda xs: _concatenate(xs, -1))
# Dense kernels [in, out] as weights [out, in]; several weights are concatenated along the outputs.
DENSE = Layout(lambda x, n: np.split(x.T, n, axis=0), lambda xs: _concatenate(xs, 0).T)
# Convolutions [kh, kw, in, out] as [out, in, kh, kw].
CONV = Layout(lambda x, n: [x.transpose(3, 2, 0, 1)], lambda xs: xs[0].transpose(2, 3, 1, 0))
# The same array with a leading axis of length 1.
LEADING = Layout(lambda x, n: [x[None]], lambda xs: xs[0][0])
# A convolution of width 1 over a sequence, [out, in, 1], instead of a Dense.
POINTWISE = Layout(lambda x, n: [x.T[..., None]], lambda xs: xs[0][..., 0].T)


def regrouped(parts: int, width: int = 1, kernel: Layout = DENSE) -> tuple[Layout, Layout]:
    """(kernel, bias) layouts of a Dense with outputs [parts, n, width], theirs being [n, parts, width].

    With parts q, k, v of heads of `width` entries: OpenAI's old order, by head and then by part.
    """

    def swapped(x: np.ndarray, rows: int) -> np.ndarray:
        return np.swapaxes(x.reshape(rows, -1, width, *x.shape[1:]), 0, 1).reshape(x.shape)

    def of(base: Layout) -> Layout:
        return Layout(
            lambda x, n: [swapped(base.split(x, n)[0], parts)],
            lambda xs: base.join([swapped(xs[0], len(xs[0]) // (parts * width))]),
        )

    return of(kernel), of(SAME)


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
    return leaf(f"{ours}/scale", f"{theirs}.weight") + leaf(f"{ours}/bias", f"{theirs}.bias")


def dense(
    ours: str, *theirs: str, layouts: tuple[Layout, Layout] = (DENSE, SAME), bias: bool = True
) -> list[Row]:
    """A Dense of one layer of theirs, or of several concatenated; `layouts` are of kernel and bias."""
    # torch's fused attention has in_proj_weight and in_proj_bias, other layers layer.weight and layer.bias
    heads = [name if name.endswith("_") else f"{name}." for name in theirs]
    rows = [
        Row(f"{ours}/{name}", tuple(head + kind for head in heads), layout)
        for name, kind, layout in zip(("kernel", "bias"), ("weight", "bias"), layouts, strict=True)
    ]
    return rows if bias else rows[:1]


def conv(ours: str, theirs: str, bias: bool = True) -> list[Row]:
    """A convolution."""
    return dense(ours, theirs, layouts=(CONV, SAME), bias=bias)


def under(ours: str, rows: Iterable[Row], theirs: str = "") -> list[Row]:
    """The rows with our names below `ours` ('': as they are), and their names prefixed by `theirs`."""
    prefix = f"{ours}/" if ours else ""
    return [Row(prefix + row.ours, tuple(theirs + name for name in row.theirs), row.layout) for row in rows]


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
        self, ours: str, theirs: str, depth: int, qkv: tuple[Layout, Layout] = (DENSE, SAME)
    ) -> list[Row]:
        """The rows of `depth` blocks; `theirs` has {} in the place of the block's number.

        qkv: layouts of kernel and bias of queries, keys and values; default: three blocks.
        """
        block = [
            *norm("norm1", self.norm1),
            *norm("norm2", self.norm2),
            *dense("attn/qkv", *self.qkv, layouts=qkv),
            *dense("attn/out", self.out),
            *dense("mlp/fc1", self.fc1),
            *dense("mlp/fc2", self.fc2),
        ]
        return [
            row
            for number in range(depth)
            for row in under(f"{ours}/block_{number}", block, f"{theirs.format(number)}.")
        ]


def expected_shapes(table: Iterable[Row], abstract: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of their tensors for parameters of ours with the shapes of `abstract`."""
    shapes = {name: tuple(leaf.shape) for name, leaf in modeldir.flatten(abstract).items()}
    return {name: shape for row in table for name, shape in _their_shapes(row, shapes[row.ours])}


def _their_shapes(row: Row, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a row's tensors, found by splitting an array without memory."""
    parts = row.layout.split(np.broadcast_to(np.float32(0), shape), len(row.theirs))
    return [(name, part.shape) for name, part in zip(row.theirs, parts, strict=True)]


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
        raise ValueError(f"a mistake in the format: table and model differ in {', '.join(unknown[:10])}")
    expected = expected_shapes(rows.values(), abstract)
    found = {name: shape for name, shape in tensors.shapes.items() if not re.fullmatch(ignored, name)}
    # A scalar of ours may be a vector of length 1, such as OpenCLIP's logit_scale.
    found |= {name: () for name, shape in expected.items() if shape == () and found.get(name) == (1,)}
    complaints = modeldir.differences(found, expected)
    if complaints:
        differing = f"{tensors.source} does not have the tensors that its settings promise:"
        raise ValueError("\n".join([differing, *complaints]))

    def lazy(row: Row) -> Lazy:
        def make() -> np.ndarray:
            made = row.layout.join([tensors[name] for name in row.theirs])
            return made.reshape(()) if shapes[row.ours] == () and made.shape == (1,) else made

        return Lazy(shapes[row.ours], make)

    return modeldir.unflatten({name: leaves[name] if name in leaves else lazy(rows[name]) for name in shapes})


def read_stage(
    config: dict, table: Callable[[Any], Iterable[Row]], tensors: Tensors, **options
) -> tuple[dict, dict]:
    """(config, parameters) of a stage; `table` makes its rows from our shapes; `options` as of `imported`."""
    abstract = models.abstract_params(models.build_stage(config))
    return config, imported(table(abstract), tensors, abstract, **options)


def exported(table: Iterable[Row], params: Any, *, dropped: Iterable[str] = ()) -> dict[str, Lazy]:
    """Their tensors from our parameters; the exact inverse of `imported`.

    dropped: names of our leaves that their format does not hold. Raises ValueError for another such leaf.
    """
    flat, rows = modeldir.flatten(params), list(table)
    homeless = sorted(flat.keys() - {row.ours for row in rows} - set(dropped))
    if homeless:
        raise ValueError(f"this format has no tensor for {', '.join(homeless[:10])}")

    def part(row: Row, number: int) -> np.ndarray:
        return row.layout.split(np.asarray(flat[row.ours], np.float32), len(row.theirs))[number]

    return {
        name: Lazy(shape, functools.partial(part, row, number))
        for row in rows
        for number, (name, shape) in enumerate(_their_shapes(row, tuple(np.shape(flat[row.ours]))))
    }


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
