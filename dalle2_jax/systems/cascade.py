"""Diffusion systems: unCLIP, a decoder alone (GLIDE, ADM), either with upsamplers, CLIP alone.

    caption --CLIP text--> text embedding --prior--> image embedding --decoder--> base --upsamplers--> picture

A model whose decoder reads no image embedding begins with the decoder. Stages are named clip, prior, decoder,
noisy_clip, classifier; any other name is an upsampler's, in the order in which they run.
"""

import dataclasses
from collections.abc import Callable, Mapping

from dalle2_jax.models import models
from dalle2_jax.models.frozen import Frozen
from dalle2_jax.models.stages.ar_prior import ARPrior
from dalle2_jax.models.stages.classifier import Classifier
from dalle2_jax.models.stages.clip import CLIP
from dalle2_jax.models.stages.diffusion import DiffusionStage
from dalle2_jax.models.stages.prior import Prior
from dalle2_jax.models.stages.settings import Setting
from dalle2_jax.models.stages.t5 import T5
from dalle2_jax.systems import check_vocabulary, declared, possible
from dalle2_jax.systems.step import Step

# The stages that there is one of at most; upsamplers come after them.
ROLES = ("clip", "t5", "prior", "decoder", "noisy_clip", "classifier")
LISTS = {"upsamplers": "upsampler"}
# What may steer the decoder -> the field that it steers to.
GUIDES = {"noisy_clip": "text_embed", "classifier": "label"}
_GUIDE_HELP = {
    "noisy_clip": "How strongly a CLIP of noised pictures steers.",
    "classifier": "How strongly the model's classifier steers.",
}
# Numbers that are folded into a picture's key; upsampler k has 2 + k.
_PRIOR_FOLD, _DECODER_FOLD, _UPSAMPLER_FOLD = 0, 1, 2


# Settings of sampling


def _keyword(role: str, name: str) -> str:
    """The keyword of a role's setting: ROLE_NAME; the decoder's but for its steps, and `tile`, alone."""
    short = {"num_steps": "steps", "num_candidates": "candidates"}.get(name, name)
    alone = (role == "decoder" and short == name) or name == "tile"
    return short if alone else f"{role}_{short}"


def _settings() -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    for role, words in (("decoder", "the decoder"), ("prior", "the prior"), ("upsampler", "the upsamplers")):
        for kind in models.KINDS.get(role, (role,)):
            for setting in declared(kind):
                changes = dict(role=role, help=setting.help.format(of=words))
                if role == "upsampler" and setting.name == "num_steps":
                    changes |= dict(kind="list", help=f"Steps of {words}, one number each, such as 27,15.")
                found.setdefault(_keyword(role, setting.name), dataclasses.replace(setting, **changes))
    for guide, text in _GUIDE_HELP.items():
        found[guide] = Setting(guide, float, text, 0, 10_000, role="decoder")
    return found


# keyword -> setting: flags of commands, keywords of `Pipeline.settings`, fields of the studio
SETTINGS = _settings()


# Actions


def upsamplers(stages: Mapping) -> tuple[str, ...]:
    """Names of the upsamplers, in the order in which they run."""
    return tuple(name for name in stages if name not in ROLES)


def reads_embeds(stages: Mapping) -> bool:
    """Whether the decoder draws image embeddings."""
    return "decoder" in stages and stages["decoder"].embed_dim > 0


def _need(stages: Mapping, *names: str) -> None:
    for name in names:
        if name not in stages:
            raise ValueError(f"it has no {name}: it has {', '.join(stages)}")


def encode_text(clip: str = "clip") -> Step:
    """CLIP, or the one that guides, reads captions."""
    return Step("text", clip, "encode_text", CLIP.ops["encode_text"])


