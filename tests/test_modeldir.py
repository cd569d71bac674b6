"""Model directories and the comparison of parameters with a model."""

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dalle2_jax.runtime import modeldir, partition


def make_params(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)

    return {
        "conv_in": {"kernel": array(3, 3, 3, 8), "bias": array(8)},
        "block_0": {"fc1": {"kernel": array(8, 16)}, "norm1": {"scale": array(8)}},
        "token_embedding": {"embedding": array(24, 8)},
    }


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


class TestStageDirectory:
    config = {"stage": "clip", "model": {"width": 8, "note": "红色"}}

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_round_trip_is_exact_in_the_stored_dtype(self, tmp_path, dtype):
        params = make_params()
        modeldir.save_stage(tmp_path / "clip", self.config, params, dtype)
        config, got = modeldir.load_stage(tmp_path / "clip", keep_dtype=True)
        assert config == self.config
        assert_same(got, jax.tree.map(lambda p: np.asarray(p).astype(modeldir.DTYPES[dtype]), params))
        _, wide = modeldir.load_stage(tmp_path / "clip")
        assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype(np.float32)}
        for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(params), strict=True):
            # bfloat16 keeps 8 bits, so rounding moves a number by at most 2^-9 of its power of two
            np.testing.assert_allclose(a, b, rtol=0 if dtype == "float32" else 2**-8, atol=0)

    @pytest.mark.parametrize("keep_dtype", [False, True])
    def test_lazy_leaves_are_read_one_by_one(self, tmp_path, keep_dtype):
        modeldir.save_stage(tmp_path / "a", {}, make_params())
        _, eager = modeldir.load_stage(tmp_path / "a", keep_dtype)
        _, lazy = modeldir.load_stage(tmp_path / "a", keep_dtype, lazy=True)
        assert_same(jax.tree.map(np.asarray, lazy), eager)
        assert modeldir.sha256(lazy) == modeldir.sha256(eager)
        (tmp_path / "a" / "model.safetensors").unlink()  # nothing was kept
        with pytest.raises(FileNotFoundError):
            np.asarray(lazy["conv_in"]["bias"])

    def test_files_are_plain_safetensors_and_reproducible(self, tmp_path):
        params = {"b": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T}, "count": np.int32([7])}
        for name in ("one", "two"):
            modeldir.save_stage(tmp_path / name, {}, params, "float32")
        first = (tmp_path / "one" / "model.safetensors").read_bytes()
        assert first == (tmp_path / "two" / "model.safetensors").read_bytes()
        read = safetensors.numpy.load(first)
        assert set(read) == {"b/kernel", "count"}
        np.testing.assert_array_equal(read["b/kernel"], [[0, 3], [1, 4], [2, 5]])  # not its transpose
        assert read["count"].dtype == np.int32
        assert sorted(os.listdir(tmp_path / "one")) == ["config.json", "model.safetensors"]

    def test_saving_bfloat16_again_changes_nothing(self, tmp_path):
        modeldir.save_stage(tmp_path / "a", {}, make_params(), "bfloat16")
        modeldir.save_stage(tmp_path / "b", {}, modeldir.load_stage(tmp_path / "a")[1], "bfloat16")
        names = "a/model.safetensors", "b/model.safetensors"
        assert (tmp_path / names[0]).read_bytes() == (tmp_path / names[1]).read_bytes()

    def test_sharded_parameters_can_be_saved(self, tmp_path):
        params = make_params()
        placed = jax.device_put(params, partition.shardings(params, partition.make_mesh(2, 4, 1)))
        modeldir.save_stage(tmp_path, {}, placed, "float32")
        assert_same(modeldir.load_stage(tmp_path)[1], params)

    def test_errors(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="has no config.json"):
            modeldir.load_stage(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="bfloat16, float32"):
            modeldir.save_stage(tmp_path, {}, {}, "float16")
        modeldir.save_stage(tmp_path, {}, make_params())
        weights = tmp_path / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-10])
        with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
            modeldir.load_stage(tmp_path)
        weights.write_bytes(whole)
        (tmp_path / "config.json").write_text('{"a": ')
        with pytest.raises(ValueError, match="config.json is not valid JSON"):
            modeldir.load_stage(tmp_path)
        weights.unlink()
        with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
            modeldir.load_stage(tmp_path)

    def test_weights_of_strangers(self, tmp_path):
        """R32: a header of a terabyte, tensors that overlap, numbers that are not finite."""
        modeldir.save_stage(tmp_path, {}, make_params())
        weights = tmp_path / "model.safetensors"
        whole = weights.read_bytes()

        def refused(data, message):
            assert data != whole
            weights.write_bytes(data)
            with pytest.raises(ValueError, match=message):
                modeldir.load_stage(tmp_path)

        refused((10**12).to_bytes(8, "little") + whole[8:], "is not a whole safetensors file")
        length = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + length])
        first, second = [name for name in header if name != "__metadata__"][:2]
        header[second]["data_offsets"] = header[first]["data_offsets"]
        text = json.dumps(header).encode()
        refused(len(text).to_bytes(8, "little") + text + whole[8 + length :], "not a whole safetensors file")
        for dtype, bits in (("float32", np.float32(np.nan)), ("bfloat16", np.float32(-np.inf))):
            params = make_params()
            params["conv_in"]["bias"] = jnp.asarray([0, 1, 193 / 128, 3], jnp.float32)
            modeldir.save_stage(tmp_path, {}, params, dtype)
            good, bad = (np.asarray(x, modeldir.DTYPES[dtype]).tobytes() for x in (193 / 128, bits))
            weights.write_bytes(weights.read_bytes().replace(good, bad))
            with pytest.raises(ValueError, match="conv_in/bias holds numbers that are not finite"):
                modeldir.load_stage(tmp_path)
            with pytest.raises(ValueError, match="conv_in/bias holds numbers that are not finite"):
                np.asarray(modeldir.load_stage(tmp_path, lazy=True)[1]["conv_in"]["bias"])
            params["conv_in"]["bias"] = jnp.asarray([0, 1, bits, 3], jnp.float32)
            with pytest.raises(ValueError, match=f"conv_in/bias would hold .* not finite in {dtype}"):
                modeldir.save_stage(tmp_path, {}, params, dtype)
        modeldir.save_stage(tmp_path, {}, {"stats": {"eps_sq": jnp.full(4, jnp.nan)}})
        modeldir.load_stage(tmp_path)  # what was not measured is so


