"""What ADM's recipes share."""

from dalle2_jax.configs import common


def get_config(stage: str, model: dict):
    """A recipe of a stage on ImageNet, mirrored; steps, batch and learning rate are missing."""
    config = common.get_config()
    config.stage = stage
    config.model = dict(model, remat="products", net=dict(norm_groups=32))
    config.data.flip = True
    config.optim.update(warmup_steps=0, weight_decay=0.0)
    return config
