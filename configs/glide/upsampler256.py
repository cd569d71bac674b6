"""GLIDE's upsampler, 64 -> 256 with the caption.

python -m dalle2_jax.train --config=configs/glide/upsampler256.py --workdir=DIR --config.data.path=SHARDS

preset      parameters
            398M, the released size
paper       1.5B: 384 channels, and a text transformer of width 1024; the paper does not say how deep,
            and 16 blocks make that number
inpaint     398M, fine-tuned to repaint: the network reads the kept pixels, too
"""

from dalle2_jax.configs import common
from dalle2_jax.configs.glide.decoder import VOCABULARY


def get_config(preset: str = ""):
    """`preset`: '', 'paper' or 'inpaint'."""
    common.check_preset(preset, ("paper", "inpaint"))
    text = dict(width=512, depth=16, num_heads=8)
    if preset == "paper":
        text = dict(width=1024, depth=16, num_heads=16)
    config = common.get_config()
    config.stage = "upsampler"
    config.model = dict(
        image_size=256,
        low_res_size=64,
        crop_size=256,
        channels=384 if preset == "paper" else 192,
        channel_mult=(1, 1, 2, 2, 4, 4),
        num_res_blocks=2,
        attention_resolutions=(32, 16, 8),
        head_dim=64,
        dropout=0.1,
        text=dict(text, vocab_size=VOCABULARY, context_length=128),
        resize="linear",
        schedule="linear",
        learned_variance=True,
        num_steps=27,
        spacing="fast27",
        method="ddpm" if preset == "inpaint" else "ddim",
        inpaint=preset == "inpaint",
        process=dict(noise_scale=0.997),
        remat="products",
        dtype="bfloat16",
        net=dict(norm_groups=32),
    )
    config.tokenizer.update(vocab_size=VOCABULARY, context_length=128)
    config.optim.update(learning_rate=1e-4, weight_decay=0.0)
    config.num_steps, config.batch_size = 1_600_000, 512
    config.mesh.update(data=1, fsdp=-1)
    return config