_READ_BY_T5 = Step("text", "t5", "encode_text", T5.ops["encode_text"])
_STATES = {"text_states": "text.text_states"}
_TEXT = {"text_embed": "text.text_embed", **_STATES}
SCORE = Step("score", "classifier", "score", Classifier.ops["score"])
ENCODE_IMAGE = Step("image", "clip", "encode_image", CLIP.ops["encode_image"])
_PRIOR = Step(
    "prior",
    "prior",
    "sample",
    Prior.ops["sample"],
    fold=_PRIOR_FOLD,
    bind=_TEXT,
    role="prior",
)
_DECODER = Step(
    "decoder",
    "decoder",
    "sample",
    DiffusionStage.ops["sample"],
    fold=_DECODER_FOLD,
    bind={"image_embed": "prior.image_embed", **_TEXT},
    optional=("x_T", "init", "inpaint_image", "negative"),
    role="decoder",
    guides=tuple(GUIDES),
)
_INVERT = Step(
    "inversion",
    "decoder",
    "invert",
    DiffusionStage.ops["invert"],
    bind={"image_embed": "image.image_embed"},
)


def _enlarge(stages: Mapping) -> tuple[Step, ...]:
    found, before = [], "decoder"
    for k, name in enumerate(upsamplers(stages)):
        bind = {"low_res": f"{before}.image", **(_STATES if _reads_t5(stages[name]) else {})}
        fold, optional = _UPSAMPLER_FOLD + k, ("inpaint_image",)
        op = _DECODER.op
        found.append(Step(name, name, "sample", op, fold, bind, optional, role="upsampler"))
        before = name
    return tuple(found)


def _prior(stages: Mapping) -> tuple[Step, ...]:
    _need(stages, "clip", "prior")
    return encode_text(), _PRIOR


def _reads_t5(stage) -> bool:
    """Whether a stage reads the states of a text encoder without an embedding."""
    return bool(getattr(stage, "states_width", 0)) and not stage.embed_dim


def _draw(stages: Mapping) -> tuple[Step, ...]:
    _need(stages, "decoder")
    before: tuple[Step, ...] = _prior(stages) if reads_embeds(stages) else ()
    if any(_reads_t5(stages[name]) for name in ("decoder", *upsamplers(stages))):
        _need(stages, "t5")
        before += (_READ_BY_T5,)
    return (*before, _DECODER, *_enlarge(stages))


def _explain(stages: Mapping) -> tuple[Step, ...]:
    _need(stages, "clip", "prior")
    return _draw(stages)


def _redraw(stages: Mapping) -> tuple[Step, ...]:
    _need(stages, "decoder")
    return _DECODER, *_enlarge(stages)


def _invert(stages: Mapping) -> tuple[Step, ...]:
    _need(stages, "decoder", *(("clip",) if reads_embeds(stages) else ()))
    return *((ENCODE_IMAGE,) if reads_embeds(stages) else ()), _INVERT


def _from_picture(stages: Mapping) -> tuple[Step, ...]:
    _need(stages, "decoder")
    if not reads_embeds(stages):
        raise ValueError("its decoder reads no image embeddings")
    return *_invert(stages), *_redraw(stages)


def _reconstruct(stages: Mapping) -> tuple[Step, ...]:
    _need(stages, "clip", "prior")
    if not isinstance(stages["prior"], ARPrior):
        raise ValueError("it has no principal components: they come with an autoregressive prior")
    return ENCODE_IMAGE, *_redraw(stages)


def _upscale(stages: Mapping) -> tuple[Step, ...]:
    if not upsamplers(stages):
        raise ValueError("it has no upsampler")
    return _enlarge(stages)[-1:]


def alone(step: Step) -> Callable[[Mapping], tuple[Step, ...]]:
    """An action of this step alone: stages -> its steps."""

    def steps(stages):
        _need(stages, step.stage)
        return (step,)

    return steps


_ACTIONS = {
    "draw": _draw,
    "explain": _explain,
    "variations": _from_picture,
    "interpolate": _from_picture,
    "textdiff": _from_picture,
    "image_to_image": _draw,
    "inpaint": _draw,
    "outpaint": _draw,
    "invert": _invert,
    "redraw": _redraw,
    "reconstruct": _reconstruct,
    "upscale": _upscale,
    "encode_text": alone(encode_text()),
    "encode_image": alone(ENCODE_IMAGE),
    "score": alone(SCORE),
}


def steps(action: str, stages: Mapping) -> tuple[Step, ...]:
    """The steps of an action; ValueError says what the stages lack for it."""
    return _ACTIONS[action](stages)


