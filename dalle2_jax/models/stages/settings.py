"""Settings of sampling: keywords of a stage's `sample` that replace the model's defaults.

A stage's module lists its settings in `SETTINGS`; the stage's `sampling` has the model's own values. Flags,
Python keywords, the studio's fields and the checks follow from the list.
"""

import dataclasses
import math

from dalle2_jax.models.diffusion.sampling import METHODS
from dalle2_jax.models.diffusion.schedules import SPACINGS


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of sampling.

    Attributes:
      name: the keyword of the stage's `sample`.
      kind: int, float, str, 'pair' (two numbers), 'list' (whole numbers, one a stage), or the texts to choose
        from.
      help: one line; {of} stands for the stage.
      low, high: the least and the most of a number.
      role: the role that takes it, such as 'prior'; systems fill it in.
    """

    name: str
    kind: type | str | tuple[str, ...]
    help: str
    low: float = -math.inf
    high: float = math.inf
    role: str = ""

    def parse(self, text: str):
        """The value of a flag's text; ValueError for another."""
        if isinstance(self.kind, tuple):
            if text not in self.kind:
                raise ValueError(f"choose one of {', '.join(self.kind)}")
            return text
        if self.kind == "list":
            numbers = text.split(",") if isinstance(text, str) else text
            if not all(str(number).strip().isdigit() for number in numbers):
                raise ValueError(f"{text!r} must be whole numbers, such as 27,15")
            return [int(number) for number in numbers]
        if self.kind == "pair":
            numbers = text.split(",") if isinstance(text, str) else text
            try:
                low, high = (float(number) for number in numbers)
            except ValueError:
                raise ValueError(f"{text!r} must be two numbers LO,HI, such as 0.2,3") from None
            return low, high
        assert isinstance(self.kind, type)
        return self.kind(text)

    def check(self, value):
        """`value` as a number of its kind; ValueError for one that is not possible."""
        if isinstance(self.kind, tuple) and value not in self.kind:
            raise ValueError(f"{self.name} {value!r} is unknown; choose one of {', '.join(self.kind)}")
        for number in value if self.kind == "pair" else [value] if self.kind in (int, float) else []:
            if not self.low <= number <= self.high:
                bounds = f"lie in {self.low:g} .. {self.high:g}"
                if self.high == math.inf:
                    bounds = f"be {self.low:g} or more"
                raise ValueError(f"{self.name} {value} must {bounds}")
        if self.kind == "pair":
            return tuple(map(float, value))
        return float(value) if self.kind is float else value


STEPS = Setting("num_steps", int, "Steps of {of}.", 1)
SCALE = Setting("guidance_scale", float, "Guidance of {of}; 1 is none.", 0, 100)
# The scale, and the rules of `diffusion.guidance.Guidance`.
GUIDANCE = (
    SCALE,
    Setting(
        "guidance_interval",
        "pair",
        "LO,HI, the noise levels sqrt((1 - abar)/abar) between which to guide {of}, such as 0.2,3.",
    ),
)
METHOD = Setting("method", METHODS, "Sampler of {of}.")
ETA = Setting("eta", float, "Noise of DDIM in {of}, 0 (none) to 1.", 0, 1)
SPACING = Setting("spacing", str, f"Choice of times of {{of}}: {', '.join(SPACINGS)}.")
THRESHOLD = Setting("threshold", float, "Percentile of dynamic thresholding in {of}, such as 99.5.", 0, 100)
CANDIDATES = Setting("num_candidates", int, "Embeddings that {of} draws; the closest is kept.", 1)
TILE = Setting("tile", int, "Side of the windows in which {of} draw larger pictures.")
TEMPERATURE = Setting("temperature", float, "Temperature of {of}; below 1 draws likelier tokens.", 1e-6)
TOKENS = (
    TEMPERATURE,
    Setting("top_k", int, "{of} draws among so many tokens; 0: all.", 0),
    Setting("top_p", float, "{of} draws among the likeliest tokens with this probability; 1: all.", 1e-6, 1),
)
