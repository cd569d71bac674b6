"""What OpenAI's files do not say of themselves: the order of attention, and whether times are scaled; the
released sizes of DeepFloyd IF."""

import numpy as np
import pytest

from dalle2_jax.convert import tables
from dalle2_jax.convert.formats import adm, deepfloyd, iddpm
from dalle2_jax.convert.formats.karlo import BLOCK_TYPES
from dalle2_jax.convert.formats.unet import adm_rows
from dalle2_jax.models import models


def test_queries_keys_and_values_are_in_the_order_of_the_file():
    """By head, each q k v; or in three blocks, as in ADM's 64 x 64 alone."""
    assert [key for key, released in adm.RELEASED.items() if released.get("blocks")] == [("decoder", 64)]
    attention = {"qkv": {"kernel": np.zeros((8, 24))}, "out": {"bias": np.zeros(8)}}
    net = dict(conv_in={}, norm_out={}, mid_attn=attention)
    theirs = np.arange(24.0)[:, None, None].repeat(8, axis=1)  # [out, in, 1]
    first, second = np.arange(4), 12 + np.arange(4)  # the queries of two heads; keys and values follow
    by_head = np.concatenate([head + 4 * part for part in range(3) for head in (first, second)])
    for blocks, expected in ((False, by_head), (True, np.arange(24))):
        rows = {row.ours: row for row in adm_rows({"net": net}, num_heads=2, blocks=blocks)}
        np.testing.assert_array_equal(rows["net/mid_attn/qkv/kernel"].layout.join([theirs])[0], expected)


def test_times_are_scaled_in_the_small_networks_without_classes():
    scaled = [key for key, (_, _, _, scaled) in iddpm.RELEASED.items() if scaled]
    assert scaled == [("decoder", 32, False), ("decoder", 64, False)]


# IF-I-XL-v1.0 and IF-II-L-v1.0: the settings of their networks in diffusers' names, where levels attend
IF_ONE = dict(sample_size=64, block_out_channels=[704, 1408, 2112, 2816], layers_per_block=3, in_channels=3)
IF_TWO = dict(sample_size=256, block_out_channels=[160, 320, 640, 960, 1280], in_channels=6)
IF_TWO |= dict(layers_per_block=[2, 2, 3, 5, 5], class_embed_type="timestep", time_embedding_dim=1280)
IF_TWO |= dict(time_embedding_act_fn="gelu", resnet_skip_time_act=True)
IF_TWO |= dict(resnet_out_scale_factor=1.414, mid_block_scale_factor=1.414)


@pytest.mark.parametrize(
    "config, attends, count",
    [(IF_ONE, (0, 1, 1, 1), 4_304_695_110), (IF_TWO, (0, 0, 0, 1, 1), 1_243_277_190)],
    ids=["I", "II"],
)
def test_stages_of_if_have_the_counts_of_diffusers_classes(config, attends, count):
    """Of shapes alone: ours, and those of the tensors that the table writes, each of them once."""
    config = dict(deepfloyd.FIXED, class_embed_type=None, mid_block_scale_factor=1) | config
    config |= dict(encoder_hid_dim=4096, cross_attention_dim=config["block_out_channels"][-1])
    config |= dict(addition_embed_type_num_heads=64, attention_head_dim=64)
    config |= dict(down_block_types=[BLOCK_TYPES[yes == 1][0] for yes in attends])
    config |= dict(up_block_types=[BLOCK_TYPES[yes == 1][1] for yes in reversed(attends)])
    scheduler = deepfloyd.NOISE | dict(num_train_timesteps=1000)
    stage, model = deepfloyd.settings(config, scheduler, "IF")
    params = models.abstract_params(models.build_stage({"stage": stage, "model": model}))
    shapes = tables.expected_shapes(deepfloyd.rows(params), params)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count
