"""The CLIP stage: parity with transformers' CLIPModel, the loss over the global batch, and learning."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models import flops, models
from dalle2_jax.models.nets import platforms
from dalle2_jax.models.stages import clip
from dalle2_jax.runtime import partition
from tests.learned import assert_within, descend, key_of
from tests.tiny_model import random_params

KEY = jax.random.key(0)
LENGTH, VOCAB = 6, 20
TEXT = dict(vocab_size=VOCAB, context_length=LENGTH, width=16, depth=1, num_heads=2)
VIT = dict(kind="vit", patch_size=4, width=16, depth=1, num_heads=2)
RESNET = dict(kind="resnet", width=8, depths=(1, 1), num_heads=4)


def build(**changes):
    return clip.build(**(dict(embed_dim=8, image_size=8, vision=VIT, text=TEXT) | changes))


def batch_of(size):
    draw = np.random.default_rng(0)
    return {
        "image": draw.uniform(-1, 1, (size, 8, 8, 3)).astype(np.float32),
        "tokens": draw.integers(1, VOCAB, (size, LENGTH)).astype(np.int32),
        "token_mask": np.arange(LENGTH) < 2 + np.arange(size)[:, None] % (LENGTH - 1),
    }


def params_of(stage):
    """Random parameters with the temperature that `init` gives; nothing is compiled."""
    return random_params(stage, 0) | {"logit_scale": np.float32(math.log(1 / 0.07))}


def unit(seed, shape):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


contrast = jax.jit(clip.contrastive_loss)


def from_transformers(model):
    """Parameters of the stage from those of transformers' CLIPModel (names: docs of the released weights)."""

    def numpy(x):
        return x.detach().numpy()

    def dense(linear):
        bias = {} if linear.bias is None else {"bias": numpy(linear.bias)}
        return {"kernel": numpy(linear.weight).T} | bias

    def norm(layer):
        return {"scale": numpy(layer.weight), "bias": numpy(layer.bias)}

    def blocks(layers):
        params = {}
        for i, layer in enumerate(layers):
            attn = layer.self_attn
            parts = [dense(attn.q_proj), dense(attn.k_proj), dense(attn.v_proj)]
            qkv = {name: np.concatenate([p[name] for p in parts], axis=-1) for name in ("kernel", "bias")}
            params[f"block_{i}"] = {
                "norm1": norm(layer.layer_norm1),
                "attn": {"qkv": qkv, "out": dense(attn.out_proj)},
                "norm2": norm(layer.layer_norm2),
                "mlp": {"fc1": dense(layer.mlp.fc1), "fc2": dense(layer.mlp.fc2)},
            }
        return params

    vision, text = model.vision_model, model.text_model
    return {
        "vision": {
            "patch_embedding": {
                "kernel": numpy(vision.embeddings.patch_embedding.weight).transpose(2, 3, 1, 0)
            },
            "class_token": {"embedding": numpy(vision.embeddings.class_embedding)},
            "position": {"embedding": numpy(vision.embeddings.position_embedding.weight)},
            "norm_pre": norm(vision.pre_layrnorm),
            "transformer": blocks(vision.encoder.layers),
            "norm_post": norm(vision.post_layernorm),
            "proj": dense(model.visual_projection),
        },
        "text": {
            "token_embedding": {"embedding": numpy(text.embeddings.token_embedding.weight)},
            "position": {"embedding": numpy(text.embeddings.position_embedding.weight)},
            "transformer": blocks(text.encoder.layers),
            "norm_out": norm(text.final_layer_norm),
            "proj": dense(model.text_projection),
        },
        "logit_scale": numpy(model.logit_scale),
    }


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_everything_equals_transformers(activation):
    torch = pytest.importorskip("torch", reason="transformers' CLIPModel is the oracle")
    transformers = pytest.importorskip("transformers", reason="transformers' CLIPModel is the oracle")
    common = dict(intermediate_size=64, num_hidden_layers=2, hidden_act=activation, layer_norm_eps=1e-5)
    config = transformers.CLIPConfig(
        text_config=common
        | dict(
            hidden_size=16,
            num_attention_heads=4,
            vocab_size=VOCAB,
            max_position_embeddings=LENGTH,
            eos_token_id=VOCAB - 1,
        ),
        vision_config=common | dict(hidden_size=16, num_attention_heads=2, image_size=8, patch_size=4),
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.normal_(std=0.2)

    batch = batch_of(3)
    last = batch["token_mask"].sum(axis=1) - 1
    batch["tokens"] %= VOCAB - 1
    batch["tokens"][np.arange(3), last] = VOCAB - 1
    stage = build(vision=VIT | {"depth": 2}, text=TEXT | {"depth": 2, "num_heads": 4}, activation=activation)
    params = from_transformers(model)
    pixels = ((np.asarray(batch["image"]) + 1) / 2 - clip.IMAGE_MEAN) / clip.IMAGE_STD
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor(np.asarray(batch["tokens"]), dtype=torch.long),
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32),
            return_loss=True,
        )

    @jax.jit
    def everything(params, batch):
        text = stage.encode_text(params, batch["tokens"], batch["token_mask"])
        return stage.encode_image(params, batch["image"]), *text, *stage.loss(params, KEY, batch)[:2]

    image_embed, text_embed, states, loss, metrics = everything(params, batch)
    np.testing.assert_allclose(image_embed, expected.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(text_embed, expected.text_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(
        states, expected.text_model_output.last_hidden_state.numpy(), atol=1e-5, rtol=1e-5
    )
    np.testing.assert_allclose(loss, expected.loss.numpy(), rtol=1e-5)
    np.testing.assert_allclose(metrics["logit_scale"], 1 / 0.07, rtol=1e-3)


def test_loss_of_known_similarities():
    """Orthonormal pairs: logits are s on the diagonal and 0 off it, so the loss is log(1 + (N - 1) e^-s)."""
    embed = np.eye(4, 5, dtype=np.float32)
    loss, metrics = contrast(embed, embed, math.log(3.0))
    np.testing.assert_allclose(loss, math.log(1 + 3 * math.exp(-3.0)), rtol=1e-6)
    assert metrics["accuracy_i2t"] == metrics["accuracy_t2i"] == 1.0
    loss, metrics = contrast(embed, np.roll(embed, 1, axis=0), math.log(3.0))
    np.testing.assert_allclose(loss, 3.0 + math.log(1 + 3 * math.exp(-3.0)), rtol=1e-6)
    assert metrics["accuracy_i2t"] == metrics["accuracy_t2i"] == 0.0


def test_equal_captions_need_no_other_targets():
    tokens = np.array([[1, 2, 0], [3, 4, 0], [1, 2, 0], [3, 0, 0]])
    same = clip.same_captions(tokens)
    np.testing.assert_array_equal(same, np.eye(4) + np.array([[0, 0, 1, 0], [0] * 4, [1, 0, 0, 0], [0] * 4]))
    image, text = unit(0, (4, 8)), unit(1, (4, 8))
    text[2] = text[0]
    target = same / same.sum(axis=1)
    logits = 10.0 * image @ text.T
    log_p = [x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (logits, logits.T)]
    spread = -(target * sum(log_p)).sum(axis=1).mean() / 2
    loss, _ = contrast(image, text, math.log(10.0), same)
    np.testing.assert_allclose(loss, spread, rtol=1e-5)


def test_a_match_with_an_equal_caption_is_accurate():
    image = np.eye(3, dtype=np.float32)
    text = image[[0, 1, 0]]
    same = clip.same_captions(np.array([[1, 2], [3, 4], [1, 2]]))
    _, strict = contrast(image, text, math.log(10.0))
    _, fair = contrast(image, text, math.log(10.0), same)
    np.testing.assert_allclose([strict["accuracy_t2i"], fair["accuracy_t2i"]], [2 / 3, 1.0], rtol=1e-6)


def test_loss_and_gradients_do_not_depend_on_the_number_of_devices():
    """Trap 19: the softmax runs over the global batch, and gradients flow through all of it."""
    devices = jax.devices()
    if len(devices) < 8:
        pytest.skip("needs 8 devices: run under tests/conftest.py, before anything else starts JAX")
    stage, batch = build(), batch_of(16)
    params = params_of(stage)
    results = []
    for data, fsdp in ((1, 1), (2, 4)):
        mesh = partition.make_mesh(data=data, fsdp=fsdp, devices=devices[: data * fsdp])
        with partition.use_mesh(mesh):
            placed = jax.device_put(params, partition.shardings(params, mesh))
            parts = partition.to_global({name: np.asarray(x) for name, x in batch.items()}, mesh)
            step = jax.jit(jax.value_and_grad(lambda *arguments: stage.loss(*arguments)[:2], has_aux=True))
            results.append(jax.device_get(step(placed, KEY, parts)))
    one, eight = results
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max()), one, eight
    )
    # A softmax within each device's two examples would be another number: at most log 2 where all look alike.
    assert one[0][0] > 2.0


