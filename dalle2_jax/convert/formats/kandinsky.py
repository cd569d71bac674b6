"""Kandinsky 2.2's prior as diffusers' KandinskyV22PriorPipeline: CLIP and the prior.

It is Karlo's prior on the embeddings of another CLIP (ViT-bigG/14). Use it with a decoder that was trained on
that CLIP's embeddings, or as `init_from` of a prior. Kandinsky's decoder draws the latents of a VQ-GAN and is
not read.
"""

import dataclasses
from pathlib import Path

from dalle2_jax.convert.formats import karlo
from dalle2_jax.convert.tables import Imported

HELP = "Kandinsky 2.2's prior, a folder of diffusers' KandinskyV22PriorPipeline"
LICENCE = "Kandinsky 2.2's are Apache-2.0, its CLIP's MIT; of other weights in this layout ask their makers"


def import_weights(source: Path, tokenizer=None) -> Imported:
    """CLIP and prior in the folder `source`; without an image_encoder, CLIP's text tower alone."""
    read, _ = karlo.read_pipeline(source, "KandinskyV22PriorPipeline", "scheduler", tokenizer)
    return dataclasses.replace(read, licence=LICENCE)
