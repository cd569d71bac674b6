"""The fields that a stage of a model directory reads in training, made from pictures and captions."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from dalle2_jax.data import pipeline, transforms
from dalle2_jax.generate.engine import Engine
from dalle2_jax.models.frozen import Frozen


class StageExamples:
    """Makes batches of one stage: pictures cut as in training without mirroring, tokens, classes.

    Attributes:
      frozen: computes the fields that the model's other stages encode.
      uses: what `frozen` calls these stages -> their names in the model.
      reads: the fields of a batch that `make` returns.

    Raises ValueError for a stage that uses one that the model lacks.
    """

    def __init__(self, model: Engine, name: str):
        stage, used = model.stage(name), model.entries[name]["uses"]
        self.uses = {called: used.get(called, own) for called, own in model.system.uses(stage).items()}
        self.frozen = Frozen(stage, {called: model.stage(own) for called, own in self.uses.items()})
        self.reads = frozenset(self.frozen.dataset_spec(1))
        own_length = getattr(stage, "context_length", None)
        tokens = "tokens" in self.reads
        self._tokenizer = model.tokenizer(name if own_length else "clip") if tokens else None
        self._classes = model.configs[name]["data"].get("classes", ()) if "label" in self.reads else ()
        encoders = self.frozen.stages.items()
        sides = {f"{called}.image": getattr(encoder, "image_size", 0) for called, encoder in encoders}
        self._views = transforms.Views(
            image_size=stage.image_size if "image" in self.reads else None,
            image_sizes={field: side for field, side in sides.items() if field in self.reads},
            low_res_size=stage.low_res_size if "low_res" in self.reads else None,
            crop_size=stage.crop_size if "crop_yx" in self.reads else None,
        )

    @property
    def reads_captions(self) -> bool:
        """Whether `make` needs captions: for their tokens, or for the classes that they name."""
        return bool(self.reads & {"tokens", "label"})

    def make(
        self, images: Sequence[np.ndarray], captions: Sequence[str], seed: int, first: int = 0
    ) -> dict[str, np.ndarray]:
        """The fields `reads` of pictures uint8 [H, W, 3] of any sizes, arrays [N, ...]; pictures are uint8.

        A class is -1 where a caption does not name exactly one. seed, first: windows of an upsampler are
        those of records `first`, `first` + 1, ... of a dataset with this seed.
        """
        draws = transforms.uniforms(seed, 0, np.arange(first, first + len(images)))
        made = [self._views.make(Image.fromarray(x), u) for x, u in zip(images, draws, strict=True)]
        batch = {field: np.stack([one[field] for one in made]) for field in made[0]}
        if self._tokenizer is not None:
            batch["tokens"], batch["token_mask"] = self._tokenizer(list(captions))
        if self._classes:
            batch["label"] = np.array([pipeline.label_of(text, self._classes) for text in captions], np.int32)
        return {field: value for field, value in batch.items() if field in self.reads}
