"""The settings of sampling of each step: the model's settings, changed by keywords.

`SETTINGS` has every setting by its keyword: keywords of `Pipeline.text_to_image`, flags of commands. Stages
declare them (`models/stages/settings.py`).
"""

from collections.abc import Iterable, Sequence

import numpy as np

from dalle2_jax import systems
from dalle2_jax.generate.engine import Engine
from dalle2_jax.models.stages.settings import Setting
from dalle2_jax.runtime.names import nearest, synonym
from dalle2_jax.systems.step import Step

SETTINGS = {k: setting for name in systems.SYSTEMS for k, setting in systems.load(name).SETTINGS.items()}
# Of no stage: pictures are drawn and ranked (`rerank`).
SETTINGS["rerank"] = Setting(
    "candidates", int, "Draw so many candidates a caption, and keep those that fit it best.", 1, role="rerank"
)


def check_keywords(given: Iterable[str], known: Sequence[str], what: str = "setting of sampling") -> None:
    """Raise ValueError for names that are not known; the message has a synonym among them, or the nearest."""
    for name in given:
        if name not in known:
            ours = synonym(name, known)
            near = repr(ours) if ours else nearest(name, known)
            hint = f"; did you mean {near}?" if near else f": choose from {', '.join(known)}"
            raise ValueError(f"{name!r} is no {what}{hint}")


def by_role(keywords: dict) -> dict[str, dict]:
    """role -> {keyword of the stage's `sample`: value} of keywords in `SETTINGS`, without those of None."""
    check_keywords(keywords, tuple(SETTINGS))
    roles: dict[str, dict] = {}
    for name, value in keywords.items():
        if value is not None:
            roles.setdefault(SETTINGS[name].role, {})[SETTINGS[name].name] = value
    return roles


def resolve(engine: Engine, steps: Sequence[Step], **keywords) -> dict[str, dict]:
    """step -> its settings, changed by keywords in `SETTINGS`; None: the model's.

    Raises ValueError for an unknown keyword, and for a value that the model cannot take.
    """
    roles = by_role(keywords)
    ranked = roles.pop("rerank", {})
    if ranked:
        ranked = {"rerank": {"candidates": SETTINGS["rerank"].check(ranked["candidates"])}}
    found: dict[str, dict] = {}
    for role in dict.fromkeys([*(step.role for step in steps if step.role), *roles]):
        found |= of_role(engine, steps, role, **roles.get(role, {}))
    return found | ranked


def defaults(engine: Engine, steps: Sequence[Step]) -> dict:
    """keyword -> the model's value, of the settings that it has; a list for one number a stage."""
    found = {}
    for keyword, setting in SETTINGS.items():
        stages = [engine.stage(step.stage) for step in steps if step.role == setting.role]
        values = [stage.sampling[setting.name] for stage in stages if setting.name in stage.sampling]
        if values:
            found[keyword] = values if setting.kind == "list" else values[0]
    return found


def of_role(engine: Engine, steps: Sequence[Step], role: str, **changes) -> dict[str, dict]:
    """step -> its settings, of the steps of a role; a 'list' setting has a number for each step."""
    steps = [step for step in steps if step.role == role]
    if not steps and role != "upsampler":
        engine.stage(role)  # the error names the model's stages
    each = [dict(changes) for _ in steps]
    for keyword, setting in SETTINGS.items():
        if setting.role == role and setting.kind == "list" and changes.get(setting.name) is not None:
            numbers = changes[setting.name]
            if len(numbers) != len(steps):
                raise ValueError(
                    f"{keyword} has {len(numbers)} numbers, model {engine.name!r} has {len(steps)} "
                    f"{role}(s): give one a stage"
                )
            each = [now | {setting.name: number} for now, number in zip(each, numbers, strict=True)]
    return {step.name: of_step(engine, step, **now) for step, now in zip(steps, each, strict=True)}


def of_step(engine: Engine, step: Step, **changes) -> dict:
    """The settings of a step, changed by keywords of its `sample` and scales of guides; None: the model's.

    Raises ValueError for settings that the stage cannot take.
    """
    stage, kind = engine.stage(step.stage), engine.configs[step.stage]["stage"]
    changes = {name: value for name, value in changes.items() if value is not None}
    guides = {guide: scale for guide in step.guides if (scale := changes.pop(guide, 0))}
    settings = dict(stage.sampling)
    for name in changes:
        if name not in settings:
            raise ValueError(
                f"{step.name}: {name} has no meaning for a stage {kind!r}, which has {', '.join(settings)}"
            )
    settings |= changes
    declared = {setting.name: setting for setting in systems.declared(kind)}
    try:
        for guide, scale in guides.items():
            engine.stage(guide)  # the error names the model's stages
            guides[guide] = SETTINGS[guide].check(scale)
        for name, value in list(settings.items()):
            if value is not None and name in declared:
                settings[name] = declared[name].check(value)
            elif name in declared and declared[name].kind == "pair":
                del settings[name]  # reports name a pair only where it is used
        _check_method(engine, step, settings, changes)
        if hasattr(stage, "check"):
            stage.check(settings)
    except ValueError as error:
        raise ValueError(f"{step.name}: {error}") from None
    return settings | guides


def _check_method(engine: Engine, step: Step, settings: dict, changes: dict) -> None:
    """Raise ValueError for an eta without use, and for a sampler without its statistics."""
    method = settings.get("method")
    if "eta" in changes and method != "ddim":
        raise ValueError(
            f"eta {changes['eta']} has no meaning for method {method!r}: use 'ddim', or leave eta out"
        )
    if method == "analytic":
        eps_sq = engine.params(step.stage).get("stats", {}).get("eps_sq")
        if eps_sq is None or not np.isfinite(eps_sq).all():
            raise ValueError(
                "method 'analytic' needs statistics that a prior with model.method='analytic' gets "
                "at each checkpoint, and this stage has none: choose another, or train it on by a step"
            )
