"""What a model can do: from its stages to its actions, each a tuple of steps.

A system is a module with

    actions(stages) -> {action: steps}         what these stages can do together
    steps(action, stages) -> steps             the same of one action; ValueError says what it lacks
    check(configs, stages, vocab_sizes, uses)  ValueError unless the stages fit together
    complete(stages)                           ValueError unless a model of trained stages has all it needs
    uses(stage)                                frozen stages that compute what a stage reads: name -> stage
    ROLES, LISTS                               the names of its stages; a list of stages -> the role of each
    SETTINGS, GUIDES                           settings of sampling by keyword; stages that steer others

`generate` runs steps and knows nothing else of a system. A model directory's index names its system.
"""

import importlib
from collections.abc import Collection, Mapping

from dalle2_jax.models import models

# The name in a model directory's index -> the module. To add a system, write such a module and name it here.
SYSTEMS = {"unclip": "dalle2_jax.systems.cascade", "tokens": "dalle2_jax.systems.tokens"}


def load(name: str):
    """The module of a system; ValueError for an unknown one."""
    if name not in SYSTEMS:
        raise ValueError(f"system {name!r} is unknown: there is {', '.join(SYSTEMS)}; update dalle2_jax")
    return importlib.import_module(SYSTEMS[name])


def declared(kind: str) -> tuple:
    """The settings of sampling that stages of a kind declare."""
    return models.stage_module(kind).SETTINGS


def of_stages(names: Collection[str]) -> str:
    """The name of the first system that has all of these stages; the first of all if there is none."""
    known = {name: {*load(name).ROLES, *load(name).LISTS} for name in SYSTEMS}
    return next((name for name in SYSTEMS if {*names} <= known[name]), next(iter(SYSTEMS)))


def check_vocabulary(configs: Mapping[str, dict], vocab_sizes: Mapping[str, int]) -> None:
    """Raise ValueError for a tokenizer of captions with more tokens than its stage has embeddings for.

    configs: name -> stored config. vocab_sizes: name -> size of the tokenizer of a stage that has one.
    """
    for name, config in configs.items():
        known = (config["model"].get("text") or {}).get("vocab_size")
        if known and vocab_sizes.get(name, 0) > known:
            raise ValueError(
                f"the tokenizer has {vocab_sizes[name]} tokens, the {name} knows {known}: "
                "use the tokenizer that it was trained with"
            )


def possible(names, steps, stages) -> dict:
    """{action: steps(action, stages)} of the actions `names` for which `steps` raises no ValueError."""
    found = {}
    for name in names:
        try:
            found[name] = steps(name, stages)
        except ValueError:
            continue  # these stages cannot
    return found
