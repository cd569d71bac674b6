"""Decoder on emoji in styles: 32 x 32; 370 GFLOP a step, so about ten hours on two cores of 45 GFLOP/s each.

python -m dalle2_jax.train --config=configs/emoji_styles/decoder.py --workdir=DIR --config.clip=CLIP \
    --config.data.path=SHARDS

The loss weighs noise by Min-SNR: the same network then learns shapes much faster (docs/systems.md). The rate
is constant but for the last fifth of `num_steps`, so the run can be cut into parts and made longer:

- A signal (`timeout 9000 python -m ...`) saves and ends the run. The same command goes on to the bit.
- A larger --config.num_steps with the same workdir also goes on. The rate falls at the new end.
- Where the workdir is gone, --config.init_from=MODEL begins a new run at the weights of an old one, with
  --config.num_steps for the steps that are left. Moments and the average begin anew.
"""

from dalle2_jax.configs.emoji_styles import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=8000, batch_size=64, learning_rate=2e-3)
    config.stage = "decoder"
    config.model = dict(
        image_size=32,
        embed_dim=common.EMBED_DIM,
        channels=48,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=1,
        attention_resolutions=(8, 4),
        head_dim=24,
        dropout=0.1,
        text=dict(common.TEXT, width=192, depth=3, num_heads=6),
        image_drop=0.2,
        text_drop=0.2,
        objective="v",
        weighting="min_snr",
        learned_variance=False,
        num_steps=25,
        method="ddim",
        guidance_scale=2.0,
    )
    config.optim.update(beta2=0.99, muon_learning_rate=0.02, schedule="linear", decay_fraction=0.2)
    return config
