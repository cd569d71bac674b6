"""Karlo's prior: 20 x 2048 on the states of CLIP's text tower, embeddings scaled by their mean and deviation.

    python -m dalle2_jax.train --config=configs/karlo/prior.py --workdir=DIR --config.clip=CLIP
    --config.data.path=SHARDS

The architecture is that of the released weights; the settings of training are those of configs/prior.py.
`:debug` is the same code in small.
"""

from dalle2_jax.configs import prior


def get_config(preset: str = ""):
    """`preset`: '' or 'debug'."""
    config = prior.get_config(preset)
    if preset:
        del config.model.text.vocab_size
        config.model.text.states_width = config.model.embed_dim
    else:
        config.model.update(embed_dim=768, num_steps=25)
        config.model.text = dict(states_width=768, context_length=77, width=2048, depth=20, num_heads=32)
        config.tokenizer.context_length = 77
    config.model.text.null_tokens = 2  # of the caption "": its two ends
    config.model.update(
        embed_scale=dict(mode="meanstd"),
        text_drop=0.2,
        method="ddpm",
        num_candidates=1,
        guidance_scale=4.0,
        clip_range=5.0,
    )
    return config
