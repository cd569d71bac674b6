"""What each step of an action samples with: the model's own settings, and the asked ones in their place.

`SETTINGS` has every setting by its keyword: keywords of `Pipeline.text_to_image`, flags of commands. Stages
declare them (`models/stages/settings.py`).
"""

from collections.abc import Sequence

import numpy as np

from dalle2_jax import systems
from dalle2_jax.generate.engine import Engine
from dalle2_jax.runtime.names import nearest
from dalle2_jax.systems.step import Step

SETTINGS = {k: setting for name in systems.SYSTEMS for k, setting in systems.load(name).SETTINGS.items()}


def by_role(asked: dict) -> dict[str, dict]:
    """role -> {keyword of the stage's `sample`: value} of keywords in `SETTINGS`; None is left out."""
    roles = {}
    for name, value in asked.items():
        if name not in SETTINGS:
            near = nearest(name, SETTINGS)
            hint = f"; did you mean {near}?" if near else f": choose from {', '.join(SETTINGS)}"
            raise ValueError(f"{name!r} is no setting of sampling{hint}")
        if value is not None:
            roles.setdefault(SETTINGS[name].role, {})[SETTINGS[name].name] = value
    return roles


def resolve(engine: Engine, steps: Sequence[Step], **asked) -> dict[str, dict]:
    """step -> what it samples with for these keywords of `SETTINGS`; None is the model's own.

    Raises ValueError for a keyword that is no setting, and for one that the model cannot take.
    """
    roles, found = by_role(asked), {}
    for role in roles.keys() - {step.role for step in steps} - {"upsampler"}:
        engine.stage(role)  # the error names the stages that there are
    for role in dict.fromkeys(step.role for step in steps if step.role):
        found |= of_role(engine, steps, role, **roles.get(role, {}))
    if "upsampler" in roles and "upsampler" not in {step.role for step in steps}:
        of_role(engine, steps, "upsampler", **roles["upsampler"])
    return found


def defaults(engine: Engine, steps: Sequence[Step]) -> dict:
    """keyword -> the model's own value, of the settings that it has; a list for one number a stage."""
    found = {}
    for keyword, setting in SETTINGS.items():
        own = [engine.stage(step.stage).sampling for step in steps if step.role == setting.role]
        own = [sampling[setting.name] for sampling in own if setting.name in sampling]
        if own:
            found[keyword] = own if setting.kind == "list" else own[0]
    return found


def of_role(engine: Engine, steps: Sequence[Step], role: str, **asked) -> dict[str, dict]:
    """step -> what it samples with, of the steps of a role; a 'list' setting has a number for each."""
    steps = [step for step in steps if step.role == role]
    each = [dict(asked) for _ in steps]
    for keyword, setting in SETTINGS.items():
        if setting.role == role and setting.kind == "list" and asked.get(setting.name) is not None:
            numbers = asked[setting.name]
            if len(numbers) != len(steps):
                raise ValueError(
                    f"{keyword} has {len(numbers)} numbers, model {engine.name!r} has {len(steps)} "
                    f"{role}(s): give one a stage"
                )
            each = [own | {setting.name: number} for own, number in zip(each, numbers, strict=True)]
    return {step.name: of_step(engine, step, **own) for step, own in zip(steps, each, strict=True)}


def of_step(engine: Engine, step: Step, **asked) -> dict:
    """What a step samples with for these keywords of its `sample` and scales of guides; None is the model's
    own.

    Raises ValueError for what the stage cannot do.
    """
    stage, kind = engine.stage(step.stage), engine.configs[step.stage]["stage"]
    asked = {name: value for name, value in asked.items() if value is not None}
    guides = _guides(engine, step, {guide: asked.pop(guide) for guide in step.guides if guide in asked})
    settings = dict(stage.sampling)
    for name in asked:
        if name not in settings:
            raise ValueError(
                f"{step.name}: {name} has no meaning for a stage {kind!r}, which has {', '.join(settings)}"
            )
    settings |= asked
    declared = {setting.name: setting for setting in systems.declared(kind)}
    try:
        for name, value in list(settings.items()):
            if value is not None and name in declared:
                settings[name] = declared[name].check(value)
            elif name in declared and declared[name].kind == "pair":
                del settings[name]  # reports name a pair only where it is used
        _check_method(engine, step, settings, asked)
        if hasattr(stage, "check"):
            stage.check(settings)
    except ValueError as error:
        raise ValueError(f"{step.name}: {error}") from None
    return settings | guides


def _check_method(engine: Engine, step: Step, settings: dict, asked: dict) -> None:
    """Raise ValueError for an eta without use, and for a sampler without its statistics."""
    method = settings.get("method")
    if "eta" in asked and method != "ddim":
        raise ValueError(
            f"eta {asked['eta']} has no meaning for method {method!r}: use 'ddim', or leave eta out"
        )
    if method == "analytic":
        eps_sq = engine.params(step.stage).get("stats", {}).get("eps_sq")
        if eps_sq is None or not np.isfinite(eps_sq).all():
            raise ValueError(
                "method 'analytic' needs statistics that a prior with model.method='analytic' gets "
                "at each checkpoint, and this stage has none: choose another, or train it on by a step"
            )


def _guides(engine: Engine, step: Step, scales: dict[str, float]) -> dict[str, float]:
    """The guides that are asked for and how strongly; 0 is none. ValueError for one that the model lacks."""
    found = {}
    for guide, scale in scales.items():
        if scale:
            engine.stage(guide)  # the error names the stages that there are
            try:
                found[guide] = SETTINGS[guide].check(scale)
            except ValueError as error:
                raise ValueError(f"{step.name}: {error}; 0 is none") from None
    return found
