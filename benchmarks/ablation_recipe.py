"""The recipe of `benchmarks.ablations`: a small decoder, and the ways in which it is changed.

    python -m dalle2_jax.train --config=benchmarks/ablation_recipe.py:scenes,unet,v --workdir=DIR

The first word is the data: `scenes` (16 x 16, on CLIP's embeddings; configs/tiny/decoder.py) or
`emoji_styles` (32 x 32, on captions alone). Each further word changes one thing; without one the network is a
transformer on pixel patches that predicts x0 with the loss in v, by Muon, with products in bfloat16.
"""

from dalle2_jax.configs.emoji_styles import common as emoji
from dalle2_jax.configs.tiny import decoder

UNET = ("channels", "channel_mult", "num_res_blocks", "attention_resolutions", "head_dim")
VIT = {
    "scenes": dict(patch_size=2, width=192, depth=6, num_heads=6),
    "emoji_styles": dict(patch_size=4, width=256, depth=6, num_heads=8),
}
PATCH = {"patch2": 2, "patch4": 4}
OBJECTIVES = {
    "x0": dict(objective="x0", weighting="v"),
    "eps": dict(objective="eps", weighting="uniform"),
    "v": dict(objective="v", weighting="uniform"),
    "min_snr": dict(weighting="min_snr"),
    # JiT's loss and times (arXiv 2511.13720), Euler's steps
    "flow": dict(
        objective="x0",
        schedule="flow",
        weighting="flow",
        process=dict(times="logit_normal", time_mean=0.8, time_std=0.8),
        method="euler",
    ),
}
ADAMW_RATE = 1e-3
CHANGES = ("unet", "adamw", "float32", *PATCH, *OBJECTIVES)


def get_config(preset: str):
    """`preset`: the data, then changes, with commas between."""
    data, *changes = preset.split(",")
    unknown = [word for word in changes if word not in CHANGES]
    if data not in VIT or unknown:
        raise ValueError(f"{preset!r} must be one of {', '.join(VIT)}, then some of {', '.join(CHANGES)}")
    config = decoder.get_config() if data == "scenes" else _emoji()
    if "unet" not in changes:
        for name in UNET:
            del config.model[name]
        config.model.net = dict(kind="vit", bottleneck=0, context_tokens=8, **VIT[data])
    config.model.update(OBJECTIVES["x0"])
    for word in changes:
        config.model.update(OBJECTIVES.get(word, {}))
        if word in PATCH:
            config.model.net.patch_size = PATCH[word]
    if "adamw" in changes:
        config.optim.update(learning_rate=ADAMW_RATE, muon_learning_rate=0.0)
    config.cpu_products = "float32" if "float32" in changes else "bfloat16"
    config.sample_every = 10**9
    return config


def _emoji():
    config = emoji.get_config(num_steps=1000, batch_size=64, learning_rate=2e-3)
    config.stage = "decoder"
    config.model = dict(
        image_size=32,
        embed_dim=0,
        channels=32,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=1,
        attention_resolutions=(8, 4),
        head_dim=16,
        dropout=0.0,
        text=emoji.TEXT,
        text_drop=0.1,
        learned_variance=False,
        num_steps=25,
        method="ddim",
        guidance_scale=2.0,
    )
    config.optim.update(beta2=0.99, muon_learning_rate=0.02, final_fraction=0.25)
    config.ema_decay = 0.997
    config.data.language = "en"
    return config
