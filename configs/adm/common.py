"""What ADM's recipes share."""

from dalle2_jax.configs import common

CLASSES = tuple(map(str, range(1000)))  # names of classes, as captions and labels have them


def get_config(stage: str, model: dict):
    """A recipe of a stage on ImageNet's classes; steps, batch and learning rate are missing."""
    config = common.get_config()
    config.stage = stage
    config.model = dict(model, remat="products", net=dict(norm_groups=32))
    config.data.classes = CLASSES
    config.optim.update(warmup_steps=0, weight_decay=0.0)
    return config
