"""The CLIP stage: parity with transformers' CLIPModel, the loss over the global batch, and learning."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle2_jax import flops, partition
from dalle2_jax.nets import platforms
from dalle2_jax.stages import clip
from tests.learned import assert_within, descend, key_of

KEY = jax.random.key(0)
LENGTH, VOCAB = 6, 20
TEXT = dict(vocab_size=VOCAB, context_length=LENGTH, width=16, depth=1, num_heads=2)
VIT = dict(kind="vit", patch_size=4, width=16, depth=1, num_heads=2)
RESNET = dict(kind="resnet", width=8, depths=(1, 1), num_heads=4)


def build(**changes):
    return clip.build(**(dict(embed_dim=8, image_size=8, vision=VIT, text=TEXT) | changes))


def batch_of(size, image_size=8, key=KEY):
    image_key, token_key = jax.random.split(key)
    return {
        "image": jax.random.uniform(image_key, (size, image_size, image_size, 3), minval=-1, maxval=1),
        "tokens": jax.random.randint(token_key, (size, LENGTH), 1, VOCAB),
        "token_mask": jnp.arange(LENGTH) < 2 + jnp.arange(size)[:, None] % (LENGTH - 1),
    }


def unit(key, shape):
    return clip.unit_norm(jax.random.normal(key, shape))


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
    batch["tokens"] = (batch["tokens"] % (VOCAB - 1)).at[jnp.arange(3), last].set(VOCAB - 1)
    stage = build(vision=VIT | {"depth": 2}, text=TEXT | {"depth": 2, "num_heads": 4}, activation=activation)
    params = from_transformers(model)
    pixels = ((np.asarray(batch["image"]) + 1) / 2 - clip.IMAGE_MEAN) / clip.IMAGE_STD
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor(np.asarray(batch["tokens"]), dtype=torch.long),
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32),
            return_loss=True,
        )

    image_embed = stage.encode_image(params, batch["image"])
    text_embed, states = stage.encode_text(params, batch["tokens"], batch["token_mask"])
    np.testing.assert_allclose(image_embed, expected.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(text_embed, expected.text_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(
        states, expected.text_model_output.last_hidden_state.numpy(), atol=1e-5, rtol=1e-5
    )
    loss, metrics = stage.loss(params, KEY, batch)
    np.testing.assert_allclose(loss, expected.loss.numpy(), rtol=1e-5)
    np.testing.assert_allclose(metrics["logit_scale"], 1 / 0.07, rtol=1e-3)


def test_loss_of_known_similarities():
    """Orthonormal pairs: logits are s on the diagonal and 0 off it, so the loss is log(1 + (N - 1) e^-s)."""
    embed = jnp.eye(4, 5)
    loss, metrics = clip.contrastive_loss(embed, embed, jnp.log(3.0))
    np.testing.assert_allclose(loss, math.log(1 + 3 * math.exp(-3.0)), rtol=1e-6)
    assert metrics["accuracy_i2t"] == metrics["accuracy_t2i"] == 1.0
    loss, metrics = clip.contrastive_loss(embed, jnp.roll(embed, 1, axis=0), jnp.log(3.0))
    np.testing.assert_allclose(loss, 3.0 + math.log(1 + 3 * math.exp(-3.0)), rtol=1e-6)
    assert metrics["accuracy_i2t"] == metrics["accuracy_t2i"] == 0.0


def test_equal_captions_need_no_other_targets():
    tokens = jnp.array([[1, 2, 0], [3, 4, 0], [1, 2, 0], [3, 0, 0]])
    same = clip.same_captions(tokens)
    np.testing.assert_array_equal(same, np.eye(4) + np.array([[0, 0, 1, 0], [0] * 4, [1, 0, 0, 0], [0] * 4]))
    image, text = unit(KEY, (4, 8)), unit(jax.random.key(1), (4, 8))
    text = text.at[2].set(text[0])
    target = same / same.sum(axis=1)
    logits = 10.0 * image @ text.T
    spread = -(target * (jax.nn.log_softmax(logits) + jax.nn.log_softmax(logits.T))).sum(axis=1).mean() / 2
    loss, _ = clip.contrastive_loss(image, text, jnp.log(10.0), same)
    np.testing.assert_allclose(loss, spread, rtol=1e-5)


def test_a_match_with_an_equal_caption_is_accurate():
    image, text = jnp.eye(3), jnp.eye(3).at[2].set(jnp.eye(3)[0])
    same = clip.same_captions(jnp.array([[1, 2], [3, 4], [1, 2]]))
    _, strict = clip.contrastive_loss(image, text, jnp.log(10.0))
    _, fair = clip.contrastive_loss(image, text, jnp.log(10.0), same)
    np.testing.assert_allclose([strict["accuracy_t2i"], fair["accuracy_t2i"]], [2 / 3, 1.0], rtol=1e-6)


def test_loss_and_gradients_do_not_depend_on_the_number_of_devices():
    """Trap 19: the softmax runs over the global batch, and gradients flow through all of it."""
    devices = jax.devices()
    if len(devices) < 8:
        pytest.skip("needs 8 devices: run under tests/conftest.py, before anything else starts JAX")
    stage, batch = build(), batch_of(16)
    params = jax.jit(stage.init)(KEY, batch)
    results = []
    for data, fsdp in ((1, 1), (2, 4)):
        mesh = partition.make_mesh(data=data, fsdp=fsdp, devices=devices[: data * fsdp])
        with partition.use_mesh(mesh):
            placed = jax.device_put(params, partition.shardings(params, mesh))
            parts = partition.to_global({name: np.asarray(x) for name, x in batch.items()}, mesh)
            step = jax.jit(jax.value_and_grad(stage.loss, has_aux=True))
            results.append(jax.device_get(step(placed, KEY, parts)))
    one, eight = results
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max()), one, eight
    )
    # A softmax within each device's two examples would be another number: at most log 2 where all look alike.
    assert one[0][0] > 2.0


def test_temperature_starts_at_0_07_and_never_exceeds_100():
    stage, batch = build(), batch_of(2)
    params = jax.jit(stage.init)(KEY, batch)
    np.testing.assert_allclose(jnp.exp(params["logit_scale"]), 1 / 0.07, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, stage.project(params), params)
    high = stage.project(params | {"logit_scale": jnp.float32(7.0)})
    np.testing.assert_allclose(jnp.exp(high["logit_scale"]), 100.0, rtol=1e-6)
    assert params["logit_scale"] < 3  # project did not write into its argument


def test_embeddings_are_of_unit_norm_unless_asked_otherwise():
    stage, batch = build(), batch_of(3)
    params = jax.jit(stage.init)(KEY, batch)
    image = stage.encode_image(params, batch["image"])
    text, states = stage.encode_text(params, batch["tokens"], batch["token_mask"])
    np.testing.assert_allclose(jnp.linalg.norm(image, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(text, axis=1), 1.0, rtol=1e-5)
    assert states.shape == (3, LENGTH, 16)
    raw = stage.encode_image(params, batch["image"], normalize=False)
    assert np.abs(jnp.linalg.norm(raw, axis=1) - 1).max() > 1e-3
    np.testing.assert_allclose(clip.unit_norm(raw), image, atol=1e-6)


def test_retrieval_accuracy_counts_both_directions():
    text = jnp.eye(3)
    image = jnp.array([[1.0, 0.2, 0], [0.9, 0.1, 0], [0, 0, 1]])  # image 1 looks like caption 0
    i2t, t2i = clip.retrieval_accuracy(image, text)
    np.testing.assert_allclose([i2t, t2i], [2 / 3, 1 / 3], rtol=1e-6)


BOUNDS = {
    "loss_before": (">", 1.0),
    "loss": ("<", 0.1),
    "accuracy_i2t": (">", 0.99),
    "accuracy_t2i": (">", 0.99),
}


def reached(seed, vision):
    """Eight pairs after 60 steps."""
    key, image_size = key_of(seed), {"vit": 8, "resnet": 16}[vision]
    stage = build(vision={"vit": VIT, "resnet": RESNET}[vision], image_size=image_size)
    batch = batch_of(8, image_size, key)
    params = jax.jit(stage.init)(key, batch)
    _, metrics = descend(stage, params, key, batch, steps=60, learning_rate=3e-3)
    last = {name: metrics[name][-1] for name in ("loss", "accuracy_i2t", "accuracy_t2i")}
    return {"loss_before": metrics["loss"][0]} | last


@pytest.mark.parametrize("vision", ["vit", "resnet"])
def test_eight_pairs_are_learned(vision):
    assert_within(reached(0, vision), BOUNDS)


def count(stage):
    params = jax.eval_shape(stage.init, KEY, stage.batch_spec(1))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


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


def test_sam_is_the_gradient_at_parameters_that_each_replica_moved():
    """Against two plain gradients, for one replica; and with two, against replicas handled one by one."""
    batch, rho = batch_of(8), 0.1
    plain, one = build(), build(sam_rho=rho, sam_batch_size=8)
    params = plain.init(KEY, batch)

    def moved_along(g):
        norm = optax.global_norm(g)
        return jax.tree.map(lambda p, g: p + rho * g / norm, params, g)

    grad_plain = gradient(plain)
    g = grad_plain(params, batch)
    found = gradient(one)(params, batch)
    chex_close(found, grad_plain(moved_along(g), batch), 1e-4)
    assert optax.global_norm(jax.tree.map(jnp.subtract, found, g)) > 1e-2 * optax.global_norm(g)

    two = build(sam_rho=rho, sam_batch_size=4)

    def loss_of(a, b):
        """The global loss, where the first half of the batch is embedded by `a`, the second by `b`."""
        halves = [{n: x[i : i + 4] for n, x in batch.items()} for i in (0, 4)]
        embeds = [plain._embed(p, half) for p, half in ((a, halves[0]), (b, halves[1]))]
        image, text = (jnp.concatenate(x) for x in zip(*embeds, strict=True))
        similarity = image @ text.T
        scale = jnp.exp(jnp.repeat(jnp.stack([a["logit_scale"], b["logit_scale"]]), 4))[:, None]
        rows = [jax.nn.log_softmax(scale * s, axis=-1) for s in (similarity, similarity.T)]
        return -(jnp.trace(rows[0]) + jnp.trace(rows[1])) / 16

    of_both = jax.jit(jax.grad(loss_of, argnums=(0, 1)))
    a, b = (moved_along(half) for half in of_both(params, params))
    expected = jax.tree.map(jnp.add, *of_both(a, b))
    chex_close(gradient(two)(params, batch), expected, 1e-4)
    # validation looks at the parameters themselves
    assert one.loss(params, KEY, batch, train=False)[0] == plain.loss(params, KEY, batch)[0]
    with pytest.raises(ValueError, match="sam_batch_size = 3"):
        build(sam_rho=rho, sam_batch_size=3).loss(params, KEY, batch)


def test_sam_on_a_mesh():
    """Eight replicas, on one device and on a mesh, move alike."""
    batch = batch_of(16)
    stage = build(sam_rho=0.1, sam_batch_size=2)
    params = jax.jit(stage.init)(key_of(0), batch)

    alone = gradient(stage)(params, batch)
    mesh = partition.make_mesh(data=4, fsdp=2)
    with partition.use_mesh(mesh):
        shared = gradient(stage)(params, jax.device_put(batch, partition.batch_sharding(mesh)))
    chex_close(jax.device_get(shared), alone, 1e-4)


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

    def again(remat, **sam):
        """FLOPs that are computed a second time on TPUs, where each of eight devices has a replica."""
        counts = []
        for what in ("none", remat):
            stage = build(remat=what, **sam)
            params = jax.eval_shape(stage.init, KEY, batch)
            with partition.use_mesh(partition.make_mesh(data=8)), platforms.assumed(platforms.Target("tpu")):
                counts.append(flops.count(gradient(stage), params, batch))
        return counts[1] - counts[0]

    sam = dict(sam_rho=0.1, sam_batch_size=2)
    assert again("products", **sam) == 2 * again("products") > 0
    assert again("all", **sam) > 2 * again("products", **sam)


def chex_close(found, expected, tolerance):
    """Trees are close relative to the largest entry of each leaf."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1e-3, float(jnp.abs(b).max())))


