"""Weights in bfloat16 stay so while a sampler's loop runs: no float32 copy of all of them is kept."""

import inspect

import jax
import jax.numpy as jnp
import pytest

from dalle2_jax.models import models
from dalle2_jax.models.stages import (
    ar_prior,
    dalle_mini,
    decoder,
    narrow_in_loop,
    pixelsnail,
    prior,
    token_model,
)
from dalle2_jax.runtime import partition

TEXT = dict(vocab_size=64, context_length=4, width=64, depth=1, num_heads=1)
WIDE = dict(width=384, depth=4, num_heads=2)
GATED = dict(width=192, hidden=192, num_blocks=2, num_res_blocks=2, kernel=3, attention=False)
CODES = dict(grids=((2, 2),), num_codes=(16,))
STAGES = {
    "decoder": lambda: decoder.build(
        image_size=8, embed_dim=0, guidance_scale=1.0, net=dict(kind="vit", patch_size=4, **WIDE), num_steps=2
    ),
    "prior": lambda: prior.build(embed_dim=32, text=TEXT | WIDE, num_steps=2),
    "ar_prior": lambda: ar_prior.build(
        embed_dim=32, text=TEXT, latent=WIDE, num_components=4, num_buckets=16, num_dot_buckets=16
    ),
    "token_model": lambda: token_model.build(**CODES, net=WIDE),
    "dalle_mini": lambda: dalle_mini.build(
        text=dict(vocab_size=64, context_length=4),
        net=WIDE | dict(hidden=512),
        **CODES,
        num_ids=17,
        start_code=16,
    ),
    "pixelsnail": lambda: pixelsnail.build(**CODES, nets=(GATED,)),
}


@pytest.mark.parametrize("name", STAGES)
def test_no_float32_copy_of_the_weights_is_kept(name):
    stage = STAGES[name]()
    narrow = lambda x: jax.ShapeDtypeStruct(  # noqa: E731
        x.shape, jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype
    )
    params = models.abstract_params(stage)
    params |= {key: jax.tree.map(narrow, value) for key, value in params.items() if key != "stats"}
    written = {"image", "codes", "image_embed"}
    batch = {key: spec for key, spec in stage.batch_spec(1).items() if key not in written}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    options = inspect.unwrap(partition.compiler_options)()  # conftest's compile with less care for memory
    sample = jax.jit(stage.sample, compiler_options=options)
    needed = sample.lower(params, keys, batch).compile().memory_analysis()
    count = sum(x.size for x in jax.tree.leaves(params) if x.dtype == jnp.bfloat16)
    assert count > 1e6
    assert needed.temp_size_in_bytes < 4 * count / 2


def test_the_gradient_of_a_guide_passes_and_float32_stays_as_it_is():
    weights = {"wide": jnp.array([2.0, 3.0]), "narrow": jnp.array([5.0, 7.0], jnp.bfloat16)}

    def guide(x):
        held, x = narrow_in_loop(weights, x)
        assert held["narrow"].dtype == jnp.bfloat16
        return (held["wide"] * held["narrow"] * x).sum()

    def step(x, _):
        return x + jax.grad(guide)(x), None

    assert jax.lax.scan(step, jnp.zeros(2), None, length=2)[0].tolist() == [20.0, 42.0]
    kept, same = narrow_in_loop({"wide": weights["wide"]}, weights["wide"])
    assert kept["wide"] is same is weights["wide"]
