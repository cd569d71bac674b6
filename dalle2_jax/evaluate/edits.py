"""Edits of scenes, judged by the checker: what should change changed, what should stay stayed.

    textdiff     a drawing of one object; from its caption to one with another colour, or another shape
    variations   a drawing of one object, several variations of it
    inpaint      one object repainted as another ('replace'), or a second one put beside it ('add')

The drawings are unseen scenes, rendered and not drawn by the model, so that a mistake is the edit's.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from dalle2_jax.data import scenes
from dalle2_jax.evaluate.scene_scores import verdict_aspects, wilson
from dalle2_jax.runtime import processes

MARGIN = 0.06  # of the side, that a mask reaches beyond the object's box
THETA = 0.6  # how far text diffs go
DIFFERENT = 2 / 255  # mean absolute difference from which two variations are not the same picture


@dataclasses.dataclass(frozen=True)
class Case:
    """One edit: the scene as it is, its caption, the caption that is asked for, and what to repaint.

    kind: 'colour' or 'shape', what differs; 'replace' or 'add', what is done within `box`.
    box: left, top, right, bottom in fractions of the side, for repainting alone.
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
    """The plain caption: objects and relations alone."""
    return scenes.caption(dataclasses.replace(scene, details=()))


def _with_object(scene: scenes.Scene, number: int, **changes) -> scenes.Scene:
    objects = list(scene.objects)
    objects[number] = dataclasses.replace(objects[number], **changes)
    return dataclasses.replace(scene, objects=tuple(objects))


def _box(thing: scenes.SceneObject) -> tuple[float, float, float, float]:
    reach = thing.diameter / 2 + MARGIN
    return thing.x - reach, thing.y - reach, thing.x + reach, thing.y + reach


def text_cases(config: scenes.SceneConfig, n: int, seed: int) -> list[Case]:
    """`n` scenes of one object, and a caption that differs in colour, every other time in shape."""
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
    """`n` scenes and a box to repaint: half 'replace' their object, half 'add' the second of a pair."""
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
    """bool [size, size], True where `case` is repainted."""
    left, top, right, bottom = (round(np.clip(edge, 0, 1) * size) for edge in case.box)
    mask = np.zeros((size, size), bool)
    mask[top:bottom, left:right] = True
    return mask


def share(right: Sequence[bool]) -> dict:
    """{'n', 'share', 'interval'}: Wilson's 95 % interval."""
    low, high = wilson(int(np.sum(right)), len(right))
    return {"n": len(right), "share": float(np.mean(right)), "interval": [round(low, 4), round(high, 4)]}


def measure(
    model,
    config: scenes.SceneConfig,
    check: Callable,
    *,
    n: int = 64,
    seed: int = 0,
    variations: int = 2,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, dict], dict[str, tuple[list[np.ndarray], list[str]]]]:
    """Edit `n` scenes in each way and judge them.

    Args:
      model: a `pipeline.UnCLIP`.
      check: `evals.scenes.check`.
      variations: how many are drawn of a picture.
      progress: called with the way, how many edits are done and of how many.

    Of several processes each draws its share of the scenes, and every one judges all pictures.

    Returns:
      name -> `share`, and way -> (pictures before and after, in turn, and what to write under them).
    """
    size, found, shown = model.image_size, {}, {}

    def drawn(way: str, cases: Sequence[Case], edit: Callable) -> zip:
        """(case, picture before, pictures after [k, size, size, 3]) of all cases, by edit(case, before, seed)
        -> `pipeline.Result`."""

        def own(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            before, after = [], []
            for i in map(int, rows):
                before.append(scenes.render(cases[i].scene, size))
                after.append(edit(cases[i], before[-1], i).images)
                if progress is not None:
                    progress(way, len(after), len(rows))
            return np.stack(before), np.stack(after)

        return zip(cases, *processes.in_shares(own, len(cases)), strict=True)

    changed, kept, pictures, labels = [], [], [], []
    cases = text_cases(config, n, seed)

    def textdiff(case, before, i):
        return model.textdiff(before, case.source, case.target, theta=THETA, frames=2, seed=i)

    for case, before, (*_, after) in drawn("textdiff", cases, textdiff):
        verdict, other = check(after, case.target), {"colour": "shape", "shape": "colour"}[case.kind]
        changed.append(bool(getattr(verdict, case.kind)))
        kept.append(bool(getattr(verdict, other)))
        pictures += [before, after]
        labels += [case.source, f"{_mark(changed[-1] and kept[-1])}: {case.target}"]
    found |= {"textdiff/changed": share(changed), "textdiff/kept": share(kept)}
    shown["textdiff"] = pictures, labels

    kept, different, pictures, labels = [], [], [], []

    def vary(case, before, i):
        return model.variations(before, n=variations, seed=i)

    for case, before, after in drawn("variations", cases, vary):
        verdicts = [check(image, case.source) for image in after]
        kept += [bool(verdict.colour and verdict.shape) for verdict in verdicts]
        different += [
            np.abs(a.astype(np.float32) - b).mean() / 255 >= DIFFERENT
            for k, a in enumerate(after)
            for b in after[:k]
        ]
        pictures += [before, *after]
        labels += [case.source, *(_mark(verdict.colour and verdict.shape) for verdict in verdicts)]
    found |= {"variations/kept": share(kept), "variations/different": share(different)}
    shown["variations"] = pictures, labels

    right, pictures, labels = {"replace": [], "add": []}, [], []

    def inpaint(case, before, i):
        return model.inpaint(before, mask_of(case, size), case.target, seed=i)

    for case, before, (after,) in drawn("inpaint", inpaint_cases(config, n, seed), inpaint):
        mask = mask_of(case, size)
        right[case.kind].append(bool(verdict_aspects(check(after, case.target))["named"]))
        outlined = before.copy()
        outlined[mask] = outlined[mask] // 2 + 128
        pictures += [outlined, after]
        labels += [case.source, f"{_mark(right[case.kind][-1])}: {case.target}"]
    found |= {f"inpaint/{kind}": share(some) for kind, some in right.items() if some}
    found["inpaint"] = share(sum(right.values(), []))
    shown["inpaint"] = pictures, labels
    return found, shown


def _mark(right: bool) -> str:
    return "right" if right else "WRONG"


def table(found: dict[str, dict]) -> str:
    """The shares of `measure` as lines of text."""
    lines = [f"{'':24}{'n':>6}{'share':>9}   95 %"]
    for name, entry in found.items():
        low, high = entry["interval"]
        lines.append(f"{name:24}{entry['n']:>6}{entry['share']:>9.3f}   {low:.3f} .. {high:.3f}")
    return "\n".join(lines)