def test_temperature_starts_at_0_07_and_never_exceeds_100():
    stage, batch = build(), batch_of(2)
    # what is not returned is not compiled
    scale = jax.jit(lambda *arguments: stage.init(*arguments)["logit_scale"])(KEY, batch)
    params = random_params(stage, 0) | {"logit_scale": scale}
    np.testing.assert_allclose(np.exp(scale), 1 / 0.07, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, stage.update(params, {}, KEY), (params, {}))
    high, _ = stage.update(params | {"logit_scale": jnp.float32(7.0)}, {}, KEY)
    np.testing.assert_allclose(np.exp(high["logit_scale"]), 100.0, rtol=1e-6)
    assert params["logit_scale"] < 3  # update did not write into its argument


def test_embeddings_are_of_unit_norm_unless_asked_otherwise():
    stage, batch = build(), batch_of(3)

    @jax.jit
    def encode(params, batch):
        images = [stage.encode_image(params, batch["image"], normalize=asked) for asked in (None, False)]
        return *images, *stage.encode_text(params, batch["tokens"], batch["token_mask"])

    image, raw, text, states = map(np.asarray, encode(params_of(stage), batch))
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1.0, rtol=1e-5)
    assert states.shape == (3, LENGTH, 16)
    length = np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.abs(length - 1).max() > 1e-3
    np.testing.assert_allclose(raw / length, image, atol=1e-6)


