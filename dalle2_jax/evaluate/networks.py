"""The networks that read pictures: FID's Inception, a CLIP, LAION's aesthetic head on it, a classifier.

CLIP and classifier are the measured model's, or a judge's: those of any other model, so that a model is not
judged by the network that guided it, and a model without CLIP can be judged at all.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dalle2_jax import pipeline
from dalle2_jax.convert import convert, inception_weights
from dalle2_jax.evaluate import inception
from dalle2_jax.evaluate.features import (
    BATCH_SIZE,
    Extractor,
    classifier_extractor,
    clip_extractor,
    inception_extractor,
)
from dalle2_jax.evaluate.presets import PRESETS
from dalle2_jax.runtime import hub, modeldir

# The file that shows a folder's format of CLIP weights, and that format's name in `convert`.
CLIP_FOLDERS = {"open_clip_config.json": "open-clip", "config.json": "hf-clip"}


def has_clip(model: pipeline.Pipeline) -> bool:
    """Whether the model directory holds a CLIP."""
    return "clip" in model.engine.stages


def has_classifier(model: pipeline.Pipeline) -> bool:
    """Whether the model directory holds a classifier."""
    return "classifier" in model.engine.stages


@contextlib.contextmanager
def open_judge(path: str) -> Iterator[pipeline.Pipeline]:
    """Open the judge at `path`: a model directory (also hf://OWNER/NAME@COMMIT) with a CLIP, a classifier or
    both, or a folder that OpenCLIP or transformers wrote. Such a folder is converted into a temporary model
    directory.

    Raises FileNotFoundError or ValueError for anything else.
    """
    folder = Path(hub.local(path))
    kind = next((name for file, name in CLIP_FOLDERS.items() if (folder / file).is_file()), None)
    with tempfile.TemporaryDirectory() as converted:
        if kind and not (folder / modeldir.INDEX_FILE).is_file():
            convert.convert_weights(kind, folder, converted, dtype="float32", name=folder.name)
            folder = Path(converted)
        judge = pipeline.UnCLIP.load(folder)
        if not has_clip(judge) and not has_classifier(judge):
            stages = ", ".join(judge.engine.stages)
            raise ValueError(f"--judge={path} holds no CLIP and no classifier: it has {stages}")
        yield judge


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks that read pictures; a metric without its network is refused.

    Attributes:
      inception: `inception_weights.Weights` or None.
      preset: name in PRESETS, how pictures are prepared for Inception.
      clip, classifier: a `Pipeline` whose CLIP embeds pictures and captions, whose classifier names the
        classes of pictures; or None.
      judge: whether these are of another model than the measured one.
      head: result of `metrics.aesthetic.load`, or None.
      batch_size: pictures at a time.
    """

    inception: Any = None
    preset: str = "ttur"
    clip: Any = None
    judge: bool = False
    head: Any = None
    batch_size: int = BATCH_SIZE
    classifier: Any = None

    def extractor(self, network: str) -> Extractor:
        """The functions that compute features by 'inception', 'clip' or 'classifier'."""
        if network == "clip":
            return clip_extractor(self.clip, self.batch_size)
        if network == "classifier":
            return classifier_extractor(self.classifier, self.batch_size)
        return inception_extractor(self.inception, self.preset, self.batch_size)

    def describe(self, network: str) -> dict:
        """JSON values that identify 'inception', 'clip' or 'classifier' and how it reads pictures."""
        if network != "inception":
            model, what = (self.clip, "CLIP") if network == "clip" else (self.classifier, "classifier")
            resized = "shorter side bicubic" if network == "clip" else "halved, then bicubic,"
            return {
                "features": f"{what} of the {'judge' if self.judge else 'model'} {model.name}",
                "resize": f"{resized} to {model.engine.stage(network).image_size}, central square",
                "weights_sha256": model.engine.weights_sha256(network),
            }
        preset = PRESETS[self.preset]
        return {
            "features": inception_weights.NETWORK,
            "preset": self.preset,
            "resize": f"{preset.what}; then {inception.RULES[preset.rule].what} to 299 x 299",
            "weights_sha256": self.inception.sha256,
            "source_sha256": self.inception.source_sha256,
        }

    def judged_by(self) -> str:
        """'CLIP', 'classifier' or 'CLIP and classifier'."""
        held = {"CLIP": self.clip, "classifier": self.classifier}
        return " and ".join(name for name, model in held.items() if model)

    def judge_summary(self) -> dict | None:
        """Name and sha256 of the judge as JSON values, or None without a judge."""
        if not self.judge:
            return None
        found = {"name": (self.clip or self.classifier).name}
        if self.clip:
            found["weights_sha256"] = self.clip.engine.weights_sha256("clip")
        if self.classifier:
            found["classifier_sha256"] = self.classifier.engine.weights_sha256("classifier")
        return found


def network_of(features: str) -> str:
    """The network that computes these features: 'inception', 'clip' or 'classifier'."""
    return {"clip": "clip", "classes": "classifier"}.get(features, "inception")