class TestCheckParams:
    def test_equal_trees_pass(self):
        params = make_params()
        modeldir.check_params(params, jax.eval_shape(lambda: params))

    def test_missing_surplus_and_misshapen_are_named_with_shapes(self):
        expected = jax.eval_shape(make_params)
        params = make_params()
        params["conv_inn"] = params.pop("conv_in")
        params["block_0"]["fc1"]["kernel"] = jnp.zeros((16, 8))
        with pytest.raises(ValueError, match="MODEL/clip and the model do not fit") as error:
            modeldir.check_params(params, expected, "MODEL/clip")
        text = str(error.value)
        assert "missing: conv_in/kernel [3, 3, 3, 8] (is 'conv_inn/kernel' meant for it?)" in text
        assert "surplus: conv_inn/bias [8]" in text
        assert "misshapen: block_0/fc1/kernel has [16, 8], the model expects [8, 16]" in text

    def test_a_long_list_is_cut(self):
        many = {f"layer_{i}": np.zeros(i) for i in range(50)}
        with pytest.raises(ValueError, match="and 40 more surplus"):
            modeldir.check_params(many, {})


class TestIndex:
    stages = {"clip": {"folder": "clip", "tokenizer": "tokenizer"}, "up64": "up64", "up256": "up256"}

    def write(self, path):
        for folder in ("clip", "up64", "up256"):
            modeldir.save_stage(path / folder, {"stage": folder}, make_params())
        (path / "tokenizer").mkdir()
        modeldir.write_index(path, self.stages, extra={"description": "红"})

    def test_round_trip(self, tmp_path):
        self.write(tmp_path)
        index = modeldir.read_index(tmp_path)
        tokenizers = {"clip": "tokenizer", "up64": "", "up256": ""}
        assert list(index["stages"]) == list(tokenizers)
        for name, entry in index["stages"].items():
            assert entry == {"folder": name, "uses": {}, "tokenizer": tokenizers[name]}
        assert index["system"] == "unclip" and index["description"] == "红"
        assert index["_class_name"] == "UnCLIP" and index["format_version"] == 2

    @pytest.mark.parametrize(
        "stages",
        [{"clip": "clip", "upsamplers": ["up64", "up256"]}, {"upsamplers": ["up64"]}, {"clip": "clip"}],
        ids=["all", "upsamplers alone", "CLIP alone"],
    )
    def test_version_1_is_read_as_version_2(self, tmp_path, stages):
        self.write(tmp_path)
        old = {"_class_name": "UnCLIP", "format_version": 1, "stages": stages, "tokenizer": "tokenizer"}
        modeldir.write_json(tmp_path / "model_index.json", old | {"name": "old"})
        index = modeldir.read_index(tmp_path)
        names = ["clip"] * ("clip" in stages) + stages.get("upsamplers", [])
        assert index["system"] == "unclip" and index["name"] == "old" and list(index["stages"]) == names
        for name, entry in index["stages"].items():
            assert entry == {"folder": name, "uses": {}, "tokenizer": "tokenizer"}

    def test_what_is_missing_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no model directory"):
            modeldir.read_index(tmp_path / "absent")
        with pytest.raises(FileNotFoundError, match="not a model directory: it has no model_index.json$"):
            modeldir.read_index(tmp_path)
        self.write(tmp_path)
        with pytest.raises(FileNotFoundError, match="one stage of a model directory"):
            modeldir.read_index(tmp_path / "clip")
        (tmp_path / "tokenizer").rmdir()
        with pytest.raises(FileNotFoundError, match="lacks .*tokenizer"):
            modeldir.read_index(tmp_path)
        (tmp_path / "up64" / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="stage 'up64' lacks .*up64/model.safetensors"):
            modeldir.read_index(tmp_path)
        workdir = tmp_path / "run"
        (workdir / "checkpoints").mkdir(parents=True)
        with pytest.raises(FileNotFoundError, match="training workdir: export it"):
            modeldir.read_index(workdir)

    @pytest.mark.parametrize("folder", ["../other", "/etc", "a/../../b", "gs://bucket/x", "", 3])
    def test_folders_outside_are_refused(self, tmp_path, folder):
        self.write(tmp_path)
        modeldir.write_index(tmp_path, {"clip": folder})
        with pytest.raises(ValueError, match="inside the model directory"):
            modeldir.read_index(tmp_path)

    def test_foreign_and_newer_indexes_are_refused(self, tmp_path):
        self.write(tmp_path)
        path = tmp_path / "model_index.json"
        good = json.loads(path.read_text())
        path.write_text(json.dumps(good | {"_class_name": "UnCLIPPipeline"}))
        with pytest.raises(ValueError, match="not the index of an UnCLIP model"):
            modeldir.read_index(tmp_path)
        path.write_text(json.dumps(good | {"format_version": 3}))
        with pytest.raises(ValueError, match="format version 3.*update dalle2_jax"):
            modeldir.read_index(tmp_path)
        path.write_text("[]")
        with pytest.raises(ValueError, match="JSON object"):
            modeldir.read_index(tmp_path)


def test_bfloat16_rounds_to_nearest_even():
    """1 + 2^-8 is midway between two bfloat16 numbers: it goes to the even one, 1; a little more goes up."""
    got = np.float32([1 + 2**-8, 1 + 2**-8 + 2**-20]).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(got, np.float32([1, 1 + 2**-7]))


def test_flatten_and_unflatten_are_inverse():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert modeldir.flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert modeldir.unflatten(modeldir.flatten(tree)) == tree