def test_the_sigmoid_loss_judges_every_pair_by_itself():
    image, text = unit(KEY, (5, 4)), unit(jax.random.key(1), (5, 4))
    same = jnp.eye(5, dtype=bool).at[0, 1].set(True).at[1, 0].set(True)
    loss, metrics = clip.sigmoid_loss(image, text, jnp.log(10.0), jnp.float32(-2.0), same)
    total = 0.0
    for i in range(5):
        for j in range(5):
            logit = 10.0 * float(image[i] @ text[j]) - 2.0
            total += math.log1p(math.exp(-logit if bool(same[i, j]) else logit))
    assert float(loss) == pytest.approx(total / 5, rel=1e-5)
    assert float(metrics["logit_bias"]) == -2.0
    stage = build(loss="sigmoid")
    params = stage.init(KEY, batch_of(4))
    assert float(jnp.exp(params["logit_scale"])) == pytest.approx(10.0) and params["logit_bias"] == -10.0
    grads = jax.grad(lambda p: stage.loss(p, KEY, batch_of(4))[0])(params)
    assert float(jnp.abs(grads["logit_bias"])) > 0
    with pytest.raises(ValueError, match="loss 'hinge' is unknown"):
        build(loss="hinge")


# Noised pictures


@pytest.mark.parametrize("vision", [VIT, RESNET])
def test_a_noised_clip_sees_noised_pictures_and_is_told_the_time(vision):
    stage = build(vision=vision, noise=dict(schedule="cosine"))
    batch = batch_of(6)
    params = stage.init(KEY, batch)
    image, text_embed = batch["image"], unit(jax.random.key(3), (6, 8))
    early, late = (stage.log_p(params, image, jnp.full(6, t), text_embed) for t in (0, 900))
    assert early.shape == (6,) and jnp.abs(early - late).max() > 1e-4
    scale = jnp.exp(params["logit_scale"])
    expected = scale * (stage.encode_image(params, image) * text_embed).sum(axis=1)
    np.testing.assert_allclose(early, expected, rtol=1e-5)  # without a time a picture is clean
    losses = [float(stage.loss(params, jax.random.key(k), batch)[0]) for k in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    fixed = [float(stage.loss(params, jax.random.key(k), batch, train=False)[0]) for k in (0, 0)]
    assert fixed[0] == fixed[1]
    with pytest.raises(ValueError, match="train one with model.noise"):
        plain = build(vision=vision)
        plain.log_p(plain.init(KEY, batch), image, jnp.zeros(6, jnp.int32), text_embed)
