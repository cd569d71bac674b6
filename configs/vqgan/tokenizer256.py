"""VQGAN at 256 x 256: 16 x 16 codes of 1024 or 16,384 (f16), or 32 x 32 codes of 8192 (f8).

python -m dalle2_jax.train --config=configs/vqgan/tokenizer256.py:f8 --workdir=DIR --config.data.path=SHARDS

The paper's feature loss is LPIPS, whose weights are the user's: --config.model.adversarial.features=lpips and
--config.frozen.features=MODEL. Without them the discriminator's activations take its place, another loss.
"""

from dalle2_jax.configs import common

BATCH = 96


def get_config(preset: str = ""):
    """`preset`: '' (1024 codes), '16384' or 'f8'."""
    common.check_preset(preset, ("16384", "f8"))
    config = common.get_config()
    config.stage = "tokenizer"
    mults, side = ((1, 1, 2, 4), 32) if preset == "f8" else ((1, 1, 2, 2, 4), 16)
    config.model = dict(
        image_size=256,
        net=dict(kind="vqgan", channels=128, channel_mult=mults, attention_resolutions=(side,)),
        quantizer=dict(
            kind="vq", num_codes={"16384": 16_384, "f8": 8192}.get(preset, 1024), width=256, decay=0.0
        ),
        likelihood="l1",
        adversarial=dict(weight=0.8, start=250_001, features="discriminator"),
    )
    config.data.update(flip=True, random_crop=True)
    config.optim.update(learning_rate=4.5e-6 * BATCH, beta1=0.5, beta2=0.9, warmup_steps=0)
    config.batch_size, config.num_steps = BATCH, 1_000_000
    return config
