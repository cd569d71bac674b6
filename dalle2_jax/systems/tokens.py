"""Token systems: a tokenizer of pictures alone (VQ-VAE), or with models of its codes (DALL-E 1, VQ-VAE-2).

caption --token_model--> codes --tokenizer--> picture
"""

import dataclasses
from collections.abc import Mapping

from dalle2_jax.models.frozen import ops
from dalle2_jax.models.stages import code_sampling
from dalle2_jax.models.stages.settings import Setting
from dalle2_jax.systems import cascade, check_vocabulary, declared, possible
from dalle2_jax.systems.step import Step

ROLES = ("clip", "classifier", "tokenizer", "token_model", "features")  # features: of a tokenizer's loss
LISTS: dict[str, str] = {}
GUIDES: dict[str, str] = {}
# With the keywords of a decoder: `guidance_scale` is that of the stage that draws the picture.
SETTINGS: dict[str, Setting] = {
    setting.name: dataclasses.replace(setting, role="decoder", help=setting.help.format(of="the token model"))
    for setting in declared("token_model")
    if setting.name not in cascade.SETTINGS
}
encode_text = cascade.encode_text


def _tokenizer(stages: Mapping, prefix: str, name: str, **how) -> Step:
    """The step of the tokenizer's one operation `encode...` or `decode...`."""
    do, op = next(iter(ops(stages["tokenizer"], prefix).items()))
    return Step(name, "tokenizer", do, op, **how)


def _codes(stages: Mapping, do: str, **how) -> tuple[Step, Step]:
    """The steps that draw codes, and their picture."""
    _need(stages, "tokenizer", "token_model")
    drawn = Step("codes", "token_model", do, stages["token_model"].ops[do], 0, role="decoder", **how)
    return drawn, _tokenizer(stages, "decode", "picture", bind={"codes": "codes.codes"})


def _need(stages: Mapping, *names: str) -> None:
    for name in names:
        if name not in stages:
            raise ValueError(f"it has no {name}: it has {', '.join(stages)}")


def _draw(stages: Mapping) -> tuple[Step, ...]:
    return _codes(stages, "sample", optional=("negative",))


def _complete(stages: Mapping) -> tuple[Step, ...]:
    drawing = _codes(stages, "complete", bind={"codes": "encode.codes"})
    return _tokenizer(stages, "encode", "encode"), *drawing


def _reconstruct(stages: Mapping) -> tuple[Step, ...]:
    _need(stages, "tokenizer")
    encode = _tokenizer(stages, "encode", "encode")
    return encode, _tokenizer(stages, "decode", "picture", bind={"codes": "encode.codes"})


_ACTIONS = {
    "draw": _draw,
    "complete": _complete,
    "reconstruct": _reconstruct,
    "encode_text": cascade.alone(encode_text()),
    "encode_image": cascade.alone(cascade.ENCODE_IMAGE),
    "score": cascade.alone(cascade.SCORE),
}


def steps(action: str, stages: Mapping) -> tuple[Step, ...]:
    """The steps of an action; ValueError says what the stages lack for it."""
    if action not in _ACTIONS:
        raise ValueError(f"it draws codes; it has {', '.join(stages)}")
    return _ACTIONS[action](stages)


def actions(stages: Mapping) -> dict[str, tuple[Step, ...]]:
    """What these stages can do together: action -> its steps."""
    return possible(_ACTIONS, steps, stages)


def uses(stage) -> dict[str, str]:
    """The frozen stages that compute what a stage reads: what it calls each -> its name in the model."""
    return {"tokenizer": "tokenizer"} if "codes" in stage.batch_spec(1) else {}


def complete(stages: Mapping) -> None:
    """Raise ValueError unless a model of trained stages has the tokenizer of the codes that it draws."""
    if "token_model" in stages:
        _need(stages, "tokenizer")


def check(
    configs: Mapping[str, dict], stages: Mapping, vocab_sizes: Mapping[str, int], uses: Mapping[str, dict]
) -> None:
    """Raise ValueError unless the stages of a model fit together; see `cascade.check`."""
    if "tokenizer" not in stages and {*stages} != {"features"}:
        raise ValueError("a model of picture tokens needs a tokenizer")
    check_vocabulary(configs, vocab_sizes)
    if "token_model" not in stages:
        return
    model, tokenizer = stages["token_model"], stages["tokenizer"]
    code_sampling.check_codes(model, "the tokenizer", tokenizer.grids, tokenizer.num_codes)
