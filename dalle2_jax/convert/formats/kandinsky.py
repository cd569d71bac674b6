"""Kandinsky 2.2's prior as diffusers' KandinskyV22PriorPipeline: CLIP and the prior.

It is Karlo's prior on the embeddings of another CLIP (ViT-bigG/14). Use it with a decoder that was trained on
that CLIP's embeddings, or as `init_from` of a prior. Kandinsky's decoder draws the latents of a VQ-GAN and is
not read.
"""

from pathlib import Path

from dalle2_jax.convert.formats import hf_clip, karlo
from dalle2_jax.convert.formats.hf_clip import read_json
from dalle2_jax.convert.tables import Imported
from dalle2_jax.data.tokenizer import load_tokenizer

HELP = "Kandinsky 2.2's prior, a folder of diffusers' KandinskyV22PriorPipeline"
LICENCE = "Kandinsky 2.2's are Apache-2.0, its CLIP's MIT; of other weights in this layout ask their makers"


def import_weights(source: Path, tokenizer=None) -> Imported:
    """CLIP and prior in the folder `source`; without an image_encoder, CLIP's text tower alone."""
    index = read_json(source / "model_index.json")
    if index.get("_class_name") != "KandinskyV22PriorPipeline":
        raise ValueError(f"{source} holds a {index.get('_class_name')!r}, not a KandinskyV22PriorPipeline")
    vision = source / "image_encoder"
    clip, clip_params, clip_file = hf_clip.import_towers(
        source / "text_encoder", vision if vision.is_dir() else None, unit_embeds=False
    )
    tokenizer = tokenizer or load_tokenizer(source / "tokenizer", clip["model"]["text"]["context_length"])
    prior, prior_params, prior_file = karlo.read_prior(
        source / "prior", source / "scheduler", karlo.null_caption(clip, clip_params, tokenizer)
    )
    stages = {"clip": (clip, clip_params), "prior": (prior, prior_params)}
    return Imported(stages, tokenizer, [clip_file, prior_file], LICENCE)
