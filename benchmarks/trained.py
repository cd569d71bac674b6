"""Tiny recipes of systems, and the pictures that trained models draw; for `benchmarks.systems`."""

import dataclasses
import functools
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.scores import Score
from dalle2_jax.data import scenes
from dalle2_jax.evaluate import drawing, picture_sets
from dalle2_jax.evaluate.metrics import bpd
from dalle2_jax.evaluate.metrics import scenes as scenes_metric
from dalle2_jax.evaluate.picture_sets import PictureSet
from dalle2_jax.evaluate.stage_examples import StageExamples
from dalle2_jax.generate.pipeline import Pipeline
from dalle2_jax.runtime import checkpoint, modeldir

BATCH = 64  # pictures at a time
DRAWINGS = 256  # of a gate
BITS, BITS_STEPS = 32, 1000  # pictures, and steps of the bound (all), of bits per dimension


@dataclasses.dataclass(frozen=True)
class Training:
    """One stage to train.

    Attributes:
      name: of its workdir. config: of the recipe, such as 'ddpm/tiny' or 'glide/tiny:reader'.
      flags: further flags; '{dir}' is the system's folder.
      arm: trained for a comparison alone; its minutes are counted apart.
    """

    name: str
    config: str
    flags: tuple[str, ...] = ()
    arm: bool = False


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A system's tiny recipe.

    Attributes:
      title: of its row.
      trainings: in their order.
      models: name of a model directory -> role -> workdir, or workdirs for 'upsamplers'. The first one draws.
      measure: draws and scores.
    """

    title: str
    trainings: tuple[Training, ...]
    models: dict[str, dict[str, str]]
    measure: Callable[["Trained"], list[Score]]


class Trained:
    """The model directories of a trained recipe, and the pictures that they draw.

    Attributes:
      folder: of the system. names: of the models. grid: pictures and labels of its grid.
      grammar: of the scenes that it was trained on.
    """

    def __init__(self, folder: Path, names: Sequence[str]):
        self.folder, self.names = folder, tuple(names)
        self.grid: tuple[list[np.ndarray], list[str]] = ([], [])
        self.grammar = scenes.preset("quickstart")

    @functools.cache  # noqa: B019  (one object a process)
    def model(self, name: str = "") -> Pipeline:
        """A model directory by name; the first by default."""
        return Pipeline.load(self.folder / "models" / (name or self.names[0]))

    def at_step(self, step: int, stage: str = "decoder") -> str:
        """The name of a copy of the first model with the average of a stage's checkpoint `step`."""
        name = f"step{step}"
        source, out = (self.folder / "models" / one for one in (self.names[0], name))
        if not out.exists():
            params = checkpoint.restore_ema_params(self.folder / stage, step)
            config = json.loads((source / stage / modeldir.CONFIG_FILE).read_text())
            shutil.copytree(source, out)
            modeldir.save_stage(out / stage, config, params)
        return name

    def bits(self, name: str = "") -> np.ndarray:
        """Bits per dimension [BITS] of a model of pictures of the validation split, by BITS_STEPS steps."""
        engine, examples = self.model(name).engine, StageExamples(self.model(name).engine, "decoder")
        pictures = self.scenes("validation", BITS)
        images, texts = [item.picture() for item in pictures.items()], pictures.texts
        batch = examples.make(images, texts, seed=0) | {"number": np.arange(BITS, dtype=np.uint32)}
        print(f"bits per dimension of {name or self.names[0]}", flush=True)
        return bpd.bits_of(engine, batch, examples, num_steps=BITS_STEPS, progress=_Progress())["bpd"]

    def histogram_bits(self) -> np.ndarray:
        """Bits per dimension [BITS] of the same pictures by a histogram of each channel in training."""
        examples = StageExamples(self.model().engine, "decoder")
        seen, held_out = (
            examples.make([item.picture() for item in some.items()], some.texts, seed=0)["image"]
            for some in (self.scenes("train", 512), self.scenes("validation", BITS))
        )
        return bpd.histogram_bits(seen, held_out)

    def scenes(self, split: str, count: int) -> PictureSet:
        """Rendered scenes of a split, 64 pixels."""
        return picture_sets.scene_pictures(self.grammar, 64, count, 0, (split,))

    def draw(self, captions: Sequence[str] | int, model: str = "", **settings) -> np.ndarray:
        """Pictures uint8 [N, H, W, 3]: one a caption, or N of a model that reads none.

        Picture i has number i, so the same count of captions has the same noise in every set.
        """
        if isinstance(captions, int):
            captions = ["a picture"] * captions
        changes = "_".join(f"{key}={value}" for key, value in settings.items())
        name = f"{model or self.names[0]}_{len(captions)}{_key(captions)}{'_' + changes if changes else ''}"
        print(f"drawing {name}", flush=True)
        found = drawing.drawn_pictures(
            self.model(model),
            captions,
            self.folder / "drawn" / name,
            numbers=range(len(captions)),
            settings=settings,
            batch_size=BATCH,
            progress=_Progress(),
        )
        return np.stack([item.picture() for item in found.items()])

    def captions(self, kind: str, n: int) -> list[str]:
        """`n` captions of the kinds of `scenes.KINDS` that begin with `kind`, the same number of each.

        They have the wordings that the first model trained on: the plain one, or any.
        """
        kinds = [name for name in scenes.KINDS if name.startswith(kind)]
        counts = [n // len(kinds) + (i < n % len(kinds)) for i in range(len(kinds))]
        configs = self.model().engine.configs.values()
        plain = any(config["data"].get("caption_field") == "caption" for config in configs)
        texts: list[str] = []
        for name, count in zip(kinds, counts, strict=True):
            if plain:
                some = scenes.evaluation_scenes(self.grammar, name, count, 1)
                texts += [scenes.caption(scene) for scene in some]
            else:
                texts += scenes.evaluation_captions(self.grammar, name, count)
        return texts

    def named(self, images: np.ndarray, captions: Sequence[str], show: int = 0) -> np.ndarray:
        """bool [N]: colour, shape and relation are right; `show` of the pictures go to the grid."""
        check = scenes_metric.load_checker()
        verdicts = [check(image, text) for image, text in zip(images, captions, strict=True)]
        right = np.array([bool(scenes_metric.verdict_aspects(verdict)["named"]) for verdict in verdicts])
        chosen = np.linspace(0, len(images) - 1, show).astype(int) if show else ()
        for i in chosen:
            self.show(images[i], f"{'right' if right[i] else 'WRONG'}: {captions[i]}")
        return right

    def legal(self, images: np.ndarray, show: int = 0) -> np.ndarray:
        """bool [N]: the picture is a scene; see `evaluate.scenes.is_legal`."""
        check = scenes_metric.load_checker("is_legal")
        right = np.array([check(image) for image in images])
        for image, one in list(zip(images, right, strict=True))[:show]:
            self.show(image, "legal" if one else "not legal")
        return right

    def show(self, image: np.ndarray, label: str) -> None:
        """Add a picture to the grid."""
        self.grid[0].append(image)
        self.grid[1].append(label)


def class_captions(classes: list[str]) -> list[str]:
    """DRAWINGS captions such as 'an orange star': each class in turn."""
    names = itertools.islice(itertools.cycle(classes), DRAWINGS)
    return [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]


def _key(captions: Sequence[str]) -> str:
    """A short name of a list of captions; '' for pictures without captions."""
    if not any(text != "a picture" for text in captions):
        return ""
    return "_" + hashlib.sha256("\n".join(captions).encode()).hexdigest()[:8]


class _Progress:
    """Prints the drawn share and the time that is left, every ten seconds."""

    def __init__(self):
        self.said = time.monotonic()

    def __call__(self, step: str, done: int, count: int, seconds: float) -> None:
        if done < count and time.monotonic() - self.said < 10:
            return
        self.said = time.monotonic()
        left = seconds / max(done, 1) * (count - done)
        print(f"  {step}: {done} of {count}, {left:.0f} s left", flush=True)
