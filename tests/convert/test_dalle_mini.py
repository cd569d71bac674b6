"""dalle-mini's weights against PyPI's min-dalle with random weights: logits, greedy tokens, pictures."""

import functools
import json
import re
import sys
import types

import jax
import numpy as np
import pytest
from flax import serialization

from dalle2_jax.convert import convert, tables
from dalle2_jax.convert.formats import dalle_mini, vqgan
from dalle2_jax.convert.tensors import Tensors, joined
from dalle2_jax.convert.workdirs import write_model
from dalle2_jax.embed import encoders
from dalle2_jax.generate.pipeline import Pipeline
from dalle2_jax.models import models
from dalle2_jax.runtime import modeldir
from dalle2_jax.train import plan
from tests import tiny_run
from tests.tiny_model import random_params

WIDTH, HEADS, DEPTH, HIDDEN, VOCAB, LENGTH, CODES = 128, 2, 2, 40, 300, 8, 30
NO_ENCODER = "this tokenizer has no encoder"
PIECES = [chr(256 + 32), *(chr(code) for code in range(97, 123))]  # the mark of a space, letters


@pytest.fixture(scope="module")
def oracle():
    """(torch, min_dalle.models), without what the package downloads with."""
    torch = pytest.importorskip("torch")
    for name in ("requests", "emoji"):
        if name not in sys.modules:
            sys.modules[name] = types.SimpleNamespace(demojize=None)
    pytest.importorskip("min_dalle", reason="min-dalle is not installed: pip install --no-deps min-dalle")
    from min_dalle import models as theirs

    torch.set_num_threads(1)  # it took all cores
    return torch, theirs


@pytest.fixture(scope="module")
def networks(oracle):
    """(encoder, decoder) of torch, small, with random weights in which every norm matters."""
    torch, theirs = oracle
    torch.manual_seed(0)
    encoder = theirs.DalleBartEncoder(DEPTH, WIDTH, HEADS, VOCAB, LENGTH, HIDDEN, "cpu")
    decoder = theirs.DalleBartDecoder(CODES, WIDTH, HEADS, HIDDEN, DEPTH, "cpu")
    with torch.no_grad():
        for net in (encoder, decoder):
            for name, x in net.named_parameters():
                std = (
                    0.1 if name.endswith("bias") else 0.3 if x.ndim == 1 else 1.0 if "embed" in name else 0.12
                )
                x.copy_(torch.randn(x.shape) * std + float(x.ndim == 1 and name.endswith("weight")))
    return encoder.eval(), decoder.eval()


def tensors_of(net) -> Tensors:
    arrays = {name: x.detach().numpy() for name, x in net.named_parameters()}
    return Tensors("torch", {name: x.shape for name, x in arrays.items()}, arrays.__getitem__)


@pytest.fixture(scope="module")
def imported(networks):
    """(stage, parameters) of ours."""
    names = ("encoder.", "decoder.")
    config, params = dalle_mini.read(joined(dict(zip(names, map(tensors_of, networks), strict=True))))
    assert config["model"]["start_code"] == CODES and config["model"]["num_codes"] == (CODES,)
    return models.build_stage(config), jax.tree.map(np.asarray, params)


TOKENS = np.array([[0, 17, 5, 9, 2, 0, 0, 0], [0, 44, 2, 0, 0, 0, 0, 0]], np.int32)
MASK = np.arange(LENGTH) < np.array([[5], [3]])


