"""Karlo's decoder: image embedding, text embedding and text states of CLIP -> 64 x 64.

    python -m dalle2_jax.train --config=configs/karlo/decoder.py --workdir=DIR --config.clip=CLIP
    --config.data.path=SHARDS

The architecture is that of the released weights; the settings of training are those of configs/decoder64.py.
`:debug` is the same code in small, with 128 channels: diffusers has 32 groups in each norm.
"""

from dalle2_jax.configs import decoder64


def get_config(preset: str = ""):
    """`preset`: '' or 'debug'."""
    config = decoder64.get_config(preset)
    if preset:
        config.model.channels = 128
        config.model.text = dict(states_width=config.model.embed_dim, context_length=32, width=32)
    else:
        config.model.update(embed_dim=768, channels=320, num_steps=25)
        config.model.text = dict(states_width=768, context_length=77, width=1536)
        config.tokenizer.context_length = 77
    config.model.text.null_tokens = 2  # of the caption "": its two ends
    config.model.update(embed_scale=1.0, text_drop=0.3, guidance_scale=8.0)
    return config
