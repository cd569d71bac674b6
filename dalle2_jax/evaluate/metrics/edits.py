"""Edits of scenes, read by the checker: whether the edited part changed and the rest stayed.

    textdiff     a scene of one object: from its caption to one with another colour, or another shape
    variations   a scene of one object: two variations of it
    inpaint      one object replaced by another ('replace'), or a second one added ('add')

The scenes are unseen in training and rendered, not drawn by the model, so that every error is the edit's.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dalle2_jax.data import scenes
from dalle2_jax.evaluate.metric import Inputs, ModelMetric, wilson
from dalle2_jax.evaluate.metrics.scenes import load_checker, verdict_aspects
from dalle2_jax.evaluate.picture_sets import PassLines, unseen_scenes
from dalle2_jax.generate.pipeline import Result
from dalle2_jax.runtime import metrics, processes

MARGIN = 0.06  # of a mask around the object's box, as a fraction of the side
THETA = 0.6  # how far text diffs go
VARIATIONS = 2  # of a scene
DIFFERENT = 2 / 255  # mean absolute difference from which two variations count as different


@dataclasses.dataclass(frozen=True)
class Case:
    """One edit of `scene`: its caption `source`, the caption of the result `target`, the region to inpaint.

    kind: 'colour' or 'shape', the difference of the captions; 'replace' or 'add' for inpainting.
    box: left, top, right, bottom of the inpainted region in fractions of the side, or None.
    """

    kind: str
    scene: scenes.Scene
    source: str
    target: str
    box: tuple[float, float, float, float] | None = None


def _unseen(config: scenes.SceneConfig, count: int, seed: int, objects: int) -> list[scenes.Scene]:
    found = unseen_scenes(config, count, seed, ("validation",), lambda scene: len(scene.objects) == objects)
    if len(found) < count:
        raise ValueError(f"scenes of {config.name!r} do not hold {count} of {objects} object(s)")
    return found


def _plain(scene: scenes.Scene) -> str:
    """The caption of objects and relations alone."""
    return scenes.caption(dataclasses.replace(scene, details=()))


def _with_object(scene: scenes.Scene, number: int, **changes) -> scenes.Scene:
    objects = list(scene.objects)
    objects[number] = dataclasses.replace(objects[number], **changes)
    return dataclasses.replace(scene, objects=tuple(objects))


def _box(thing: scenes.SceneObject) -> tuple[float, float, float, float]:
    reach = thing.diameter / 2 + MARGIN
    return thing.x - reach, thing.y - reach, thing.x + reach, thing.y + reach


def text_cases(config: scenes.SceneConfig, n: int, seed: int) -> list[Case]:
    """`n` scenes of one object; the target captions differ in colour and in shape by turns."""
    cases = []
    for i, scene in enumerate(_unseen(config, n, seed, 1)):
        kind, thing = ("colour", "shape")[i % 2], scene.objects[0]
        pair = (thing.colour, thing.shape)
        others = [
            other[i % 2]
            for other in scenes.pairs(config, False)
            if other[1 - i % 2] == pair[1 - i % 2] and other[i % 2] != pair[i % 2]
        ]
        changed = _with_object(scene, 0, **{kind: scenes.Stream(seed, i).choice(others)})
        cases.append(Case(kind, scene, _plain(scene), _plain(changed)))
    return cases


def inpaint_cases(config: scenes.SceneConfig, n: int, seed: int) -> list[Case]:
    """`n` scenes and regions to inpaint: half 'replace' their object, half 'add' the second of a pair."""
    cases = []
    for i, scene in enumerate(_unseen(config, n - n // 2, seed + 1, 1)):
        thing = scene.objects[0]
        others = [
            (colour, shape)
            for colour, shape in scenes.pairs(config, False)
            if colour != thing.colour and shape != thing.shape
        ]
        colour, shape = scenes.Stream(seed, i).choice(others)
        other = _with_object(scene, 0, colour=colour, shape=shape)
        cases.append(Case("replace", scene, _plain(scene), _plain(other), _box(thing)))
    pairs = _unseen(config, n // 2, seed + 1, 2) if config.max_objects > 1 and n > 1 else []
    for i, scene in enumerate(pairs):
        gone = i % 2
        left = dataclasses.replace(scene, objects=(scene.objects[1 - gone],), relations=())
        cases.append(Case("add", left, _plain(left), _plain(scene), _box(scene.objects[gone])))
    return cases


def mask_of(case: Case, size: int) -> np.ndarray:
    """bool [size, size], True in the region to inpaint."""
    edges = np.clip(case.box or (0, 0, 1, 1), 0, 1) * size
    left, top, right, bottom = (round(edge) for edge in edges)
    mask = np.zeros((size, size), bool)
    mask[top:bottom, left:right] = True
    return mask


def share(right: Sequence[bool]) -> dict:
    """{'n', 'share', 'interval'}: Wilson's 95 % interval."""
    low, high = wilson(int(np.sum(right)), len(right))
    return {"n": len(right), "share": float(np.mean(right)), "interval": [round(low, 4), round(high, 4)]}


Shown = tuple[list[np.ndarray], list[str]]  # pictures before and after an edit, in turn, and their labels
# Of one edited case: (right or wrong by name of a share, pictures and labels).
Judged = tuple[dict[str, list[bool]], Shown]


Apply = Callable[[Case, np.ndarray, int], Result]  # of case, picture, seed
Judge = Callable[[Case, np.ndarray, np.ndarray], Judged]  # of case, picture before, pictures after
Edit = tuple[list[Case], Apply, Judge]