def test_greedy_tokens_are_those_of_min_dalle(oracle, networks, imported):
    """Of two captions, guided at 4: the logits and codes of the first 32 steps."""
    torch, _ = oracle
    encoder, decoder = networks
    stage, params = imported
    scale, count = 4.0, 256
    sample = jax.jit(lambda *a: stage.sample(*a, guidance_scale=scale, top_k=1))
    keys = jax.random.split(jax.random.key(0), 2)
    batch = {"tokens": TOKENS, "token_mask": MASK}
    drawn = np.asarray(sample(params, keys, batch))
    codes = np.concatenate([np.full((2, 1), CODES), drawn[:, :-1]], axis=1)
    ours = np.asarray(stage.net.apply({"params": params["net"]}, TOKENS, MASK, codes))
    for row in range(2):
        caption = np.where(MASK[row], TOKENS[row], 1)
        null = np.array([caption[0], 2, *[1] * (LENGTH - 2)])
        text = torch.tensor(np.stack([null, caption]))
        with torch.no_grad():
            state, cache = encoder(text), torch.zeros(DEPTH, 4, count, WIDTH)
            mask, code, found = text.not_equal(1)[:, None, None, :], CODES, []
            for k in range(32):
                prev, at = torch.tensor([[code]]), torch.tensor([k])
                logits, cache = decoder(mask, state, cache, prev, at)
                u, c = logits[:, -1, :CODES]
                np.testing.assert_allclose(ours[row, k, :CODES], c, rtol=1e-4, atol=1e-4)
                code = int((u * (1 - scale) + c * scale).argmax())
                found.append(code)
        np.testing.assert_array_equal(drawn[row, :32], found)
    assert len(np.unique(drawn)) > 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "vocab_size, num_ids, width, depth, hidden, count",
    [
        (50_264, 16_385, 1024, 12, 2730, 202_649_584 + 235_313_136),
        (50_272, 16_416, 2048, 24, 4096, 1_110_220_800 + 1_477_746_688),
    ],
)
def test_mini_and_mega_have_their_own_counts(vocab_size, num_ids, width, depth, hidden, count):
    net = dict(width=width, depth=depth, num_heads=width // 64, hidden=hidden)
    text = dict(vocab_size=vocab_size, context_length=64)
    config = dict(stage="dalle_mini", model=dict(text=text, net=net, num_ids=num_ids, start_code=num_ids - 1))
    params = models.abstract_params(models.build_stage(config))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def flax_tree(networks) -> dict:
    """The weights as dalle-mini stores them: layers stacked, gains of the norms before products left out."""
    names = {theirs: ours for ours, theirs in dalle_mini._LAYER.items()}
    glu, tree = {theirs: ours for ours, theirs in dalle_mini._GLU.items()}, {}

    def put(path, array):
        at = tree
        for part in path[:-1]:
            at = at.setdefault(part, {})
        at[path[-1]] = array

    for half, net in zip(("encoder", "decoder"), networks, strict=True):
        arrays = {name: x.detach().numpy() for name, x in net.named_parameters()}
        for name, array in arrays.items():
            *parts, kind = name.split(".")
            kind = "embedding" if "embed_" in name else {1: "scale", 2: "kernel"}[array.ndim]
            kind = "bias" if name.endswith("bias") else kind
            if parts[0] == "lm_head":
                put(("lm_head", "kernel"), array.T)
            elif parts[0] == "layers" and parts[1] == "0":
                rest = [names[parts[2]], *(glu.get(part, part) for part in parts[3:])]
                stack = [arrays[name.replace("layers.0.", f"layers.{i}.")] for i in range(DEPTH)]
                whole = np.stack([x.T if kind == "kernel" else x for x in stack])
                put(("model", half, "layers", f"FlaxBart{half.title()}Layers", *rest, kind), whole)
            elif parts[0] != "layers":
                put(("model", half, *parts, kind), array)
    del tree["model"]["decoder"]["final_ln"]["scale"]
    return tree


def test_flax_weights_are_the_same(networks, imported, tmp_path):
    tree = flax_tree(networks)
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    config, params = dalle_mini.read(dalle_mini._bart_of_flax(tmp_path))
    assert models.build_stage(config) == imported[0]
    wanted = dict(imported[1]["net"])
    wanted["norm_out"] = {"scale": np.ones(WIDTH), "bias": wanted["norm_out"]["bias"]}
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, params["net"]), wanted)


NET = dict(kind="vqgan", channels=8, channel_mult=[1, 2], num_res_blocks=1)
NET |= dict(attention_resolutions=[128], z_channels=8)
QUANTIZER = dict(kind="vq", decay=0.0, num_codes=16, width=4)
VQGAN = dict(image_size=256, net=NET, quantizer=QUANTIZER, likelihood="l1")


@functools.cache
def small_vqgan() -> tuple[dict, dict[str, np.ndarray]]:
    """(parameters, the same under taming's names) of a VQGAN with random weights."""
    params = random_params(models.build_stage({"stage": "tokenizer", "model": VQGAN}), 0)
    state = tables.exported(vqgan.rows(params), params, dropped=["stats/since_0"])
    return params, {name: np.asarray(lazy) for name, lazy in state.items()}


