"""What a model can do: from its stages to its actions, each a tuple of steps.

A system is a module with

    actions(stages) -> {action: steps}         what these stages can do together
    steps(action, stages) -> steps             the same of one action; ValueError says what it lacks
    check(configs, stages, uses, vocab_sizes)  ValueError unless the stages fit together
    ROLES, SETTINGS, GUIDES                    which stages it takes, and the settings of sampling, by keyword

`generate` runs steps and knows nothing else of a system. A model directory's index names its system.
"""

import importlib

from dalle2_jax.models import models

# The name in a model directory's index -> the module.
SYSTEMS = {"unclip": "dalle2_jax.systems.cascade"}


def load(name: str):
    """The module of a system; ValueError for an unknown one."""
    if name not in SYSTEMS:
        raise ValueError(f"system {name!r} is unknown: there is {', '.join(SYSTEMS)}; update dalle2_jax")
    return importlib.import_module(SYSTEMS[name])


def declared(kind: str) -> tuple:
    """The settings of sampling that stages of a kind declare."""
    return models.stage_module(kind).SETTINGS
