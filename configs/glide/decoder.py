"""GLIDE's base model, captions -> 64 x 64.

python -m dalle2_jax.train --config=configs/glide/decoder.py --workdir=DIR --config.data.path=SHARDS
python -m dalle2_jax.train --config=configs/glide/decoder.py:guidance --workdir=DIR2 \
    --config.init_from=DIR --config.data.path=SHARDS

preset      parameters, and what it trains
            3.5B, the paper's; no caption is dropped
guidance    3.5B, fine-tuned for guidance: a fifth of the captions is dropped
released    385M, the released size, dropped likewise
inpaint     385M, fine-tuned to repaint: the network reads the kept pixels, too

Both ways are of the paper's section on training, which does not say how long it fine-tunes. The text's
vocabulary is GPT-2's.
"""

from dalle2_jax.configs import common

VOCABULARY = 50_257
SMALL = ("released", "inpaint")


def get_config(preset: str = ""):
    """`preset`: '', 'guidance', 'released' or 'inpaint'."""
    common.check_preset(preset, ("guidance", *SMALL))
    config = common.get_config()
    config.stage = "decoder"
    text = dict(width=2048, depth=24, num_heads=32)
    if preset in SMALL:
        text = dict(width=512, depth=16, num_heads=8)
    config.model = dict(
        image_size=64,
        embed_dim=0,
        channels=192 if preset in SMALL else 512,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=3,
        attention_resolutions=(32, 16, 8),
        head_dim=64,
        dropout=0.1,
        text=dict(text, vocab_size=VOCABULARY, context_length=128),
        text_drop=0.2 if preset else 0.0,
        schedule="cosine",
        learned_variance=True,
        num_steps=250,
        spacing="adm",
        method="ddpm",
        guidance_scale=3.0 if preset else 1.0,
        remat="products",
        inpaint=preset == "inpaint",
        dtype="bfloat16",
        net=dict(norm_groups=32),
    )
    config.tokenizer.update(vocab_size=VOCABULARY, context_length=128)
    config.optim.update(learning_rate=1e-4, weight_decay=0.0)
    config.num_steps, config.batch_size = 2_500_000, 2048
    config.mesh.update(data=1, fsdp=-1)
    return config
