"""What a field of a batch is follows from its name, never from its array's shape or type."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax import benchmark
from dalle2_jax.models.stages import Loss, Op, ar_prior, diffusion, prior
from dalle2_jax.runtime import batch, partition
from dalle2_jax.train import validation
from dalle2_jax.train.plan import Plan


def test_a_field_is_known_by_the_last_part_of_its_name():
    assert batch.field("clip.image") == batch.field("image") == batch.Field("uint8", "image")
    assert batch.field("t5.text_states").mask == "token_mask"
    with pytest.raises(ValueError, match="no field 'clip.imag'; did you mean 'image'"):
        batch.field("clip.imag")


def test_masks_are_masks_and_stages_draw_what_there_is():
    masks = [field.mask for field in batch.FIELDS.values() if field.mask]
    assert masks and {batch.field(name).kind for name in masks} == {"mask"}
    stages = (diffusion.DiffusionStage, prior.Prior, ar_prior.ARPrior)
    made = [stage.ops["sample"].writes[0] for stage in stages]
    assert [batch.field(name).kind for name in made] == ["image", "embedding", "embedding"]


def test_images_videos_and_states_alone_become_floats():
    levels = np.arange(8 * 2 * 4 * 4 * 3).astype(np.uint8)
    host = {
        "video": levels.reshape(8, 2, 4, 4, 3),
        "clip.image": levels.reshape(8, 2, 4 * 4, 3),
        "codes": levels.reshape(8, -1),
        "top.codes": levels.reshape(8, -1).astype(np.int32),
        "negative.tokens": np.ones((8, 3), np.int32),
        "t2v.index": np.arange(8),
        "t5.text_states": np.array(8 * [[[0x3FC0, 0xC000]]], np.uint16),  # 1.5 and -2 in bfloat16
    }
    mesh = partition.make_mesh()
    found = partition.on_devices(host, mesh)
    assert found.keys() == host.keys() - {"t2v.index"}
    assert {name: str(x.dtype) for name, x in found.items() if x.dtype != host[name].dtype} == {
        "video": "float32",
        "clip.image": "float32",
        "t5.text_states": "float32",
    }
    np.testing.assert_array_equal(found["t5.text_states"], 8 * [[[1.5, -2]]])
    np.testing.assert_array_equal(found["codes"], host["codes"])
    np.testing.assert_array_equal(batch.to_uint8(found["video"]), host["video"])
    with pytest.raises(ValueError, match="no field 'x'"):
        partition.on_devices({"x": levels}, mesh)


def test_a_synthetic_batch_has_the_values_of_its_kinds():
    shape = jax.ShapeDtypeStruct
    spec = {
        "video": shape((8, 2, 4, 4, 3), jnp.float32),
        "codes": shape((8, 5), jnp.uint8),
        "tokens": shape((8, 5), jnp.int32),
        "token_mask": shape((8, 5), bool),
        "text_states": shape((8, 5, 6), jnp.float32),
    }
    stage = types.SimpleNamespace(batch_spec=lambda size: spec)
    plan = Plan({"model": {"text": {"vocab_size": 9}}}, stage, partition.make_mesh())
    made = benchmark.synthetic_batch(plan, 8)
    assert {name: (x.shape, x.dtype) for name, x in made.items()} == {
        name: (x.shape, x.dtype) for name, x in spec.items()
    }
    assert not made["codes"].any() and made["token_mask"].all() and 1 <= made["tokens"].min()
    np.testing.assert_allclose(jnp.linalg.norm(made["text_states"], axis=-1), 1, rtol=1e-6)
    assert -1 <= made["video"].min() < -0.5 and 0.5 < made["video"].max() <= 1


class Writer:
    """Notes what a run would write."""

    def __init__(self):
        self.grids, self.values = [], []

    def grid(self, step, name, grid, labels):
        self.grids.append((step, name, labels))

    def scalars(self, step, values):
        self.values.append(values)


def samples(draws: str, value: np.ndarray) -> tuple[list, list, list]:
    """(grids, scalars, the pictures of a grid) of the samples of a stage that draws what its batch has."""
    host = {draws: value, "index": np.arange(8)}
    stage = types.SimpleNamespace(
        ops={"sample": Op((draws,))},
        loss=lambda params, key, batch, **_: Loss(0.0),
        sample=lambda params, keys, batch: batch[draws],
    )
    dataset = types.SimpleNamespace(
        batches=lambda size, **_: iter([host]), labels=lambda indices: [f"caption {i}" for i in indices]
    )
    config = dict(batch_size=8, eval_batches=1, num_samples=3, seed=0)
    run = validation.Validation(Plan(config, stage, partition.make_mesh()), dataset)
    shown, label = [], run._labelled
    run._labelled = lambda images: shown.append(images) or label(images)
    writer = Writer()
    run.samples({}, {}, writer, 5)
    return writer.grids, writer.values, shown


def test_samples_of_videos_are_a_grid_of_their_frames():
    video = np.random.default_rng(0).integers(0, 256, (8, 2, 4, 5, 3), np.uint8)
    grids, values, (shown,) = samples("video", video)
    assert grids == [(5, "samples", ["caption 0", "caption 1", "caption 2"])] and not values
    assert shown.shape == (3, 4, 10, 3)
    for frame in range(2):
        np.testing.assert_array_equal(shown[:, :, 5 * frame : 5 * frame + 5], video[:3, frame])


@pytest.mark.parametrize("shape", [(8, 6), (8, 4, 4), (8, 2, 4, 3)])  # the last is that of a batch of images
def test_samples_of_codes_are_no_grid_and_no_error(shape):
    assert samples("codes", np.ones(shape, np.uint8)) == ([], [], [])


def test_samples_of_embeddings_are_a_cosine():
    embedding = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    grids, (values,), shown = samples("clip.image_embed", embedding)
    assert not grids and not shown and values["eval/sample_cosine"] == pytest.approx(1)
