"""GLIDE's base model, captions -> 64 x 64: the paper's 3.5B by default, or `released`, 385M.

python -m dalle2_jax.train --config=configs/glide/decoder.py --workdir=DIR --config.data.path=SHARDS

Fine-tuning for guidance drops a fifth of the captions (its section 3.1); the text's vocabulary is GPT-2's.
"""

from dalle2_jax.configs import common

VOCABULARY = 50_257


def get_config(preset: str = ""):
    """`preset`: '' or 'released'."""
    common.check_preset(preset, ("released",))
    config = common.get_config()
    config.stage = "decoder"
    text = dict(width=2048, depth=24, num_heads=32)
    if preset == "released":
        text = dict(width=512, depth=16, num_heads=8)
    config.model = dict(
        image_size=64,
        embed_dim=0,
        channels=192 if preset else 512,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=3,
        attention_resolutions=(32, 16, 8),
        head_dim=64,
        dropout=0.1,
        text=dict(text, vocab_size=VOCABULARY, context_length=128),
        text_drop=0.2,
        schedule="cosine",
        learned_variance=True,
        num_steps=250,
        method="ddpm",
        guidance_scale=3.0,
        remat="products",
        dtype="bfloat16",
        net=dict(norm_groups=32),
    )
    config.tokenizer.update(vocab_size=VOCABULARY, context_length=128)
    config.optim.update(learning_rate=1e-4, weight_decay=0.0)
    config.num_steps, config.batch_size = 2_500_000, 2048
    config.mesh.update(data=1, fsdp=-1)
    return config
