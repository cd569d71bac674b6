"""Edits of scenes, read by the checker: whether the edited part changed and the rest stayed.

    textdiff     a scene of one object: from its caption to one with another colour, or another shape
    variations   a scene of one object: two variations of it
    inpaint      one object replaced by another ('replace'), or a second one added ('add')

The scenes are unseen in training and rendered, not drawn by the model, so that every error is the edit's.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dalle2_jax import pipeline
from dalle2_jax.data import scenes
from dalle2_jax.evaluate.metric import Inputs, ModelMetric, wilson
from dalle2_jax.evaluate.metrics.scenes import load_checker, verdict_aspects
from dalle2_jax.evaluate.picture_sets import PassLines
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
    found = []
    for i in range(100 * count):
        scene = scenes.sample_scene(config, "validation", i, seed)
        if len(scene.objects) == objects:
            found.append(scene)
        if len(found) == count:
            return found
    raise ValueError(f"scenes of {config.name!r} do not hold {count} of {objects} object(s)")


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
        place = ("colour", "shape").index(kind)
        same = getattr(thing, ("shape", "colour")[place])
        others = [
            pair[place]
            for pair in scenes.pairs(config, False)
            if pair[1 - place] == same and pair[place] != getattr(thing, kind)
        ]
        other = _with_object(scene, 0, **{kind: scenes.Stream(seed, i).choice(others)})
        cases.append(Case(kind, scene, _plain(scene), _plain(other)))
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
    left, top, right, bottom = (round(np.clip(edge, 0, 1) * size) for edge in case.box)
    mask = np.zeros((size, size), bool)
    mask[top:bottom, left:right] = True
    return mask


def share(right: Sequence[bool]) -> dict:
    """{'n', 'share', 'interval'}: Wilson's 95 % interval."""
    low, high = wilson(int(np.sum(right)), len(right))
    return {"n": len(right), "share": float(np.mean(right)), "interval": [round(low, 4), round(high, 4)]}


Shown = tuple[list[np.ndarray], list[str]]  # pictures before and after an edit, in turn, and their labels


@dataclasses.dataclass(frozen=True)
class Editor:
    """A model that edits scenes, and the checker that reads the results.

    progress: called as progress(kind of edit, edits done, all edits).
    """

    model: pipeline.UnCLIP
    check: Callable
    progress: Callable[[str, int, int], None] | None = None

    def apply(self, name: str, cases: Sequence[Case], edit: Callable) -> Iterator[tuple]:
        """(case, picture before, pictures after [k, size, size, 3]) for each case.

        edit: (case, picture, seed) -> `pipeline.Result`. Several processes share the cases.
        """
        size = self.model.image_size

        def apply_share(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            before, after = [], []
            for i in map(int, rows):
                before.append(scenes.render(cases[i].scene, size))
                after.append(edit(cases[i], before[-1], i).images)
                if self.progress is not None:
                    self.progress(name, len(after), len(rows))
            return np.stack(before), np.stack(after)

        return zip(cases, *processes.split_over_processes(apply_share, len(cases)), strict=True)


def measure_textdiff(editor: Editor, cases: Sequence[Case]) -> tuple[dict[str, dict], Shown]:
    """(shares of text diffs with the edit 'changed', with the other aspect 'kept'; what to show)."""

    def textdiff(case, before, i):
        return editor.model.textdiff(before, case.source, case.target, theta=THETA, frames=2, seed=i)

    changed, kept, pictures, labels = [], [], [], []
    for case, before, (*_, after) in editor.apply("textdiff", cases, textdiff):
        verdict, other = editor.check(after, case.target), {"colour": "shape", "shape": "colour"}[case.kind]
        changed.append(bool(getattr(verdict, case.kind)))
        kept.append(bool(getattr(verdict, other)))
        pictures += [before, after]
        labels += [case.source, f"{_mark(changed[-1] and kept[-1])}: {case.target}"]
    return {"textdiff/changed": share(changed), "textdiff/kept": share(kept)}, (pictures, labels)


def measure_variations(editor: Editor, cases: Sequence[Case], count: int) -> tuple[dict[str, dict], Shown]:
    """(shares of variations that 'kept' colour and shape, of pairs that are 'different'; what to show)."""

    def vary(case, before, i):
        return editor.model.variations(before, n=count, seed=i)

    kept, different, pictures, labels = [], [], [], []
    for case, before, after in editor.apply("variations", cases, vary):
        verdicts = [editor.check(image, case.source) for image in after]
        kept += [bool(verdict.colour and verdict.shape) for verdict in verdicts]
        different += [
            np.abs(a.astype(np.float32) - b).mean() / 255 >= DIFFERENT
            for k, a in enumerate(after)
            for b in after[:k]
        ]
        pictures += [before, *after]
        labels += [case.source, *(_mark(verdict.colour and verdict.shape) for verdict in verdicts)]
    return {"variations/kept": share(kept), "variations/different": share(different)}, (pictures, labels)


def measure_inpaint(editor: Editor, cases: Sequence[Case]) -> tuple[dict[str, dict], Shown]:
    """(shares of inpainted scenes that show their target, by kind and in all; what to show)."""
    size = editor.model.image_size

    def inpaint(case, before, i):
        return editor.model.inpaint(before, mask_of(case, size), case.target, seed=i)

    right, pictures, labels = {"replace": [], "add": []}, [], []
    for case, before, (after,) in editor.apply("inpaint", cases, inpaint):
        right[case.kind].append(bool(verdict_aspects(editor.check(after, case.target))["named"]))
        outlined, mask = before.copy(), mask_of(case, size)
        outlined[mask] = outlined[mask] // 2 + 128
        pictures += [outlined, after]
        labels += [case.source, f"{_mark(right[case.kind][-1])}: {case.target}"]
    found = {f"inpaint/{kind}": share(some) for kind, some in right.items() if some}
    return found | {"inpaint": share(sum(right.values(), []))}, (pictures, labels)


def measure(
    model: pipeline.UnCLIP,
    config: scenes.SceneConfig,
    check: Callable,
    *,
    n: int = 64,
    seed: int = 0,
    variations: int = VARIATIONS,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, dict], dict[str, Shown]]:
    """Edit `n` scenes in each way and check them: (name -> `share`, kind of edit -> pictures and labels).

    Args:
      check: `evaluate.scenes.check`.
      variations: number of variations of a scene.
      progress: see `Editor`.
    """
    editor, cases = Editor(model, check, progress), text_cases(config, n, seed)
    measured = {
        "textdiff": measure_textdiff(editor, cases),
        "variations": measure_variations(editor, cases, variations),
        "inpaint": measure_inpaint(editor, inpaint_cases(config, n, seed)),
    }
    found = {name: value for shares, _ in measured.values() for name, value in shares.items()}
    return found, {kind: shown for kind, (_, shown) in measured.items()}


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
