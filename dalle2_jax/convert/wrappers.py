"""The tensors of the model in a training checkpoint, found by their names.

Checkpoints hold a state dictionary under a key (`state_dict`, `model`, ...) beside the optimizer. DDP,
torch.compile, Lightning and others prefix every name with an attribute (`module.`, `_orig_mod.`,
`model.`). In dotted names both are a first word, and such words are removed one after another.

- A word of WEIGHTS or AVERAGES is removed if all other tensors belong to training (TRAINING). No part of a
  model is called `state_dict`, so beside such a word other tensors may have any name.
- If weights and averages have the same names, the averages are read. Tensors that the averages lack (averages
  may cover trained parameters alone) are read from the weights.
- An ambiguous file is an error that names the cause: two models in a file, averages whose names are lost.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping

WEIGHTS = (
    "state_dict model_state_dict model_state model module net network params weights clip clip_model "
    "online_model shadow"
).split()
AVERAGES = (
    "model_ema model_ema_state_dict ema ema_model ema_params ema_state_dict ema_weights averaged_model "
    "swa_model params_ema state_dict_ema"
).split()
# Names of tensors of the training state, or the first words of these names.
TRAINING = re.compile(
    r"(.*_)?(optim(izers?|izer_states?|_state)?(_.*)?|scalers?|scaler_.*|amp|(lr_)?sched(ulers?)?(_.*)?)"
    r"|callbacks|loops|args|config|meta|hparams|hyper_parameters|.*rng_states?|random_states?"
    r"|((global|current|start|best)_)?(steps?|epochs?|iter(ation)?s?)|(best|train|val|valid|test)_.*"
    r"|n_averaged|initted|decay|num_updates|updates|.*loss(es)?"
)
# Words that wrappers insert: torch.compile, FSDP, activation checkpointing, Lightning Fabric.
_BETWEEN = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_COUNTERS = {"n_averaged", "initted", "step", "decay", "num_updates", "updates"}


@dataclasses.dataclass(frozen=True)
class Unwrapped:
    """A model's tensors in a file.

    Attributes:
      names: name in the model -> name in the file.
      below: the removed prefix, such as 'state_dict.module.'; '' for none.
      notes: lines about tensors that are not read, and about the origin of others.
    """

    names: dict[str, str]
    below: str = ""
    notes: tuple[str, ...] = ()


def unwrap(names: Iterable[str], source: str) -> Unwrapped:
    """The model's tensors among a file's dotted names; `source` names the file in errors.

    Raises:
      ValueError: several models, averages without names, or a pickled module.
    """
    plain: dict[str, str] = {}
    for name in names:
        short = ".".join(word for word in name.split(".") if word not in _BETWEEN)
        if short in plain:
            raise ValueError(f"{source} holds {plain[short]} and {name}, which are one tensor's names")
        plain[short] = name
    found = _unwrapped(plain, "", source)
    modules = [name for name in found.names if {"_parameters", "_buffers"} & set(name.split("."))]
    if modules:
        raise ValueError(
            f"{source} holds a pickled module ({modules[0]}), which only its code can read: save "
            "its state dictionary, torch.save(model.state_dict(), FILE)"
        )
    return found


def heads(names: Iterable[str]) -> dict[str, int]:
    """{first word: number of names with it}; '.*' follows a word that other words follow."""
    parts = (name.partition(".") for name in names)
    return collections.Counter(head + ".*" * bool(dot) for head, dot, _ in parts)


def _unwrapped(names: Mapping[str, str], below: str, source: str) -> Unwrapped:
    parts: dict[str, dict[str, str]] = {}
    for name, full in names.items():
        head, _, rest = name.partition(".")
        parts.setdefault(head, {})[rest] = full
    nested = [head for head, part in parts.items() if "" not in part]
    weights = [head for head in nested if head in WEIGHTS]
    averages = [head for head in nested if head in AVERAGES]
    for head in averages:
        if {"decay", "num_updates"} <= parts[head].keys() and not any("." in name for name in parts[head]):
            raise ValueError(
                f"{source} holds averages, {below}{head}.*, whose names have lost their dots (LitEma): save "
                "them as a state dictionary: with model.ema_scope(): torch.save(model.state_dict(), FILE)"
            )
    others = [head for head in parts if head not in weights + averages]
    sure = any("state_dict" in head for head in weights + averages)
    strange = [head for head in others if not TRAINING.fullmatch(head)]
    if not weights + averages or (strange and not sure):
        return Unwrapped(dict(names), below)
    for several in (weights, averages):
        if len(several) > 1:
            listed = ", ".join(f"{below}{head}.*" for head in several)
            raise ValueError(f"{source} holds several models ({listed}): save the state dictionary of one")
    inner = {head: _unwrapped(parts[head], f"{below}{head}.", source) for head in weights + averages}
    found = inner[(averages or weights)[0]]
    if averages:
        found = _averages(found, inner[weights[0]] if weights else None, source)
    named = (f"{head}.{rest}" if rest else head for head in others for rest in parts[head])
    beside = [f"{below}{name}" for name in heads(named)]
    note = (f"not read: {', '.join(beside)}",) if beside else ()
    return dataclasses.replace(found, notes=found.notes + note)


def _averages(averages: Unwrapped, weights: Unwrapped | None, source: str) -> Unwrapped:
    """The averages without their counters, completed by the weights."""
    names = {name: full for name, full in averages.names.items() if name not in _COUNTERS}
    averages = dataclasses.replace(averages, names=names)
    if weights is None:
        return averages
    alien = sorted(names.keys() - weights.names.keys())
    lacking = sorted(weights.names.keys() - names.keys())
    if alien and lacking:
        raise ValueError(
            f"{source} holds averages, {averages.below}*, whose names are not those of its weights, "
            f"{weights.below}*: {averages.below}{alien[0]} is no {lacking[0]}. Save the ones that you want "
            "as a separate state dictionary"
        )
    notes = [f"the averages {averages.below}* are read, not the weights {weights.below}*"]
    if lacking:
        names |= {name: weights.names[name] for name in lacking}
        notes.append(
            f"{len(lacking)} tensors that the averages lack are those of the weights, such as {lacking[0]}"
        )
    return dataclasses.replace(averages, names=names, notes=(*weights.notes, *averages.notes, *notes))