def text_edit(model: Any, check: Callable, cases: list[Case]) -> Edit:
    """Text diffs; shares of those whose edited aspect 'changed', whose other aspect is 'kept'."""

    def apply(case: Case, before: np.ndarray, seed: int) -> Result:
        return model.textdiff(before, case.source, case.target, theta=THETA, frames=2, seed=seed)

    def judge(case: Case, before: np.ndarray, after: np.ndarray) -> Judged:
        verdict, other = check(after[-1], case.target), {"colour": "shape", "shape": "colour"}[case.kind]
        changed, kept = bool(getattr(verdict, case.kind)), bool(getattr(verdict, other))
        labels = [case.source, f"{_mark(changed and kept)}: {case.target}"]
        return {"textdiff/changed": [changed], "textdiff/kept": [kept]}, ([before, after[-1]], labels)

    return cases, apply, judge


def variation_edit(model: Any, check: Callable, cases: list[Case]) -> Edit:
    """Variations; shares of those that 'kept' colour and shape, of pairs that are 'different'."""

    def judge(case: Case, before: np.ndarray, after: np.ndarray) -> Judged:
        verdicts = [check(image, case.source) for image in after]
        kept = [bool(verdict.colour and verdict.shape) for verdict in verdicts]
        pairs = itertools.combinations(after.astype(np.float32), 2)
        different = [np.abs(a - b).mean() / 255 >= DIFFERENT for a, b in pairs]
        shown = [before, *after], [case.source, *map(_mark, kept)]
        return {"variations/kept": kept, "variations/different": different}, shown

    return cases, lambda _, before, seed: model.variations(before, n=VARIATIONS, seed=seed), judge


def inpaint_edit(model: Any, check: Callable, cases: list[Case]) -> Edit:
    """Inpainting; shares of scenes that show their target, by kind and in all."""

    def apply(case: Case, before: np.ndarray, seed: int) -> Result:
        return model.inpaint(before, mask_of(case, len(before)), case.target, seed=seed)

    def judge(case: Case, before: np.ndarray, after: np.ndarray) -> Judged:
        right = bool(verdict_aspects(check(after[0], case.target))["named"])
        outlined, mask = before.copy(), mask_of(case, len(before))
        outlined[mask] = outlined[mask] // 2 + 128
        shown = [outlined, after[0]], [case.source, f"{_mark(right)}: {case.target}"]
        return {f"inpaint/{case.kind}": [right], "inpaint": [right]}, shown

    return cases, apply, judge


def measure(
    model: Any,
    config: scenes.SceneConfig,
    check: Callable,
    *,
    n: int = 64,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, dict], dict[str, Shown]]:
    """Edit `n` scenes in each way and check them: (name -> `share`, kind of edit -> pictures and labels).

    Several processes share the scenes.

    Args:
      model: an `UnCLIP`.
      check: `evaluate.scenes.check`.
      progress: called as progress(kind of edit, edits done, all edits).
    """
    cases = text_cases(config, n, seed)
    kinds = {
        "textdiff": text_edit(model, check, cases),
        "variations": variation_edit(model, check, cases),
        "inpaint": inpaint_edit(model, check, inpaint_cases(config, n, seed)),
    }
    right: dict[str, list[bool]] = {}
    shown: dict[str, Shown] = {kind: ([], []) for kind in kinds}
    for kind, (cases, apply, judge) in kinds.items():

        def apply_share(rows: np.ndarray, kind=kind, cases=cases, apply=apply):
            before, after = [], []
            for i in map(int, rows):
                before.append(scenes.render(cases[i].scene, model.image_size))
                after.append(apply(cases[i], before[-1], i).images)
                if progress is not None:
                    progress(kind, len(after), len(rows))
            return np.stack(before), np.stack(after)

        edited = processes.split_over_processes(apply_share, len(cases))
        for case, before, after in zip(cases, *edited, strict=True):
            verdicts, (pictures, labels) = judge(case, before, after)
            for name, some in verdicts.items():
                right.setdefault(name, []).extend(some)
            shown[kind][0].extend(pictures)
            shown[kind][1].extend(labels)
    return {name: share(some) for name, some in right.items()}, shown


def _mark(right: bool) -> str:
    return "right" if right else "WRONG"


def table(found: dict[str, dict]) -> str:
    """The shares of `measure` as lines of text."""
    lines = [f"{'':24}{'n':>6}{'share':>9}   95 %"]
    for name, entry in found.items():
        low, high = entry["interval"]
        lines.append(f"{name:24}{entry['n']:>6}{entry['share']:>9.3f}   {low:.3f} .. {high:.3f}")
    return "\n".join(lines)


def _measure(inputs: Inputs) -> tuple[dict, str]:
    config, progress = inputs.scenes[0], PassLines("edits of scenes")
    found, shown = measure(inputs.model, config, load_checker(), seed=inputs.request.seed, progress=progress)
    for kind, (images, labels) in shown.items():
        columns = 1 + VARIATIONS if kind == "variations" else 2
        grid = metrics.labelled_grid(np.stack(images[:96]), labels[:96], columns * 4)
        metrics.save_png(inputs.out / f"edits_{kind}.png", grid, {"labels": json.dumps(labels)})
    return found, table(found)


METRICS = {"edits": ModelMetric(_measure, needs_clip=True, draws=True)}