def of_detoker() -> Tensors:
    """What min-dalle's detoker.pt holds of it: the decoder's half, under these names."""
    _, arrays = small_vqgan()
    kept = {n: x for n, x in arrays.items() if not n.startswith(("encoder.", "quant_conv."))}
    kept = {name.removeprefix("quantize."): array for name, array in kept.items()}
    return Tensors("torch", {name: x.shape for name, x in kept.items()}, kept.__getitem__)


def write_flax_vqgan(folder, norm=(-1,)) -> None:
    """The VQGAN as vqgan-jax stores it; norm: the shape of its gains and biases."""
    flat = {}
    for name, array in small_vqgan()[1].items():
        kind = "embedding" if "embedding" in name else {1: "scale", 4: "kernel"}[array.ndim]
        flax = re.sub(r"(\w+)\.(\d+)", r"\1_\2", name).removesuffix(".weight")  # lists: up.0 is up_0
        flax += f".{kind}" if name.endswith(".weight") else ""
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        elif "norm" in name:
            array = array.reshape(norm)
        flat[flax.replace(".", "/")] = array
    assert "decoder/up_0/attn_1/proj_out/kernel" not in flat and "decoder/up_1/attn_1/q/kernel" in flat
    assert "decoder/mid/block_1/norm1/scale" in flat and "quantize/embedding/embedding" in flat
    assert "encoder/down_0/downsample/conv/kernel" in flat and "encoder/down_1/attn_0/q/kernel" in flat
    (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(modeldir.unflatten(flat)))


@pytest.mark.parametrize("norm", [(-1,), (1, 1, 1, -1)])
def test_the_vqgan_of_flax_has_both_halves(norm, tmp_path):
    """Norms have the shape of today's flax, or that of vqgan-jax's conversions; pixels are in [0, 1]."""
    write_flax_vqgan(tmp_path, norm)
    config, found = dalle_mini.read_vqgan(dalle_mini._vqgan_of_flax(tmp_path))
    assert config["model"] == VQGAN | dict(net=NET | dict(unit_pixels=True))
    params, found = (modeldir.flatten(x) for x in (small_vqgan()[0], found))
    assert params.keys() == found.keys()
    for name in sorted(params.keys() - {"net/decoder_out/kernel", "net/decoder_out/bias", "stats/since_0"}):
        np.testing.assert_array_equal(found[name], params[name], err_msg=name)
    last = "net/decoder_out/"
    np.testing.assert_allclose(found[f"{last}kernel"], 2 * params[f"{last}kernel"], rtol=1e-6)
    np.testing.assert_allclose(found[f"{last}bias"], 2 * params[f"{last}bias"] - 1, rtol=1e-6)


def test_the_vqgan_encodes_pixels_of_0_to_1(tmp_path):
    """Its codes, also those of the border, are those of the plain network on (x + 1) / 2."""
    write_flax_vqgan(tmp_path)
    config, params = dalle_mini.read_vqgan(dalle_mini._vqgan_of_flax(tmp_path))
    stage, params = models.build_stage(config), jax.tree.map(np.asarray, params)
    plain = models.build_stage({"stage": "tokenizer", "model": VQGAN})
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    codes = jax.jit(stage.encode)(params, images)[0]
    expected = jax.jit(plain.encode)(small_vqgan()[0], (images + 1) / 2)[0]
    np.testing.assert_array_equal(codes, expected)
    assert len(np.unique(codes)) > 4
    vectors = [params["book_0"]["embedding"][np.asarray(codes)]]
    net = jax.jit(lambda params: plain._net(params, "decode", vectors))
    made = jax.jit(stage.decode_codes)(params, (codes,))
    np.testing.assert_allclose(made, np.clip(2 * net(small_vqgan()[0]) - 1, -1, 1), atol=1e-5)


def min_dalle_folder(folder):
    """A model directory of min-dalle's tokenizer, in which no codes can be made."""
    parts = {"tokenizer": dalle_mini.read_decoder(of_detoker())}
    stages = {name: models.build_stage(config) for name, (config, _) in parts.items()}
    write_model(convert.check_out(folder, "float32"), parts, stages, None, "float32", {"name": ""})
    return folder


