"""A step of an action: one operation of one stage."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from dalle2_jax.models import models
from dalle2_jax.models.stages import Op

# Fields that are pictures: uint8 between steps, float32 in [-1, 1] inside a stage.
PICTURES = ("image", "video", "low_res", "init", "inpaint_image")
# Fields of `batch_spec` that training alone reads.
_TRAINING_ONLY = ("crop_yx",)


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation of one stage, within an action.

    Attributes:
      name: of the step; its outputs are 'NAME.FIELD', its settings and its timing are found by it.
      stage: the stage in the model.
      do: the name of the stage's operation: 'sample', 'invert', 'encode_text', 'encode_image'.
      op: what that operation reads and writes, of the stage's `ops`.
      fold: the number that is folded into the keys of a random operation; None: it is not random.
      bind: field -> 'STEP.FIELD', where it comes from; other fields come from the captions.
      optional: further fields that may be given, or bound.
      fixed: settings of the operation that the system fixes, such as strength=0.5.
      role: whose settings it takes, such as 'upsampler'; '' for none.
      guides: stages that may steer it by their `log_p`.
    """

    name: str
    stage: str
    do: str
    op: Op
    fold: int | None = None
    bind: Mapping[str, str] = dataclasses.field(default_factory=dict)
    optional: tuple[str, ...] = ()
    fixed: Mapping[str, object] = dataclasses.field(default_factory=dict)
    role: str = ""
    guides: tuple[str, ...] = ()

    @property
    def writes(self) -> tuple[str, ...]:
        """The fields that the operation returns, in their order."""
        return self.op.writes

    @property
    def reads(self) -> tuple[str, ...] | None:
        """The fields that the operation takes one by one; None: it takes the batch."""
        return self.op.reads

    def specs(self, stage) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of one example of each field that the step reads; pictures are uint8."""
        found, specs = {}, stage.batch_spec(1)
        if set(self.reads or ()) - specs.keys():  # codes, which the stage itself encodes
            specs = specs | models.encoded_specs(stage)
        for name, spec in specs.items():
            of_batch = name not in (*self.writes, *_TRAINING_ONLY)
            if of_batch if self.reads is None else name in self.reads:
                dtype = np.uint8 if name in PICTURES else spec.dtype
                found[name] = jax.ShapeDtypeStruct(spec.shape[1:], dtype)
        return found
