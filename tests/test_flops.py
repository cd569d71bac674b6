"""Arithmetic counted in programs against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from configs import decoder64, upsampler256, upsampler1024
from dalle2_jax.models import flops, models


def test_products_and_convolutions_by_hand():
    a, b = jnp.ones((5, 3, 4)), jnp.ones((5, 4, 7))
    assert flops.count(jnp.matmul, a, b) == 2 * 5 * 3 * 4 * 7
    x, kernel = jnp.ones((2, 8, 6, 3)), jnp.ones((3, 3, 3, 10))
    numbers = ("NHWC", "HWIO", "NHWC")

    def conv(x, kernel, stride=1, groups=1):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    assert flops.count(conv, x, kernel) == 2 * 2 * 8 * 6 * 10 * 9 * 3
    assert flops.count(lambda x, k: conv(x, k, stride=2), x, kernel) == 2 * 2 * 4 * 3 * 10 * 9 * 3

    def doubled(x, kernel):
        return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME")

    assert flops.count(doubled, x, kernel) == 2 * 2 * 16 * 12 * 10 * 9 * 3 // 4
    assert flops.count(lambda x, k: conv(x, k, groups=3), x, jnp.ones((3, 3, 1, 9))) == 2 * 2 * 8 * 6 * 9 * 9


def test_loops_choices_and_what_is_called():
    x = jnp.ones((4, 4))
    one = 2 * 4**3

    def loop(x):
        return jax.lax.scan(lambda carry, _: (jax.jit(jnp.matmul)(carry, x), None), x, None, length=7)[0]

    assert flops.count(loop, x) == 7 * one
    assert flops.count(jax.checkpoint(lambda x: x @ x @ x), x) == 2 * one
    assert flops.count(lambda x: jax.lax.cond(x[0, 0] > 0, loop, lambda x: x @ x, x), x) == 7 * one
    assert flops.count(jnp.sin, x) == 0
    assert flops.count(jnp.matmul, *[jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)] * 2) == one


@pytest.mark.parametrize(
    ("recipe", "tera"),
    [pytest.param(decoder64, 4.51, marks=pytest.mark.slow), (upsampler256, 1.60), (upsampler1024, 3.72)],
)
def test_the_papers_networks_have_the_flops_of_adms(recipe, tera):
    """Three times a forward pass of ADM's U-Nets of these sizes, counted in torch. The decoder's text network
    (1.2B parameters, 256 positions: 6 FLOPs a parameter and position) comes on top."""
    config = models.to_plain(recipe.get_config())
    stage = models.build_stage(config)
    counted = flops.of_step(stage, stage.batch_spec(2)) / 2e12
    if "text" in config["model"]:
        text = config["model"]["text"]
        tera += 6 * 12 * text["depth"] * text["width"] ** 2 * text["context_length"] / 1e12
    assert counted == pytest.approx(tera, rel=0.06)