def test_min_dalles_vqgan_decodes_alone(tmp_path):
    """The same pictures as with the encoder; nothing of an encoder is stored, and encoding is refused."""
    config, found = dalle_mini.read_decoder(of_detoker())
    assert config["model"] == VQGAN | dict(decode_only=True)
    stage, found = models.build_stage(config), jax.tree.map(np.asarray, found)
    params, _ = small_vqgan()
    assert found["net"].keys() == params["net"].keys() - {"encoder", "quant_conv"}
    scaled = params["net"]["decoder_out"]
    scaled = {"kernel": 2 * scaled["kernel"], "bias": 2 * scaled["bias"] - 1}
    whole = params | {"net": params["net"] | {"decoder_out": scaled}}
    codes = (np.random.default_rng(0).integers(0, 16, (1, 4, 4)),)
    plain = models.build_stage({"stage": "tokenizer", "model": VQGAN})
    made = jax.jit(plain.decode_codes)(whole, codes)
    np.testing.assert_allclose(jax.jit(stage.decode_codes)(found, codes), made, atol=1e-5)
    for encode in (stage.encode, stage.encode_sequence, stage.reconstruct):
        with pytest.raises(ValueError, match=NO_ENCODER):
            encode(found, np.zeros((1, 16, 16, 3), np.float32))


def test_codes_of_a_tokenizer_without_encoder_are_refused(tmp_path, monkeypatch, caplog):
    """By embed before the weights are read, by a run that would encode with it, by training it further."""
    folder = min_dalle_folder(tmp_path / "m")
    (tmp_path / "data").mkdir()
    model = dict(grids=((128, 128),), num_codes=(16,), net=dict(width=8, depth=1, num_heads=1))
    config = tiny_run.config(tmp_path / "data", 1, stage="token_model", model=model, batch_size=8)
    config |= dict(frozen=dict(tokenizer=str(folder)))
    monkeypatch.setattr(encoders.frozen, "load", lambda config: pytest.fail("read the weights"))
    with pytest.raises(ValueError, match=NO_ENCODER):
        encoders.make_encoder(config, "", 8, "float16")
    monkeypatch.undo()
    assert tiny_run.run_main(config, tmp_path / "run", monkeypatch.setattr) == 2
    assert NO_ENCODER in caplog.text and not (tmp_path / "run").exists()
    again = tiny_run.config(tmp_path / "data", 1, stage="tokenizer", model=VQGAN | dict(decode_only=True))
    with pytest.raises(ValueError, match=NO_ENCODER):
        plan.make_plan(models.to_plain(again))


@pytest.mark.slow
def test_a_folder_of_min_dalle_becomes_a_model_that_draws(oracle, networks, tmp_path):
    """With the VQGAN's decoder at its own size; its pictures are min-dalle's."""
    torch, theirs = oracle
    torch.manual_seed(1)
    detoker, encoder = theirs.VQGanDetokenizer().eval(), networks[0]
    wide = theirs.DalleBartDecoder(2**14, WIDTH, HEADS, HIDDEN, DEPTH, "cpu")
    for name, net in (("encoder", encoder), ("decoder", wide), ("detoker", detoker)):
        torch.save(net.state_dict(), tmp_path / f"{name}.pt")
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {piece: 4 + i for i, piece in enumerate(PIECES)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    out = tmp_path / "model"
    assert convert.main(["dalle-mini", str(tmp_path), str(out), "--dtype=float32"]) == 0
    model = Pipeline.load(out)
    assert [*model.actions] == ["draw"]
    for action in ("reconstruct", "complete"):
        with pytest.raises(ValueError, match=NO_ENCODER):
            model.steps(action)
    drawn = model.text_to_image(["a cat"], seed=1, batch_size=1)
    assert drawn.images.shape == (1, 256, 256, 3)
    codes = np.random.default_rng(0).integers(0, 2**14, (1, 256))
    stage, params = model.engine.stage("tokenizer"), model.engine.params("tokenizer")
    ours = np.asarray(jax.jit(stage.decode_sequence)(params, codes))
    with torch.no_grad():
        wanted = detoker(False, torch.tensor(codes)).numpy() / 255  # clipped, [0, 1]
    # min-dalle's group norms have epsilon 1e-5, those that the weights were trained with 1e-6
    np.testing.assert_allclose((ours[0] + 1) / 2, wanted, atol=1e-3)
