"""The paper's prior by flow matching: text -> CLIP's image embedding along straight paths (as BLIP3-o, arXiv
2505.09568, which finds that this beats drawing pictures from text alone).

    python -m dalle2_jax.train --config=configs/modern/prior.py --workdir=DIR --config.clip=CLIP
    --config.data.path=SHARDS

Network, batch and steps are those of configs/prior.py. `:debug` is the same code in small, for a laptop.
"""

from dalle2_jax.configs import prior

FLOW = dict(schedule="flow", objective="flow", process=dict(times="logit_normal"), method="euler")


def get_config(preset: str = ""):
    """`preset`: '' or 'debug'."""
    config = prior.get_config(preset)
    config.model.update(FLOW)
    if not preset:
        config.model.num_steps = 30
    return config
