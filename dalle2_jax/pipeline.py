"""The classes that users import."""

from dalle2_jax.edit import actions
from dalle2_jax.generate import unclip
from dalle2_jax.generate.captions import check_captions
from dalle2_jax.generate.pipeline import Pipeline, Result
from dalle2_jax.studio.explain import explain

__all__ = ["Pipeline", "Result", "UnCLIP", "check_captions"]


class UnCLIP(Pipeline):
    """A `Pipeline` with unCLIP's stages, edits and explanations as methods. Make one with `UnCLIP.load`."""

    sample_prior, decode, upsample = unclip.sample_prior, unclip.decode, unclip.upsample
    invert, from_latents, base_pictures = actions.invert, actions.from_latents, actions.base_pictures
    variations, interpolate, textdiff = actions.variations, actions.interpolate, actions.textdiff
    image_to_image, inpaint, outpaint = actions.image_to_image, actions.inpaint, actions.outpaint
    reconstruct, upscale, rank = actions.reconstruct, actions.upscale, actions.rank
    explain = explain