def test_retrieval_accuracy_counts_both_directions():
    text = np.eye(3, dtype=np.float32)
    image = np.array([[1.0, 0.2, 0], [0.9, 0.1, 0], [0, 0, 1]], np.float32)  # image 1 looks like caption 0
    i2t, t2i = jax.jit(clip.retrieval_accuracy)(image, text)
    np.testing.assert_allclose([i2t, t2i], [2 / 3, 1 / 3], rtol=1e-6)


BOUNDS = {
    "loss_before": (">", 1.0),
    "loss": ("<", 0.1),
    "accuracy_i2t": (">", 0.99),
    "accuracy_t2i": (">", 0.99),
}


@functools.partial(jax.jit, static_argnums=1)
def pairs(key, image_size):
    """Eight pairs, drawn from a key."""
    image_key, token_key = jax.random.split(key)
    return {
        "image": jax.random.uniform(image_key, (8, image_size, image_size, 3), minval=-1, maxval=1),
        "tokens": jax.random.randint(token_key, (8, LENGTH), 1, VOCAB),
        "token_mask": jnp.arange(LENGTH) < 2 + jnp.arange(8)[:, None] % (LENGTH - 1),
    }


def reached(seed, vision):
    """Eight pairs after 60 steps."""
    key, image_size = key_of(seed), {"vit": 8, "resnet": 16}[vision]
    stage = build(vision={"vit": VIT, "resnet": RESNET}[vision], image_size=image_size)
    batch = pairs(key, image_size)
    params = jax.jit(stage.init)(key, batch)
    _, metrics = descend(stage, params, key, batch, steps=60, learning_rate=3e-3)
    metrics = jax.device_get(metrics)
    last = {name: metrics[name][-1] for name in ("loss", "accuracy_i2t", "accuracy_t2i")}
    return {"loss_before": metrics["loss"][0]} | last


@pytest.mark.parametrize("vision", ["vit", pytest.param("resnet", marks=pytest.mark.slow)])
def test_eight_pairs_are_learned(vision):
    assert_within(reached(0, vision), BOUNDS)


def count(stage):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(models.abstract_params(stage)))


