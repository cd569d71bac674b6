"""DALL-E 1's dVAE at 256 x 256 (section 2.1, appendix A): 32 x 32 codes of 8192; 53.8M and 43.8M parameters.

python -m dalle2_jax.train --config=configs/dalle1/dvae.py --workdir=DIR --config.data.path=SHARDS

The paper crops windows of random sizes; here their place alone is random.
"""

from dalle2_jax.configs import common


def get_config(preset: str = ""):
    """No presets."""
    common.check_preset(preset, ())
    config = common.get_config()
    config.stage = "tokenizer"
    config.model = dict(
        image_size=256,
        net=dict(kind="dvae", channels=256),
        quantizer=dict(
            kind="gumbel",
            num_codes=8192,
            width=128,
            tau=(1.0, 1 / 16, 150_000),  # start, end, steps of a cosine
            beta=(0.0, 6.6, 5000),
        ),
        likelihood="logit_laplace",
    )
    config.data.update(flip=True, random_crop=True)
    config.optim.update(
        learning_rate=1e-4,
        schedule="cosine",
        final_fraction=0.0125,
        decay_steps=1_200_000,
        warmup_steps=0,
        weight_decay=1e-4,
    )
    config.batch_size, config.num_steps, config.ema_decay = 512, 3_000_000, 0.999
    return config
