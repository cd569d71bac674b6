"""What DDPM's recipes share: the network of its code, linear noise, eps, the larger fixed variance."""

from dalle2_jax.configs import common

# The network beside ADM's: convolutions of stride 2 with TensorFlow's padding, sines first.
NET = dict(
    resample="conv",
    resample_pad=(0, 1),
    sin_first=True,
    freq_shift=1,
    norm_epsilon=1e-6,
    norm_groups=32,
)


def get_config(model: dict):
    """A recipe with `model` beside DDPM's settings; data, batch and steps are missing."""
    config = common.get_config()
    config.stage = "decoder"
    config.model = dict(
        embed_dim=0,
        channels=128,
        num_res_blocks=2,
        attention_resolutions=(16,),
        num_heads=1,
        scale_shift=False,
        schedule="linear",
        learned_variance=False,
        process=dict(fixed_variance=1.0),
        num_steps=1000,
        method="ddpm",
        remat="products",
        net=NET,
    )
    config.model.update(model)
    config.optim.update(warmup_steps=5000)
    return config
