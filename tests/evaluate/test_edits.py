"""Edits are judged as they are: done well, done badly, and not at all."""

import dataclasses
import types

import numpy as np
import pytest

from dalle2_jax.data import scenes
from dalle2_jax.evaluate.metrics import edits
from dalle2_jax.evaluate.metrics.scenes import verdict_aspects
from dalle2_jax.evaluate.scenes import check

CONFIG = scenes.preset("quickstart")


def complete(case, target):
    """The scene that `target`, a caption of the cases below, is of."""
    colour, shape = target.split()[1:3]
    thing = dataclasses.replace(case.scene.objects[0], colour=colour, shape=shape)
    return dataclasses.replace(case.scene, objects=(thing,))


class Editor:
    """A `pipeline.UnCLIP` that edits by knowing the scenes: rightly, or not at all."""

    image_size = 64

    def __init__(self, right: bool):
        self.right = right
        self.text = iter(edits.text_cases(CONFIG, 6, 0))
        self.repainted = iter(edits.inpaint_cases(CONFIG, 6, 0))

    def _result(self, *images):
        return types.SimpleNamespace(images=np.stack(images))

    def textdiff(self, image, source, target, **_):
        case = next(self.text)
        assert (source, target) == (case.source, case.target)
        np.testing.assert_array_equal(image, scenes.render(case.scene, 64))
        return self._result(image, scenes.render(complete(case, target), 64) if self.right else image)

    def variations(self, image, *, n, seed):
        moved = [np.roll(image, 4 * k if self.right else 0, axis=1) for k in range(n)]
        return self._result(*moved)

    def inpaint(self, image, mask, caption, **_):
        case = next(self.repainted)
        if not self.right:
            return self._result(image)
        if case.kind == "replace":
            after = scenes.render(complete(case, caption), 64)
        else:
            found = (scenes.sample_scene(CONFIG, "validation", i, 1) for i in range(600))
            after = next(
                scenes.render(scene, 64)
                for scene in found
                if len(scene.objects) == 2 and edits._plain(scene) == caption
            )
        # What lies outside of the mask is what was there: the mask leaves room for all that is asked for.
        np.testing.assert_array_equal(after[~mask], image[~mask])
        return self._result(after)


@pytest.mark.parametrize("right", [True, False])
def test_a_perfect_editor_gets_all_and_one_that_does_nothing_what_it_deserves(right):
    found, shown = edits.measure(Editor(right), CONFIG, check, n=6, seed=0)
    shares = {name: entry["share"] for name, entry in found.items()}
    done = float(right)
    assert shares == {
        "textdiff/changed": done,
        "textdiff/kept": 1.0,
        "variations/kept": 1.0,
        "variations/different": done,
        "inpaint/replace": done,
        "inpaint/add": done,
        "inpaint": done,
    }
    assert found["variations/kept"]["n"] == 12 and found["inpaint/add"]["n"] == 3
    assert len(shown["variations"][0]) == len(shown["variations"][1]) == 18
    assert "textdiff/changed" in edits.table(found)


def test_captions_and_drawings_of_cases_agree_and_masks_hold_the_object():
    for case in edits.text_cases(CONFIG, 12, 3) + edits.inpaint_cases(CONFIG, 12, 3):
        before = scenes.render(case.scene, 128)
        assert verdict_aspects(check(before, case.source))["named"]
        assert not verdict_aspects(check(before, case.target))["named"]
        if case.kind == "replace":
            mask, background = edits.mask_of(case, 128), scenes.BACKGROUNDS[case.scene.background]
            assert 0.02 < mask.mean() < 0.9 and (before[~mask] == background).all()
