"""Frozen stages: trained before, they compute fields of a batch inside the compiled step.

`config.frozen` names them: {"clip": PATH, "tokenizer": PATH, "teacher": PATH}. `config.clip` is short for
`config.frozen.clip`. A stage's `ops` say what it reads and writes (see `stages.Op`).

A field of a batch is called [OWNER.]FIELD. `tokenizer.codes` is written by the frozen stage `tokenizer`,
`codes` by the only one that can encode it. An encoder reads pictures cut to its own size, the dataset's field
`tokenizer.image`. It reads captions as the run tokenizes them, cut to its own context.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from dalle2_jax.models import models, trainable
from dalle2_jax.models.stages import Bound, Op
from dalle2_jax.runtime import modeldir
from dalle2_jax.runtime.batch import PICTURES, field


class Loaded(NamedTuple):
    """A frozen stage with its parameters on the host, and the sha256 of these."""

    stage: Any
    params: dict
    sha256: str


def paths(config: Mapping) -> dict[str, str]:
    """Name -> path of every frozen stage of a config. Raises ValueError where `clip` has two paths."""
    found = {name: path for name, path in (config.get("frozen") or {}).items() if path}
    clip = config.get("clip") or found.get("clip", "")
    if found.get("clip", clip) != clip:
        raise ValueError(
            f"config.clip {clip} and config.frozen.clip {found['clip']} name the same stage: give one of them"
        )
    if trainable.BASE in found:
        raise ValueError(f"config.frozen.{trainable.BASE}: that name is taken, see config.trainable")
    return ({"clip": clip} if clip else {}) | found


def short(config: Mapping) -> dict:
    """The config with the CLIP's path in `clip` alone, so that both ways to name it compare equal."""
    found = paths(config)
    return {**config, "clip": found.pop("clip", ""), "frozen": found}


def load(config: Mapping) -> dict[str, Loaded]:
    """Name -> frozen stage, read from a workdir or a model directory; raises what `models.load_stage` does.

    Parameters keep the type that they are stored in. A CLIP's become float32, as in all runs before: bfloat16
    would be the same numbers in another program.
    """
    found = {}
    for name, path in paths(config).items():
        stage, _, params = models.load_stage(path, name, keep_dtype=name != "clip")
        found[name] = Loaded(stage, params, modeldir.sha256(params))
    return found


def ops(stage: Any, prefix: str) -> dict[str, Op]:
    """The operations of a stage whose names begin so; ValueError for 'encode...' of one without encoder."""
    found = {name: op for name, op in getattr(stage, "ops", {}).items() if name.startswith(prefix)}
    if found and prefix.startswith("encode") and hasattr(stage, "check_encodes"):
        stage.check_encodes()
    return found


class Encoder(NamedTuple):
    """An operation that computes needed fields.

    owner: the frozen stage. do: the operation. writes: field that it writes -> its name in the batch.
    """

    owner: str
    do: str
    writes: dict[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class Frozen:
    """The frozen stages of a run, and the fields that they compute for the stage that is trained.

    Attributes:
      stage: the trained stage. stages: name -> frozen stage.

    `params` of the methods has the parameters of each frozen stage by name, and in 'base' those of `stage`
    that rest (see `trainable`). All methods but `dataset_spec` may be traced.
    """

    stage: Any
    stages: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def encoders(self) -> tuple[Encoder, ...]:
        """The operations of frozen stages that compute fields of the stage's `batch_spec`."""
        writes: dict[tuple[str, str], dict[str, str]] = {}
        for needed in self.stage.batch_spec(1) if self.stages else ():
            owner, _, name = needed.rpartition(".")
            found = [
                (frozen, do)
                for frozen, stage in self.stages.items()
                for do, op in ops(stage, "encode").items()
                if name in op.writes and owner in ("", frozen)
            ]
            if len(found) > 1:
                names = " or ".join(f"{frozen}.{name}" for frozen, _ in found)
                raise ValueError(f"several frozen stages compute {needed!r}: the stage must read {names}")
            for at in found:
                writes.setdefault(at, {})[name] = needed
        order = [(owner, do) for owner, stage in self.stages.items() for do in ops(stage, "encode")]
        return tuple(Encoder(*at, writes[at]) for at in order if at in writes)

    def dataset_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of the fields that the dataset provides: those of `batch_spec` that nothing
        computes, and those that the encoders read."""
        computed = {name for encoder in self.encoders for name in encoder.writes.values()}
        spec = self.stage.batch_spec(batch_size)
        found = {name: x for name, x in spec.items() if name not in computed}
        for owner, do, _ in self.encoders:
            own = self.stages[owner].batch_spec(batch_size)
            for name in self.stages[owner].ops[do].reads:
                found.setdefault(_source(owner, name), own[name])
        return found

    def encode_batch(self, params: Mapping[str, dict], batch: Mapping[str, jax.Array]) -> dict:
        """`batch` with the computed fields, unless it has them, and without those that only encoders read."""
        batch = dict(batch)
        if not self.encoders:
            return batch
        for owner, do, writes in self.encoders:
            if set(writes.values()) <= batch.keys():
                continue
            stage = self.stages[owner]
            reads = {name: batch[_source(owner, name)] for name in stage.ops[do].reads}
            if "tokens" in reads:
                length = stage.context_length
                cut = models.crop_tokens(reads["tokens"], reads["token_mask"], length)
                reads["tokens"], reads["token_mask"] = cut
            made = call(stage, do, params[owner], reads)
            batch |= {name: jax.lax.stop_gradient(made[own]) for own, name in writes.items()}
        needed = self.stage.batch_spec(1)
        return {name: value for name, value in batch.items() if name in needed}

    def loss_keywords(self, params: Mapping[str, dict]) -> dict:
        """Keywords that `stage.loss` gets beside the batch: `frozen` for a stage that uses others."""
        used = getattr(self.stage, "uses", ())
        return {"frozen": {name: Bound(self.stages[name], params[name]) for name in used}} if used else {}

    def whole(self, trained: dict, params: Mapping[str, dict]) -> dict:
        """All parameters of the stage: the trained ones and those that rest."""
        return trainable.merge(trained, params.get(trainable.BASE, {}))

    def decoded(self, params: Mapping[str, dict], name: str, value: jax.Array) -> tuple[str, jax.Array]:
        """(name, value) of a field to be shown: codes are decoded by the frozen stage that can."""
        owner, _, last = name.rpartition(".")
        for frozen, stage in self.stages.items():
            for do, op in ops(stage, "decode").items():
                if op.reads == (last,) and owner in ("", frozen):
                    return next(iter(call(stage, do, params[frozen], {last: value}).items()))
        return name, value


def call(stage: Any, do: str, params: dict, reads: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The fields that an operation writes, of those that it reads one by one."""
    made, op = getattr(stage, do)(params, *(reads[name] for name in stage.ops[do].reads)), stage.ops[do]
    return dict(zip(op.writes, made if isinstance(made, tuple) else (made,), strict=True))


def _source(owner: str, name: str) -> str:
    """The dataset's name of a field that an encoder reads: pictures are cut for it."""
    return f"{owner}.{name}" if field(name).kind in PICTURES else name
