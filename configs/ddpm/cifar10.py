"""DDPM on CIFAR-10, 32 x 32 (appendix B): 35.7M parameters, FID 3.17.

python -m dalle2_jax.train --config=configs/ddpm/cifar10.py --workdir=DIR
"""

from dalle2_jax.configs.ddpm import common


def get_config(preset: str = ""):
    """`preset`: '' or 'debug'."""
    common.common.check_preset(preset, ("debug",))
    config = common.get_config(dict(image_size=32, channel_mult=(1, 2, 2, 2), dropout=0.1))
    config.data.update(source="tfds", path="cifar10", eval_split="test", flip=True)
    config.optim.learning_rate = 2e-4
    config.batch_size, config.num_steps = 128, 800_000
    if preset == "debug":
        small = dict(image_size=16, channels=16, channel_mult=(1, 2), num_res_blocks=1, num_steps=4)
        common.common.debug(
            config, small | dict(attention_resolutions=(8,), net=dict(common.NET, norm_groups=4))
        )
    return config
