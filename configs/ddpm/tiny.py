"""DDPM at 16 x 16 on scenes, without captions.

The error in eps is weighed by 1 / (1 + SNR)^0.5 (P2, arXiv 2204.00227): with a plain loss a run of this
length draws hardly any shape clearly, and with less weight at little noise its pictures stay grainy.

python -m dalle2_jax.train --config=configs/ddpm/tiny.py --workdir=DIR
"""

from dalle2_jax.configs.ddpm.common import NET
from dalle2_jax.configs.tiny import common


def get_config(preset: str = ""):
    """No presets."""
    common.common.check_preset(preset, ())
    config = common.get_config(num_steps=6000, batch_size=32, learning_rate=2e-3)
    config.stage = "decoder"
    config.model = dict(
        image_size=16,
        embed_dim=0,
        channels=32,
        channel_mult=(1, 2, 3),
        num_res_blocks=1,
        attention_resolutions=(8, 4),
        num_heads=1,
        dropout=0.0,
        scale_shift=False,
        schedule="linear",
        learned_variance=False,
        weighting="p2:0.5",
        process=dict(fixed_variance=1.0),
        num_steps=250,
        method="ddpm",
        net=dict(NET, norm_groups=0),
    )
    config.optim.update(beta2=0.99, muon_learning_rate=0.02, final_fraction=0.02)
    config.ema_decay = 0.997
    return config
