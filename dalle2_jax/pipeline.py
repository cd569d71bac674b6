"""What users import to draw with a model directory; it is in `generate.pipeline`."""

from dalle2_jax.generate.pipeline import Result, UnCLIP, check_captions

__all__ = ["Result", "UnCLIP", "check_captions"]
