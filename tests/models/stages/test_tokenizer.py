"""The tokenizer's stage: likelihood, levels, losses, sizes of the papers, advice."""

import functools
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models import models
from dalle2_jax.models.stages import tokenizer
from dalle2_jax.models.stages.reconstruction import Likelihood, logit_laplace
from dalle2_jax.train import loop
from tests.tiny_model import random_params

SIDE = 16
SMALL = dict(
    vq=dict(
        net=dict(kind="vqvae", channels=8, residual_channels=4, num_res_blocks=1, strides=(4, 2)),
        quantizer=dict(kind="vq", num_codes=16, width=4),
    ),
    three=dict(
        net=dict(kind="vqvae", channels=8, residual_channels=4, num_res_blocks=1, strides=(2, 2, 2)),
        quantizer=dict(kind="vq", num_codes=16, width=4),
    ),
    dvae=dict(
        net=dict(kind="dvae", channels=8, num_groups=2, num_blocks=1),
        quantizer=dict(kind="gumbel", num_codes=16, width=4, beta=(0.0, 1.0, 10)),
        likelihood="logit_laplace",
    ),
    vqgan=dict(
        net=dict(
            kind="vqgan",
            channels=8,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(8,),
            z_channels=8,
        ),
        quantizer=dict(kind="fsq", levels=(5, 4)),
        likelihood="l1",
        adversarial=dict(start=2, features="discriminator", widths=(8, 8)),
    ),
)


@functools.cache
def small(kind: str, side: int = SIDE):
    """(stage, parameters, pictures [4, S, S, 3])."""
    stage = tokenizer.build(image_size=side, **SMALL[kind])
    images = np.random.default_rng(0).uniform(-1, 1, (4, side, side, 3)).astype(np.float32)
    return stage, random_params(stage, 0), jnp.asarray(images)


@functools.cache
def passes(kind: str):
    """(params, images) -> codes, codes in one row, three pictures of them; compiled once."""
    stage = small(kind)[0]

    def compute(params, images):
        codes, row = stage.encode(params, images), stage.encode_sequence(params, images)
        made = stage.decode_codes(params, codes), stage.decode_sequence(params, row)
        return codes, row, *made, stage.reconstruct(params, images)

    return jax.jit(compute)


def test_the_density_of_logit_laplace_integrates_to_one():
    m = (np.arange(200_000) + 0.5) / 200_000
    for mu, log_b in ((0.0, 0.0), (1.5, -1.0), (-2.0, 0.5)):
        density = np.exp(-np.asarray(logit_laplace(jnp.asarray(m, jnp.float32), mu, log_b), np.float64))
        assert density.mean() == pytest.approx(1, abs=2e-3)


def test_logit_laplace_with_a_least_scale_is_a_bounded_density():
    x = jnp.linspace(-1, 1, 20_001, dtype=jnp.float32)[:, None]  # m from 0.1 to 0.9, logits within 2.2 of 0
    found = []
    for log_b in (-20.0, -1.0):
        maps = jnp.concatenate([jnp.zeros_like(x), jnp.full_like(x, log_b)], axis=-1)
        density = np.exp(-np.asarray(Likelihood("logit_laplace", min_scale=0.05).nll(maps, x), np.float64))
        assert 0.8 * density.mean() == pytest.approx(1, abs=0.01)
        found.append(density.max())
    # At m = 1/2 the density is 1 / (b / 2) by b = exp(log b) + 0.05.
    np.testing.assert_allclose(found, [2 / 0.05, 2 / (np.exp(-1) + 0.05)], rtol=1e-3)


def test_the_picture_of_logit_laplace_undoes_the_margin():
    x = jnp.linspace(-1, 1, 7).reshape(1, 1, 7, 1).repeat(3, axis=-1)
    m = 0.8 * (x + 1) / 2 + 0.1
    maps = jnp.concatenate([jnp.log(m / (1 - m)), jnp.zeros_like(x)], axis=-1)
    np.testing.assert_allclose(Likelihood("logit_laplace").picture(maps), x, atol=1e-5)


@pytest.mark.parametrize("kind", SMALL)
def test_codes_and_pictures(kind):
    """Levels, one row of codes, the same picture both ways; training's loss is finite and has a gradient."""
    stage, params, images = small(kind)
    sides = {"vq": (2, 4), "three": (2, 4, 8), "dvae": (8,), "vqgan": (8,)}[kind]
    assert stage.grids == tuple((side, side) for side in sides)
    codes, row, made, from_row, reconstructed = passes(kind)(params, images)
    assert [code.shape for code in codes] == [(4, side, side) for side in sides]
    assert all(
        code.dtype == jnp.int32 and 0 <= code.min() and code.max() < n
        for code, n in zip(codes, stage.num_codes, strict=True)
    )
    for one, other in zip(stage.split(row), codes, strict=True):
        np.testing.assert_array_equal(one, other)
    assert made.shape == images.shape and np.abs(made).max() <= 1
    np.testing.assert_array_equal(from_row, made)
    np.testing.assert_array_equal(reconstructed, made)
    assert models.encoded_specs(stage)["codes"].shape == (1, row.shape[1])


