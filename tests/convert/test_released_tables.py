"""What OpenAI's files do not say of themselves: the order of attention, and whether times are scaled."""

import numpy as np

from dalle2_jax.convert.formats import adm, iddpm
from dalle2_jax.convert.formats.unet import adm_rows


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