def actions(stages: Mapping) -> dict[str, tuple[Step, ...]]:
    """What these stages can do together: action -> its steps."""
    return possible(_ACTIONS, steps, stages)


# Stages that fit together


def uses(stage) -> dict[str, str]:
    """The frozen stages that compute what a stage reads: what it calls each -> its name in the model."""
    if _reads_t5(stage):
        return {"t5": "t5"}
    return {"clip": "clip"} if Frozen(stage, {"clip": CLIP}).encoders else {}


def complete(stages: Mapping) -> None:
    """Raise ValueError unless a model of trained stages has all that its decoder needs."""
    if reads_embeds(stages) and not {"clip", "prior"} <= stages.keys():
        raise ValueError("this decoder draws image embeddings: give a clip and a prior, too")
    if "decoder" in stages and _reads_t5(stages["decoder"]) and "t5" not in stages:
        raise ValueError("this decoder reads the states of a T5: give a t5, too")


def check(
    configs: Mapping[str, dict], stages: Mapping, vocab_sizes: Mapping[str, int], uses: Mapping[str, dict]
) -> None:
    """Raise ValueError unless the stages of a model fit together.

    Args:
      configs: name -> stored config, upsamplers in their order.
      stages: the same names -> what `models.build_stage` makes of them.
      vocab_sizes: name -> size of the tokenizer of a stage that has one.
      uses: name -> the frozen stages that it uses, see `uses`.
    """
    for name in ("prior", "decoder"):
        clip = stages.get(uses.get(name, {}).get("clip", "clip"))
        if name in stages and clip is not None:
            _check_clip(name, stages[name], clip)
    for name in ("decoder", *upsamplers(stages)):
        if name in stages and "t5" in stages and _reads_t5(stages[name]):
            _check_t5(name, stages[name], stages["t5"])
    for name in GUIDES:
        if name in stages and "decoder" in stages:
            _check_guide(name, stages[name], stages["decoder"])
    check_vocabulary(configs, vocab_sizes)
    side, previous = getattr(stages.get("decoder"), "image_size", None), "decoder"
    for name in upsamplers(stages):
        stage = stages[name]
        if side is not None and stage.low_res_size != side:
            raise ValueError(
                f"{name} enlarges pictures of side {stage.low_res_size}, the {previous} draws side {side}: "
                "give the upsamplers in order, each starting where the one before ends"
            )
        side, previous = stage.image_size, name


def _check_clip(name: str, stage, clip) -> None:
    """Raise ValueError unless a stage reads embeddings and states of this CLIP's sizes."""
    if stage.embed_dim and stage.embed_dim != clip.embed_dim:
        raise ValueError(
            f"the {name} has embeddings of {stage.embed_dim} entries, CLIP of {clip.embed_dim}: "
            f"use the CLIP that the {name} was trained with"
        )
    if stage.states_width and stage.context_length != clip.context_length:
        raise ValueError(
            f"the {name} reads CLIP's states at {stage.context_length} positions, CLIP has "
            f"{clip.context_length}: train them with one context_length"
        )


def _check_t5(name: str, stage, encoder) -> None:
    """Raise ValueError unless a stage reads states of this encoder's width and context."""
    reads, made = (stage.states_width, stage.context_length), (encoder.net.width, encoder.context_length)
    if reads != made:
        raise ValueError(
            f"the {name} reads states of width {reads[0]} at {reads[1]} positions, the t5 has {made[0]} at "
            f"{made[1]}: use the one that it was trained with"
        )


def _check_guide(name: str, guide, decoder) -> None:
    """Raise ValueError unless a guide reads the very pictures that the decoder noises."""
    if guide.schedule is None:
        setting = "schedule" if name == "classifier" else "noise"
        raise ValueError(f"{name} was not trained on noised pictures: train one with model.{setting}")
    if guide.image_size != decoder.image_size or guide.schedule != decoder.diffusion.schedule:
        raise ValueError(
            f"{name} reads pictures of side {guide.image_size} with the noise of its own schedule, the "
            f"decoder draws side {decoder.image_size}: train both with one image_size, schedule and "
            "num_timesteps"
        )