@pytest.mark.parametrize("kind", ["vq", "three"])
def test_the_bottom_follows_the_top(kind):
    """Other codes of a level change what the levels below it quantize, none above it, and the picture."""
    stage, params, images = small(kind)
    codes, _, made, *_ = passes(kind)(params, images)
    decode, last = jax.jit(stage.decode_codes), len(codes) - 1
    for level in range(last):
        other = params | {"stats": params["stats"] | {f"book_{level}": -params["stats"][f"book_{level}"]}}
        found = passes(kind)(other, images)[0]
        for below in range(level + 1, last + 1):
            assert (found[below] != codes[below]).any()
        for above in range(level):
            np.testing.assert_array_equal(found[above], codes[above])
    for level in range(last + 1):
        changed = [code if i != level else (code + 1) % 16 for i, code in enumerate(codes)]
        assert np.abs(decode(params, tuple(changed)) - made).max() > 1e-3


def test_three_books_are_updated_by_their_own_codes():
    """One step of training: a mean for each level, and each book follows what was drawn of it."""
    stage, params, images = small("three")

    @jax.jit
    def step(params, images):
        made = stage.loss(params, jax.random.key(0), {"image": images})
        stacked = jax.tree.map(lambda x: x[None], made.statistics)
        return made.scalars, stage.update(params, stacked, jax.random.key(1))

    scalars, (new, found) = step(params, images)
    codes = passes("three")(params, images)[0]
    for level, code in enumerate(codes):
        drawn = np.bincount(np.ravel(code), minlength=16)
        p = drawn[drawn > 0] / drawn.sum()
        np.testing.assert_allclose(scalars[f"perplexity_{level}"], np.exp(-(p * np.log(p)).sum()), rtol=1e-5)
        old, count = (x["stats"][f"count_{level}"] for x in (params, new))
        np.testing.assert_allclose(count, 0.99 * old + 0.01 * drawn, rtol=1e-4)
        assert f"usage_{level}" in found


def test_the_losses_of_vqvae_are_means():
    """The squared error is over the variance of the data, the commitment a mean over positions and width."""
    _, params, images = small("vq")
    stage = tokenizer.build(image_size=SIDE, data_variance=0.5, **SMALL["vq"])

    @jax.jit
    def compute(params, images):
        def nearest(quantizer, state, z, _):
            return quantizer.lookup(state, quantizer.encode(state, z)), z

        levels = stage._levels(params, images, nearest)
        maps = stage._net(params, "decode", [z_q for z_q, _ in levels])
        value = stage.loss(params, jax.random.key(0), {"image": images}).value
        return value, jnp.square(maps - images).mean(), sum(jnp.square(z - q).mean() for q, z in levels)

    value, error, commit = compute(params, images)
    np.testing.assert_allclose(value, error / 0.5 + commit / 4, rtol=1e-5)
    assert commit > 0.01


def test_the_losses_of_dalle1_are_of_the_papers_scale():
    """The KL is summed over positions and divided by the values of a picture."""
    stage, params, images = small("dvae")
    loss = jax.jit(functools.partial(stage.loss, step=10), static_argnames="train")
    found = loss(params, jax.random.key(0), {"image": images})
    side, values = stage.grids[0][0], SIDE * SIDE * 3
    net = jax.jit(lambda params: stage._net(params, "project", 0, stage._net(params, "features", images), []))
    logits = net(params)
    p = jax.nn.softmax(logits)
    kl = (p * jnp.log(p * 16)).sum(axis=-1)  # [4, h, w]
    expected = found.scalars["recon"] + kl.sum(axis=(1, 2)).mean() / values
    assert kl.shape[1:] == (side, side)
    np.testing.assert_allclose(found.value, expected, rtol=1e-5)
    hard = jax.eval_shape(functools.partial(loss, train=False), params, jax.random.key(0), {"image": images})
    assert "hard_gap" in hard.scalars and "hard_gap" not in found.scalars


