"""Systems of picture tokens: a tokenizer alone (VQ-VAE, dVAE, VQGAN).

picture --tokenizer--> codes --tokenizer--> picture
"""

from collections.abc import Mapping

from dalle2_jax.models.stages.tokenizer import Tokenizer
from dalle2_jax.systems.step import Step

ROLES = ("tokenizer",)
LISTS: dict[str, str] = {}
SETTINGS: dict = {}
GUIDES: dict[str, str] = {}

ENCODE = Step("encode", "tokenizer", "encode_sequence", Tokenizer.ops["encode_sequence"])
DECODE = Step(
    "picture",
    "tokenizer",
    "decode_sequence",
    Tokenizer.ops["decode_sequence"],
    bind={"codes": "encode.codes"},
)


def actions(stages: Mapping) -> dict[str, tuple[Step, ...]]:
    """What these stages can do together: action -> its steps."""
    return {"reconstruct": (ENCODE, DECODE)} if "tokenizer" in stages else {}


def steps(action: str, stages: Mapping) -> tuple[Step, ...]:
    """The steps of an action; ValueError says what the stages lack for it."""
    if action not in actions(stages):
        raise ValueError(f"it has {', '.join(stages)}")
    return actions(stages)[action]


def uses(stage) -> dict[str, str]:
    """The frozen stages that compute what a stage reads: what it calls each -> its name in the model."""
    return {}


def complete(stages: Mapping) -> None:
    """A tokenizer needs no other stage."""


def check(
    configs: Mapping[str, dict], stages: Mapping, vocab_sizes: Mapping[str, int], uses: Mapping[str, dict]
) -> None:
    """Raise ValueError unless the stages of a model fit together."""
    if "tokenizer" not in stages:
        raise ValueError("a model of picture tokens needs a tokenizer")
