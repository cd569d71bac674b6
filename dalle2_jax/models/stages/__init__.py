"""The stages: CLIP, prior, decoder, upsamplers. One file each, with `build(**config)` and a frozen dataclass.

All that training knows of a stage is

    batch_spec(batch_size) -> shapes and types of the fields that `loss` reads
    init(key, batch) -> params
    loss(params, key, batch, *, step=0, train=True) -> Loss(value, scalars, statistics)
    sample(params, keys, batch, ...) -> array          (CLIP has encode_image and encode_text instead, a
                                                        tokenizer encode_sequence and reconstruct)
    ops = {'sample': Op(('image',)), ...}              (what each operation reads and writes)
    uses = ('teacher',)                                (optional: frozen stages that `loss` calls; it then
                                                        takes frozen={'teacher': Bound(stage, params)})
    update(params, statistics, key) -> params, scalars (optional: after the optimizer, every step)
    fit_rows, fit(params, batches) -> params, scalars  (optional: statistics of the data, before training)
    measure(params, key, batch) -> statistics          (optional: of the trained network, after training)
    advice(scalars) -> text                            (optional: what to change where scalars show a failure)

and generating of its keyword arguments for `sample`: the dict `sampling` has their defaults. `step` is the
number of steps taken so far, for what a loss schedules.

Statistics of data or of training (code books, histories of losses) are the leaves of params['stats']: stored
with the parameters in float32, neither optimised nor averaged. A loss returns what a batch adds to them, and
`update` reduces it: each array comes stacked [grad_accum, ...], so that sums stay sums. `update` may change
any parameter, and its scalars are logged.

A stage holds networks and settings, never parameters.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dalle2_jax.runtime.names import nearest


class Op(NamedTuple):
    """What an operation, the stage's method of that name, reads and writes.

    writes: the fields of a batch that it returns, in this order. reads: the fields that it takes one by one,
    after the parameters; None: it takes the batch, with all that `batch_spec` names but `writes`.

    A frozen stage computes fields of a batch by its operations whose name begins with 'encode', and shows
    codes as pictures by 'decode'.
    """

    writes: tuple[str, ...]
    reads: tuple[str, ...] | None = None


class Bound(NamedTuple):
    """A frozen stage and its parameters, as `loss` gets those that it uses."""

    stage: Any
    params: dict


class Loss(NamedTuple):
    """What a stage's loss returns for a batch.

    value: [], what training minimises; float32. scalars: {name: []}, which are logged. statistics: arrays for
    `update`, in any tree; they have no gradient.
    """

    value: jax.Array
    scalars: dict[str, jax.Array] = {}
    statistics: dict = {}


def check_settings(
    settings: Mapping, required: Collection[str], optional: Collection[str], what: str
) -> None:
    """Raise ValueError where the sub-config `what` has an unknown key (naming the nearest) or lacks one."""
    known = (*required, *optional)
    for name in settings:
        if name not in known:
            near = nearest(name, known, show=str)
            hint = f"did you mean {what}.{near}?" if near else f"it has {', '.join(sorted(known))}"
            raise ValueError(f"{what}.{name} is not a setting; {hint}")
    missing = [name for name in required if name not in settings]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(f'{what}.{name}' for name in missing)}")


def narrow_in_loop(params: dict, x: jax.Array) -> tuple[dict, jax.Array]:
    """(params, x) for a network in a loop whose carry is x: weights narrower than float32 stay so in memory.

    The compiler would move their conversion out of the loop, and keep a float32 copy of all of them. A value
    that depends on x cannot leave the loop.
    """
    leaves, tree = jax.tree.flatten(params)
    narrow = {
        i: leaf
        for i, leaf in enumerate(leaves)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    }
    if not narrow:
        return params, x
    narrow, x = jax.lax.optimization_barrier((narrow, x))
    return jax.tree.unflatten(tree, [narrow.get(i, leaf) for i, leaf in enumerate(leaves)]), x
