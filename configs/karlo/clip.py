"""Karlo's CLIP, a ViT-L/14 whose embeddings keep their norm; the released one has OpenAI's weights.

    python -m dalle2_jax.train --config=configs/karlo/clip.py --workdir=DIR --config.data.path=SHARDS

The settings of training are those of configs/clip.py without SAM. `:debug` is the same code in small.
"""

from dalle2_jax.configs import clip


def get_config(preset: str = ""):
    """`preset`: '' or 'debug'."""
    config = clip.get_config(preset)
    config.model.update(activation="quick_gelu", unit_embeds=False, sam_rho=0.0)
    if not preset:
        config.model.update(
            embed_dim=768,
            image_size=224,
            vision=dict(kind="vit", patch_size=14, width=1024, depth=24, num_heads=16),
            text=dict(vocab_size=49408, context_length=77, width=768, depth=12, num_heads=12),
        )
    return config