def test_the_adversarial_losses_of_vqgan():
    """Before `start` they are absent; then generator and discriminator each leave the other alone, and the
    weight is that of the norms of gradients of the last layer."""
    stage, params, images = small("vqgan")

    def loss(params, step):
        made = stage.loss(params, jax.random.key(0), {"image": images}, step=step)
        return made.value, made.scalars

    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (early, scalars), gradient = both(params, jnp.int32(1))
    for leaf in jax.tree.leaves(gradient["discriminator"]):
        np.testing.assert_array_equal(leaf, 0)
    plain = scalars["recon"] + scalars["discriminator_features"]
    np.testing.assert_allclose(early, plain, rtol=1e-5)
    (late, more), after = both(params, jnp.int32(2))
    expected = plain + more["gan_weight"] * more["gan"] + more["discriminator"]
    np.testing.assert_allclose(late, expected, rtol=1e-5)
    assert (
        more["gan_weight"] > 0 and max(np.abs(x).max() for x in jax.tree.leaves(after["discriminator"])) > 0
    )
    # the weight by hand: gradients of the last kernel
    kernel, codes = params["net"]["decoder_out"]["kernel"], passes("vqgan")(params, images)[0]

    def part(kernel, name):
        net = params["net"] | {"decoder_out": params["net"]["decoder_out"] | {"kernel": kernel}}
        maps = stage._net({"net": net}, "decode", [stage.quantizers[0].lookup({}, codes[0])])
        if name == "gan":
            return -stage.adversarial.net.apply({"params": params["discriminator"]}, maps)[0].mean()
        judged = functools.partial(stage.adversarial.net.apply, {"params": params["discriminator"]})
        pairs = zip(judged(maps)[1], judged(images)[1], strict=True)
        return jnp.abs(maps - images).mean() + sum(jnp.abs(a - b).mean() for a, b in pairs)

    gradients = jax.jit(lambda kernel: [jax.grad(part)(kernel, name) for name in ("rec", "gan")])
    of_rec, of_gan = map(jnp.linalg.norm, gradients(kernel))
    np.testing.assert_allclose(more["gan_weight"], 0.8 * of_rec / (of_gan + 1e-4), rtol=1e-3)


def test_advice_after_a_collapse():
    stage = small("vq")[0]
    assert stage.advice({"usage_0": 1.0, "perplexity_0": 1.0}) == ""  # no window was drawn
    assert stage.advice({"usage_0": 0.9, "perplexity_0": 12.0, "usage_1": 1.0, "perplexity_1": 9.0}) == ""
    said = stage.advice({"usage_0": 1.0, "usage_1": 0.9, "perplexity_1": 1.5})
    assert "usage_1 0.900 of 16 codes" in said and "restart=0.1" in said
    assert "usage_0 0.125" in stage.advice({"usage_0": 0.125, "perplexity_0": 2.0})


def test_training_warns_once_where_a_collapse_begins(caplog):
    """And again after the book has recovered; a stage without advice is silent."""
    advise = loop._adviser(small("vq")[0])
    fine, collapsed = {"usage_0": 1.0, "perplexity_0": 12.0}, {"usage_0": 0.125, "perplexity_0": 2.0}
    said = []
    for scalars in (fine, collapsed, collapsed, fine, collapsed):
        advise(scalars)
        said.append(caplog.text.count("the code book collapses: usage_0 0.125 of 16 codes"))
    assert said == [0, 1, 1, 1, 2] and "set model.quantizer.restart=0.1" in caplog.text
    loop._adviser(object())(collapsed)
    assert caplog.text.count("collapses") == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(net=dict(kind="vqvea")), "net.kind 'vqvea' is unknown"),
        (dict(quantizer=dict(kind="vq", num_code=2)), "did you mean quantizer.num_codes"),
        (dict(quantizer=dict(kind="vq", num_codes=8, decay=0.0, restart=0.1)), "restart needs a book"),
        (dict(image_size=12), "image_size 12 must be a multiple of 8"),
        (dict(likelihood="l2"), "likelihood 'l2' is unknown"),
        (dict(adversarial={}), "needs net.kind='vqgan'"),
        (dict(net=SMALL["vq"]["net"] | dict(strides=(4, 3))), "must be powers of two"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.build(**dict(image_size=16) | SMALL["vq"] | changes)


def counts(recipe: str, preset: str = "") -> dict[str, int]:
    config = importlib.import_module(f"configs.{recipe}").get_config(preset)
    params = models.abstract_params(models.build_stage(json.loads(json.dumps(models.to_plain(config)))))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    net = {name: count(tree) for name, tree in params["net"].items()}
    found = {"net": count(params["net"]), "book": count(params.get("book_0", {}))}
    found |= {
        part: sum(n for name, n in net.items() if name.startswith(part)) for part in ("encoder", "decoder")
    }
    found["stats"] = sum(leaf.size for name, leaf in params["stats"].items() if name.startswith("book_"))
    return found


def test_the_papers_counts_of_parameters():
    of_paper, two, dvae = counts("vqvae.pictures128"), counts("vqvae2.tokenizer256"), counts("dalle1.dvae")
    assert of_paper["encoder"] == 2_373_120 and of_paper["book"] == 512 * 64
    assert (two["net"], two["stats"]) == (1_716_803, 65_536)
    assert (dvae["encoder"], dvae["decoder"] + dvae["book"]) == (53_786_240, 43_829_766)
    f16 = counts("vqgan.tokenizer256", "16384")
    assert (f16["net"], f16["book"]) == (29_298_176 + 42_449_795 + 131_584, 16_384 * 256)
    assert f16["decoder"] + 65_792 + f16["book"] == 46_709_891  # dalle-mini's, with a 1 x 1 convolution
    assert counts("vqgan.tokenizer256", "f8")["net"] == pytest.approx((26.35e6 + 38.32e6 + 131_584), rel=1e-3)