def test_sizes_of_the_papers_clip_and_of_a_released_one():
    text = dict(vocab_size=49408, context_length=77, width=1024, depth=24, num_heads=16)
    vit_h = dict(kind="vit", patch_size=16, width=1280, depth=32, num_heads=16)
    assert round(count(clip.build(embed_dim=1024, image_size=256, vision=vit_h, text=text)) / 1e6) == 986
    text = dict(vocab_size=49408, context_length=77, width=768, depth=12, num_heads=12)
    vit_l = dict(kind="vit", patch_size=14, width=1024, depth=24, num_heads=16)
    assert count(clip.build(embed_dim=768, image_size=224, vision=vit_l, text=text)) == 427_616_513


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(vision=VIT | {"pach_size": 4}), "did you mean vision.patch_size"),
        (dict(vision={"kind": "vit", "width": 8}), "vision lacks vision.patch_size, vision.depth"),
        (dict(vision=VIT | {"kind": "cnn"}), "vision.kind 'cnn' is unknown"),
        (dict(text=TEXT | {"deph": 2}), "did you mean text.depth"),
        (dict(image_size=10), "image_size 10 is not a multiple of vision.patch_size 4"),
        (dict(vision=RESNET, image_size=12), "image_size 12 is not a multiple of 8"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_pictures_of_another_size_are_refused():
    stage = build()
    params = jax.eval_shape(stage.init, KEY, stage.batch_spec(2))
    with pytest.raises(ValueError, match="reads pictures of 8 x 8 x 3"):
        stage.encode_image(params, jnp.zeros((2, 16, 16, 3)))


# SAM and the sigmoid loss


def gradient(stage):
    """The compiled gradient of a stage's loss, (params, batch) -> tree."""
    return jax.jit(jax.grad(lambda params, batch: stage.loss(params, KEY, batch)[0]))


RHO = 0.1


@pytest.fixture(scope="module")
def eight_replicas():
    """(parameters, batch of 16, gradient of SAM's loss where every two examples are a replica)."""
    stage, batch = build(sam_rho=RHO, sam_batch_size=2), batch_of(16)
    params = params_of(stage)
    return params, batch, jax.device_get(gradient(stage)(params, batch))


# On a mesh, below, all replicas are handled at once, as the only one of a single device is.
@pytest.mark.parametrize("replicas", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_sam_is_the_gradient_at_parameters_that_each_replica_moved(eight_replicas, replicas):
    """Against plain gradients, where each replica's examples are embedded by a copy of the parameters."""
    params, batch, found = eight_replicas
    plain = build()

    @jax.jit
    @jax.value_and_grad
    def of_copies(copies, batch):
        """The global loss, where copy i of eight embeds examples 2 i and 2 i + 1."""
        parts = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
        image, text = (x.reshape(16, -1) for x in jax.vmap(plain._embed)(copies, parts))
        scale = jnp.exp(jnp.repeat(copies["logit_scale"], 2))[:, None]
        similarity = image @ text.T
        rows = [jax.nn.log_softmax(scale * s, axis=-1) for s in (similarity, similarity.T)]
        return -(jnp.trace(rows[0]) + jnp.trace(rows[1])) / 32

    def norm_of(tree):
        return math.sqrt(sum(float(np.square(x).sum()) for x in jax.tree.leaves(tree)))

    def moved_along(gradient):
        rate = np.float32(RHO / norm_of(gradient))
        return jax.tree.map(lambda p, g: p + rate * g, params, gradient)

    def stacked(*trees):
        return jax.tree.map(lambda *x: np.stack(x), *trees)

    def total(gradients):
        return jax.tree.map(lambda g: g.sum(axis=0), gradients)

    loss, plain_gradients = jax.device_get(of_copies(stacked(*[params] * 8), batch))
    np.testing.assert_allclose(loss, jax.jit(plain.loss)(params, KEY, batch)[0], rtol=1e-5)
    unmoved = total(plain_gradients)
    if replicas == 8:
        moved = [moved_along(jax.tree.map(lambda g, i=i: g[i], plain_gradients)) for i in range(8)]
    else:
        moved = [moved_along(unmoved)] * 8
        found = jax.device_get(gradient(build(sam_rho=RHO, sam_batch_size=16))(params, batch))
    chex_close(found, total(of_copies(stacked(*moved), batch)[1]), 1e-4)
    assert norm_of(jax.tree.map(np.subtract, found, unmoved)) > 1e-2 * norm_of(unmoved)


def test_sam_validates_the_parameters_themselves():
    batch = batch_of(16)
    plain, sam = build(), build(sam_rho=RHO, sam_batch_size=16)
    params = params_of(plain)
    validation = jax.jit(lambda params, batch: sam.loss(params, KEY, batch, train=False))(params, batch)
    assert validation[0] == jax.jit(plain.loss)(params, KEY, batch)[0]
    with pytest.raises(ValueError, match="sam_batch_size = 3"):
        build(sam_rho=RHO, sam_batch_size=3).loss(params, KEY, batch)


@pytest.mark.slow  # the plain loss is compared on a mesh in every run
def test_sam_on_a_mesh(eight_replicas):
    """Eight replicas, on one device and on a mesh, move alike."""
    params, batch, alone = eight_replicas
    stage, mesh = build(sam_rho=RHO, sam_batch_size=2), partition.make_mesh(data=4, fsdp=2)
    with partition.use_mesh(mesh):
        shared = gradient(stage)(params, jax.device_put(batch, partition.batch_sharding(mesh)))
    chex_close(shared, alone, 1e-4)


@pytest.mark.slow
def test_sam_has_one_copy_a_device_and_not_a_replica():
    # The parameters outweigh the activations: wide text, few rows.
    def memory(count):
        wide = build(sam_rho=0.1, sam_batch_size=1, text=TEXT | dict(width=128, depth=1))
        small = batch_of(count)
        abstract = jax.eval_shape(wide.init, KEY, small)
        used = gradient(wide).lower(abstract, small).compile().memory_analysis().temp_size_in_bytes
        return used / sum(x.size * 4 for x in jax.tree.leaves(abstract))

    assert memory(16) - memory(2) < 4  # in copies of the parameters; one each would be 14


def test_sam_computes_no_product_with_a_kernel_again():
    """Of what is kept at the moved parameters as of what is at the others: twice attention's, no more."""
    batch = batch_of(16)

    @functools.cache
    def counted(remat, **sam):
        stage = build(remat=remat, **sam)
        params = jax.eval_shape(stage.init, KEY, batch)
        with partition.use_mesh(partition.make_mesh(data=8)), platforms.assumed(platforms.Target("tpu")):
            return flops.count(gradient(stage), params, batch)

    def again(remat, **sam):
        """FLOPs that are computed a second time on TPUs, where each of eight devices has a replica."""
        return counted(remat, **sam) - counted("none", **sam)

    sam = dict(sam_rho=0.1, sam_batch_size=2)
    assert again("products", **sam) == 2 * again("products") > 0
    assert again("all", **sam) > 2 * again("products", **sam)


def chex_close(found, expected, tolerance):
    """Trees are close relative to the largest entry of each leaf."""
    for a, b in zip(*map(jax.tree.leaves, jax.device_get((found, expected))), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1e-3, float(np.abs(b).max())))


def test_the_sigmoid_loss_judges_every_pair_by_itself():
    image, text = unit(0, (5, 4)), unit(1, (5, 4))
    same = np.eye(5, dtype=bool)
    same[0, 1] = same[1, 0] = True
    log_10, bias = np.float32(math.log(10.0)), np.float32(-2.0)
    loss, metrics = jax.jit(clip.sigmoid_loss)(image, text, log_10, bias, same)
    total = 0.0
    for i in range(5):
        for j in range(5):
            logit = 10.0 * float(image[i] @ text[j]) - 2.0
            total += math.log1p(math.exp(-logit if bool(same[i, j]) else logit))
    assert float(loss) == pytest.approx(total / 5, rel=1e-5)
    assert float(metrics["logit_bias"]) == -2.0
    stage = build(loss="sigmoid")

    @jax.jit
    def scalars(batch):
        params = stage.init(KEY, batch)
        return {name: params[name] for name in ("logit_scale", "logit_bias")}

    begun = scalars(batch_of(4))
    assert float(np.exp(begun["logit_scale"])) == pytest.approx(10.0) and begun["logit_bias"] == -10.0
    params = random_params(stage, 0) | begun
    slope = jax.jit(jax.grad(lambda bias, batch: stage.loss(params | {"logit_bias": bias}, KEY, batch)[0]))
    assert abs(float(slope(begun["logit_bias"], batch_of(4)))) > 0
    with pytest.raises(ValueError, match="loss 'hinge' is unknown"):
        build(loss="hinge")


# Noised pictures


@pytest.mark.parametrize("vision", [VIT, RESNET])
def test_a_noised_clip_sees_noised_pictures_and_is_told_the_time(vision):
    stage = build(vision=vision, noise=dict(schedule="cosine"))
    batch, params, text_embed = batch_of(6), params_of(stage), unit(3, (6, 8))

    @jax.jit
    def seen(params, image, t):
        return stage.log_p(params, image, t, text_embed), stage.encode_image(params, image)

    (early, clean), (late, _) = (seen(params, batch["image"], np.full(6, t)) for t in (0, 900))
    assert early.shape == (6,) and np.abs(early - late).max() > 1e-4
    expected = np.exp(params["logit_scale"]) * (clean * text_embed).sum(axis=1)
    np.testing.assert_allclose(early, expected, rtol=1e-5)  # without a time a picture is clean

    @jax.jit
    def losses_of(key):
        return [stage.loss(params, key, batch, train=train)[0] for train in (True, False)]

    (first, fixed), (again, as_fixed), (another, _) = (losses_of(key_of(k)) for k in (0, 0, 1))
    assert first == again != another
    assert fixed == as_fixed
    with pytest.raises(ValueError, match="train one with model.noise"):
        build(vision=vision).log_p({}, batch["image"], np.zeros(6, np.int32), text_embed)
