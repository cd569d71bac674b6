"""What the recipes of transformers on pixels share: flow matching as in JiT (arXiv 2511.13720), x0 predicted
with the loss in velocity, times whose logit is normal. JiT counts time from noise to picture: its mean is
-0.8."""

from dalle2_jax.configs import common

FLOW = dict(
    schedule="flow",
    objective="x0",
    learned_variance=False,
    weighting="flow",
    process=dict(times="logit_normal", time_mean=0.8, time_std=0.8),
)
UNET = ("channels", "channel_mult", "num_res_blocks", "attention_resolutions", "head_dim")
DEBUG = dict(patch_size=4, width=32, depth=3, num_heads=2, mlp_width=64, bottleneck=16, context_tokens=4)


def get_config(stage: str, batch_size: int, model: dict):
    """A recipe of a stage; 1M steps at the constant rate of 1e-4 after 10K steps of warm-up."""
    config = common.get_config()
    config.stage = stage
    config.model = dict(dropout=0.0, method="heun", remat="products", dtype="bfloat16")
    config.model.update(FLOW)
    config.model.update(model)
    config.optim.update(learning_rate=1e-4, beta2=0.95, eps=1e-8, weight_decay=0.0)
    config.batch_size, config.num_steps = batch_size, 1_000_000
    config.ema_decay = 0.9999
    config.mesh.update(data=1, fsdp=-1)
    return config


def without_unet(config):
    """The recipe of a stage without the settings of its U-Net."""
    for name in UNET:
        if name in config.model:
            del config.model[name]
    return config
