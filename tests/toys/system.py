"""A system from outside of the package: a tokenizer alone, or with a model of its codes.

Both of its actions with a token model come from one checkpoint: `draw` a caption, and `infill`, which keeps
the upper half of a picture.
"""

from dalle2_jax.systems.step import Step
from tests.toys.codebook import CodeBook
from tests.toys.tokens import CODES, TokenModel

ROLES, LISTS, SETTINGS, GUIDES = ("tokens", "tokenizer"), {}, {}, {}
_ENCODE = Step("encode", "tokenizer", "encode", CodeBook.ops["encode"])


def _decode(of):
    return Step("picture", "tokenizer", "decode", CodeBook.ops["decode"], bind={"codes": of})


def actions(stages):
    if "tokens" not in stages:
        codes = Step("codes", "tokenizer", "sample", CodeBook.ops["sample"], fold=0)
        return {"draw": (codes, _decode("codes.codes")), "reconstruct": (_ENCODE, _decode("encode.codes"))}
    picture = _decode(f"codes.{CODES}")
    kept = Step("codes", "tokens", "infill", TokenModel.ops["infill"], fold=1, bind={CODES: "encode.codes"})
    return {
        "draw": (Step("codes", "tokens", "sample", TokenModel.ops["sample"], fold=0), picture),
        "infill": (_ENCODE, kept, picture),
    }


def steps(action, stages):
    if action not in actions(stages):
        raise ValueError(f"it has {', '.join(stages)}")
    return actions(stages)[action]


def uses(stage):
    return {"tokenizer": "tokenizer"} if CODES in stage.batch_spec(1) else {}


def check(configs, stages, vocab_sizes, uses):
    if "tokenizer" not in stages:
        raise ValueError("it has no tokenizer")


def complete(stages):
    """Whatever `check` takes is complete."""
