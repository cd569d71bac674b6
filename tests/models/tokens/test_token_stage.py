"""A token model with a frozen tokenizer, in small: DALL-E 1's plan on pictures of four coloured squares.

The stage reads `tokens` and `codes`. The data has `tokens` and `tokenizer.image`, the picture as the frozen
tokenizer wants it. The tokenizer turns it into codes inside the compiled step. The ordinary train step trains
the stage on a mesh, the decode loop draws from it.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle2_jax.models.nets import layers
from dalle2_jax.models.nets.causal import causal_mask, empty_cache
from dalle2_jax.models.nets.transformer import Embedding, TokenEmbedding, TransformerStack
from dalle2_jax.models.stages import Loss
from dalle2_jax.models.tokens.decode import Options, decode
from dalle2_jax.models.tokens.layout import Layout, Part
from dalle2_jax.runtime import partition
from dalle2_jax.train import step as train_step
from tests.learned import key_of

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], np.float32)
WORDS, SIDE = 3, 2  # of a caption; codes a side of a picture
LAYOUT = Layout((Part("tokens", WORDS, 1 + len(COLOURS)), Part("codes", SIDE * SIDE, len(COLOURS))))


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A frozen first stage: each 4 x 4 patch is the entry of a code book that is nearest to its mean."""

    def encode(self, params, image):
        """uint8 [B, 8, 8, 3] -> codes [B, 4] int32."""
        b, h, w, c = image.shape
        patches = image.astype(jnp.float32).reshape(b, SIDE, h // SIDE, SIDE, w // SIDE, c).mean(axis=(2, 4))
        distance = jnp.square(patches.reshape(b, -1, 1, c) - params["codebook"]).sum(axis=-1)
        return distance.argmin(axis=-1).astype(jnp.int32)

    def decode(self, params, codes):
        """codes [B, 4] -> float32 [B, 8, 8, 3]."""
        patches = params["codebook"][codes].reshape(-1, SIDE, SIDE, 3)
        return patches.repeat(4, axis=1).repeat(4, axis=2)


class TokenTransformer(nn.Module):
    """Ids [B, n] from position `start` on -> logits [B, n, V] of the next ids, and the caches."""

    layout: Layout
    width: int = 32
    depth: int = 2
    num_heads: int = 2

    @nn.compact
    def __call__(self, ids, mask, caches=None, start=0):
        x = TokenEmbedding(self.layout.vocab_size, self.width, name="token_embedding")(ids)
        position = Embedding((self.layout.length, self.width), name="position")()
        x = x + jax.lax.dynamic_slice_in_dim(position, start, ids.shape[1])
        stack = TransformerStack(self.depth, self.num_heads, name="transformer")
        x, caches = stack(x, mask, caches, start) if caches else (stack(x, mask), None)
        x = layers.LayerNorm(name="norm_out")(x)
        return layers.Dense(self.layout.vocab_size, name="logits")(x), caches


@dataclasses.dataclass(frozen=True)
class TokenModel:
    """p(codes | tokens), code by code, over one sequence of both."""

    net: TokenTransformer
    layout: Layout

    def batch_spec(self, batch_size):
        return {
            part.name: jax.ShapeDtypeStruct((batch_size, part.length), jnp.int32)
            for part in self.layout.parts
        }

    def init(self, key, batch):
        ids = self.layout.join(batch)
        return {"net": self.net.init(key, ids, causal_mask(ids.shape[1]))["params"]}

    def loss(self, params, key, batch, *, step=0, train=True):
        ids = self.layout.join(batch)
        mask = causal_mask(ids.shape[1] - 1)
        logits, _ = self.net.apply({"params": params["net"]}, ids[:, :-1], mask)
        allowed = self.layout.allowed()[1:]
        log_p = jax.nn.log_softmax(jnp.where(allowed, logits, -jnp.inf))
        log_p = jnp.take_along_axis(log_p, ids[:, 1:, None], axis=-1)[..., 0]
        loss = -log_p[:, WORDS - 1 :].mean()  # of the codes
        return Loss(loss, {"loss": loss})

    def sample(self, params, keys, batch, options=Options()):  # noqa: B008 (immutable)
        """Codes [B, 4] of captions: the caption is read at once, but for its last word."""
        words, rows = batch["tokens"], causal_mask(self.layout.length)
        if options.guidance_scale is not None:
            words = jnp.stack([words, jnp.zeros_like(words)], axis=1).reshape(-1, WORDS)
        net = functools.partial(self.net.apply, {"params": params["net"]})
        cache = empty_cache(len(words), self.layout.length, self.net.width, self.net.num_heads, jnp.float32)
        read = causal_mask(WORDS - 1)
        _, caches = net(words[:, :-1], read, (cache,) * self.net.depth)

        def step(ids, k, caches):
            at = WORDS - 1 + k
            mask = jax.lax.dynamic_slice_in_dim(rows, at, 1, axis=2)
            logits, caches = net(ids[:, None], mask, caches, at)
            return logits[:, 0], caches

        length = self.layout.length - WORDS
        options = options._replace(allowed=self.layout.allowed()[WORDS:])
        ids = decode(step, lambda ids: ids, words[:, -1], caches, keys, length, options)
        return self.layout.split(jnp.concatenate([words[:: len(words) // len(keys)], ids], axis=1))["codes"]


def examples(size, seed=0):
    """Captions of colours, and pictures whose squares have the first, second, third and first one again."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, len(COLOURS), (size, WORDS))
    codes = words[:, [0, 1, 2, 0]]
    image = Tokenizer().decode({"codebook": COLOURS}, codes) + rng.integers(-40, 40, (size, 8, 8, 3))
    image = np.clip(image, 0, 255).astype(np.uint8)
    return {"tokens": (words + 1).astype(np.int32), "tokenizer.image": image}, codes


@pytest.fixture(scope="module")
def trained():
    """(stage, parameters, losses) after 120 steps on a mesh, with two parts a step."""
    stage = TokenModel(TokenTransformer(LAYOUT), LAYOUT)
    tokenizer, optimizer = Tokenizer(), optax.adam(1e-2)
    mesh = partition.make_mesh(2, 2, 2)
    frozen = {"tokenizer": {"codebook": jnp.asarray(COLOURS)}}

    def fill(frozen, batch):
        codes = tokenizer.encode(frozen["tokenizer"], batch["tokenizer.image"])
        return {"tokens": batch["tokens"], "codes": codes}

    with partition.use_mesh(mesh):
        begin = functools.partial(
            train_step.init_state,
            stage,
            optimizer,
            key_of(0),
            {name: jnp.zeros(x.shape, x.dtype) for name, x in stage.batch_spec(1).items()},
        )
        shardings = partition.shardings(jax.eval_shape(begin), mesh)
        train_state = jax.jit(begin, out_shardings=shardings)()
        step = jax.jit(
            train_step.make_train_step(stage, optimizer, seed=0, ema_decay=0.9, grad_accum=2, fill=fill),
            donate_argnums=0,
            out_shardings=(shardings, partition.replicated(mesh)),
        )
        losses = []
        for i in range(120):
            batch = partition.to_global(examples(32, seed=i)[0], mesh)
            train_state, scalars = step(train_state, batch, frozen)
            losses.append(float(scalars["loss"]))
    kernel = train_state.params["net"]["transformer"]["block_0"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (16, 64)  # really split
    return stage, jax.device_get(train_state.ema_params), losses


def test_it_learns_the_codes_of_a_frozen_tokenizer(trained):
    losses = trained[2]
    assert losses[0] == pytest.approx(np.log(len(COLOURS)), abs=0.6)
    assert np.mean(losses[-10:]) < 0.1


@pytest.mark.parametrize("options", [Options(), Options(0.5, 2, 0.9), Options(guidance_scale=1.0)])
def test_what_is_drawn_is_the_picture_of_the_caption(trained, options):
    stage, params, _ = trained
    batch, codes = examples(64, seed=1000)
    sample = jax.jit(functools.partial(stage.sample, options=options))
    drawn = sample(params, jax.random.split(jax.random.key(1), 64), {"tokens": batch["tokens"]})
    assert drawn.shape == codes.shape and drawn.min() >= 0 and drawn.max() < len(COLOURS)
    assert (np.asarray(drawn) == codes).mean() > 0.9
    picture = Tokenizer().decode({"codebook": COLOURS}, np.asarray(drawn))
    assert np.abs(picture - batch["tokenizer.image"]).mean() < 45


def test_with_the_cache_it_draws_what_it_draws_without(trained):
    """Greedily; without a cache every code takes the whole sequence again."""
    stage, params, _ = trained
    batch, _ = examples(8, seed=2000)
    sample = jax.jit(functools.partial(stage.sample, options=Options(top_k=1)))
    drawn = sample(params, jax.random.split(jax.random.key(1), 8), {"tokens": batch["tokens"]})
    ids = np.pad(batch["tokens"], ((0, 0), (0, LAYOUT.length - WORDS)))
    mask = causal_mask(LAYOUT.length)
    apply = jax.jit(lambda ids: stage.net.apply({"params": params["net"]}, ids, mask)[0])
    for k in range(WORDS, LAYOUT.length):
        logits = np.where(LAYOUT.allowed()[k], apply(ids)[:, k - 1], -np.inf)
        ids[:, k] = logits.argmax(axis=-1)
    np.testing.assert_array_equal(drawn, LAYOUT.split(ids)["codes"])


def test_codes_that_are_given_are_kept(trained):
    stage, params, _ = trained
    batch, codes = examples(8, seed=3000)
    offset = LAYOUT.parts[0].vocab_size
    forced = np.full(codes.shape, -1, np.int32)
    forced[:, 0] = offset + (codes[:, 0] + 1) % len(COLOURS)  # not what the caption says
    sample = jax.jit(functools.partial(stage.sample, options=Options(top_k=1, forced=forced)))
    drawn = np.asarray(sample(params, jax.random.split(jax.random.key(1), 8), {"tokens": batch["tokens"]}))
    np.testing.assert_array_equal(drawn[:, 0] + offset, forced[:, 0])
