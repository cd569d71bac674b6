"""Pictures measured against a reference: what is refused, what an entry says; every picture counts."""

import dataclasses
import json
import zipfile

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from dalle2_jax import pipeline
from dalle2_jax.convert import inception_weights
from dalle2_jax.evaluate import distances, evaluate, features, fidelity, networks, page, reference
from dalle2_jax.evaluate.distances import Moments
from dalle2_jax.evaluate.drawing import drawn_pictures
from dalle2_jax.evaluate.metric import Inputs, Request
from dalle2_jax.evaluate.metrics import OF_PICTURES, aesthetic, clip_r_precision, clip_score, frechet, kid
from dalle2_jax.evaluate.networks import Networks
from dalle2_jax.evaluate.picture_sets import Item, PictureSet, open_pictures
from dalle2_jax.runtime import partition
from dalle2_jax.runtime.batched import Batched
from tests.tiny_model import make_class_model, make_model


def made_set(count, seed=0, size=12, texts=()):
    """Random smooth pictures."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (count, 3, 3, 3)).astype(np.uint8)
    images = [np.asarray(Image.fromarray(p).resize((size, size), Image.BICUBIC)) for p in coarse]
    items = [Item(f"{i}", image) for i, image in enumerate(images)]
    return PictureSet(f"set{seed}", "folder", count, lambda: iter(items), tuple(texts))


@pytest.fixture
def small_inception(monkeypatch):
    """In the place of Inception a network of nine numbers a picture; FID begins at 50 pictures."""

    def function(params, x):
        rows = x.reshape(x.shape[0], -1)
        return {name: rows @ params["w"] for name in ("pool", "spatial", "logits_unbiased")}

    weights = np.random.default_rng(0).normal(size=(4 * 4 * 3, 9)).astype(np.float32)

    def extractor(weights_, preset, batch_size, mesh=None):
        batches = Batched(function, {"w": weights}, batch_size, mesh)

        def before(picture):  # 4 x 4 pixels, of pictures of side 12 or 8
            return np.float32(picture[:: len(picture) // 4, :: len(picture) // 4]) / 255

        return before, lambda rows: batches(np.stack(rows))

    monkeypatch.setattr(networks, "inception_extractor", extractor)
    monkeypatch.setattr(frechet, "FID_PICTURES", 50)
    monkeypatch.setattr(kid, "SUBSET", 40)
    monkeypatch.setattr(reference, "DIMENSIONS", {"pool": 9, "spatial": 9})
    return inception_weights.Weights({}, "aa", "bb")


def measure_pictures(model, out, names, judge=None, **request):
    """The entries of picture metrics by a request, as the command measures them."""
    request = Request(**request, out=str(out))
    inputs = Inputs(model, request, evaluate.open_networks(model, request, judge), epath.Path(out))
    inputs.images = request.images and open_pictures(request.images)
    inputs.reference = request.reference and reference.open_reference(request.reference)
    return evaluate.measure_pictures(inputs, names)


def test_every_picture_counts_on_any_number_of_devices():
    """Features over 1, 2 and 8 devices, the last batch not full, are those of one picture after another."""

    def function(params, x):
        return {"f": x.reshape(x.shape[0], -1) @ params["w"]}

    w = np.random.default_rng(0).normal(size=(12 * 12 * 3, 5)).astype(np.float32)
    images = made_set(21)
    expected = np.stack([np.float32(item.picture()).reshape(-1) for item in images.items()]) @ w
    for count in (1, 2, 8):
        mesh = partition.make_mesh(devices=jax.devices()[:count])
        batches = Batched(function, {"w": w}, 8, mesh)
        extractor = (lambda picture: np.float32(picture), lambda rows, run=batches: run(np.stack(rows)))
        told = []
        found = features.extract(
            images, [extractor], ["f"], 8, lambda done, all_, told=told: told.append(done)
        )
        assert found["f"].shape == (21, 5) and told == [8, 16, 21]
        np.testing.assert_allclose(found["f"], expected, rtol=1e-5)


def test_a_set_that_gives_fewer_pictures_than_it_says_is_an_error():
    short = dataclasses.replace(made_set(3), count=4)
    with pytest.raises(ValueError, match="gave 3 of 4 pictures"):
        features.extract(short, [(np.float32, lambda rows: {"f": np.stack(rows)[:, 0, 0]})], ["f"])


def test_numbers_of_inception(small_inception):
    x, y = made_set(80, 0), made_set(60, 1)
    names = ["fid", "sfid", "kid", "precision_recall", "inception_score", "fid_small"]
    found = fidelity.measure(x, y, names, Networks(small_inception, "openai", batch_size=16))
    expected = {
        "fid",
        "sfid",
        "kid",
        "precision",
        "recall",
        "density",
        "coverage",
        "inception_score",
        "fid_small",
    }
    assert found.keys() == expected and found["fid"]["value"] == found["fid_small"]["value"]
    for name, entry in found.items():
        assert entry["n"] == 80 and entry["weights_sha256"] == "aa" and entry["preset"] == "openai"
        assert entry.get("n_reference") == (None if name == "inception_score" else 60)
        assert "central square; then TensorFlow 1's bilinear" in entry["resize"]
        low, high = entry["interval"]
        assert low <= entry["value"] <= high
    json.dumps(found)
    lost = dataclasses.replace(x, refused={"no_image": 2})
    assert (
        fidelity.measure(lost, lost, ["fid"], Networks(small_inception))["fid"]["images_refused"]
        == lost.refused
    )
    assert fidelity.measure(x, x, ["fid"], Networks(small_inception))["fid"]["value"] == pytest.approx(
        0, abs=1e-5
    )
    assert len(fidelity.table(found).splitlines()) == 1 + len(found)


def test_statistics_stand_for_pictures(small_inception, tmp_path):
    x, y = made_set(80, 0), made_set(60, 1)
    fidelity.measure(y, None, ["inception_score"], Networks(small_inception), stats_out=tmp_path / "y.npz")
    stats = reference.read_stats(tmp_path / "y.npz")
    assert stats.count == 60 and stats.preset == "ttur"
    whole = fidelity.measure(x, y, ["fid", "sfid"], Networks(small_inception))
    found = fidelity.measure(x, stats, ["fid", "sfid"], Networks(small_inception))
    for name in ("fid", "sfid"):
        assert found[name]["value"] == pytest.approx(whole[name]["value"], rel=1e-6)
        assert found[name]["interval"] is None and found[name]["n_reference"] == 60
    with np.load(tmp_path / "y.npz") as stored:
        np.savez(tmp_path / "theirs.npz", mu=stored["mu"], sigma=stored["sigma"])
    theirs = reference.read_stats(tmp_path / "theirs.npz")
    found = fidelity.measure(x, theirs, ["fid"], Networks(small_inception))
    assert found["fid"]["value"] == pytest.approx(whole["fid"]["value"], rel=1e-6)
    assert found["fid"]["n_reference"] is None and "unknown" in fidelity.table(found)
    for name, message in (("kid", "needs the pictures of the reference"), ("sfid", "has no mu_s")):
        with pytest.raises(ValueError, match=message):
            fidelity.measure(x, theirs, [name], Networks(small_inception))
    with pytest.raises(ValueError, match="is of preset 'ttur', not 'clean'"):
        fidelity.measure(x, stats, ["fid"], Networks(small_inception, "clean"))
    other = dataclasses.replace(small_inception, sha256="other")
    with pytest.raises(ValueError, match="made with other weights"):
        fidelity.measure(x, stats, ["fid"], Networks(other))
    few = np.random.default_rng(0).normal(size=(5, 9))
    known = dict(mu=few.mean(axis=0), sigma=np.cov(few, rowvar=False))
    for more in (dict(n=5), {}):  # how few is said, or seen from the covariance
        np.savez(tmp_path / "few.npz", **known, **more)
        with pytest.raises(ValueError, match="fid of 5 pictures|of rank 4 is that of 5"):
            fidelity.measure(
                x, reference.read_stats(tmp_path / "few.npz"), ["fid"], Networks(small_inception)
            )
    for mu, sigma, message in (
        (
            np.zeros(3),
            np.zeros((2, 2)),
            r"mu is float64 \[3\], that of Inception's pool features is float \[9\]",
        ),
        (np.zeros(9), np.zeros((2, 2)), r"sigma is float64 \[2, 2\]"),
        (np.zeros(9), np.full((9, 9), np.nan), "not finite"),
        (np.zeros(9), np.triu(np.ones((9, 9))), "no covariance"),
        (np.array([{}]), np.eye(9), r"mu is object \[1\]"),
    ):
        np.savez(tmp_path / "bad.npz", mu=mu, sigma=sigma)
        with pytest.raises(ValueError, match="does not hold statistics.*" + message):
            reference.read_stats(tmp_path / "bad.npz")
    assert reference.read_stats(tmp_path / "no.npz") is None


def test_a_reference_of_pictures_and_statistics_serves_every_metric(small_inception, tmp_path):
    """As ADM's files: FID by mean and covariance, which are of other pictures, all else by the pictures."""
    x, y, other = made_set(80, 0), made_set(60, 1), made_set(70, 2)
    fidelity.measure(
        other, None, ["inception_score"], Networks(small_inception), stats_out=tmp_path / "s.npz"
    )
    images = np.stack([item.picture() for item in y.items()])
    with np.load(tmp_path / "s.npz") as stored:
        np.savez(tmp_path / "both.npz", arr_0=images, mu=stored["mu"], sigma=stored["sigma"])
    both = reference.open_reference(tmp_path / "both.npz")
    assert both.describe() == "both.npz: mean and covariance of 9 features; 60 pictures"
    names = ["fid", "sfid", "kid", "precision_recall", "inception_score"]
    found = fidelity.measure(x, both, names, Networks(small_inception))
    by_pictures = fidelity.measure(x, y, names, Networks(small_inception))
    by_statistics = fidelity.measure(x, other, ["fid"], Networks(small_inception))
    for name, entry in found.items():
        same = by_statistics if name == "fid" else by_pictures
        assert entry["value"] == pytest.approx(same[name]["value"], rel=1e-6)
        expected = {"fid": "statistics", "inception_score": None}.get(name, "pictures")
        assert entry.get("reference_by") == expected
        assert entry.get("n_reference") == (60 if expected == "pictures" else None)
    assert found["fid"]["value"] != pytest.approx(by_pictures["fid"]["value"], rel=1e-2)
    first, second = fidelity.table(found).splitlines()[-2:]
    assert first.startswith("fid: by the mean and covariance that both.npz holds; their Inception")
    assert second.startswith("sfid, kid, precision, recall") and second.endswith("the pictures of both.npz")
    assert "both.npz (statistics)" in page.entries(found) and "both.npz (pictures)" in page.entries(found)
    assert both.summary()["pictures"] == 60 and both.summary()["statistics"] == {"pool": 9}


def test_a_header_that_lies_of_statistics_allocates_nothing(tmp_path):
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        for name, shape in (("mu", (2048,)), ("sigma", (10**7, 10**7))):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array_header_1_0(
                    file, dict(descr="<f8", fortran_order=False, shape=shape)
                )
                file.write(bytes(2048 * 8))
    with pytest.raises(ValueError, match=r"sigma is float64 \[10000000, 10000000\]"):
        reference.read_stats(tmp_path / "huge.npz")


# Models without a CLIP


@pytest.mark.parametrize("classes", [("cat", "dog", "fox"), ()], ids=["classes", "nothing"])
def test_fid_of_a_model_that_has_no_clip_and_reads_no_captions(small_inception, tmp_path, classes):
    """As ADM: its classes are drawn in turn, all of its pictures differ, and no CLIP is asked for."""
    model = pipeline.UnCLIP.load(make_class_model(tmp_path / "model", classes))
    target = made_set(60, 1, size=8)
    np.savez(tmp_path / "target.npz", np.stack([item.picture() for item in target.items()]))
    target_file = tmp_path / "target.npz"

    def one(names, **changes):
        return measure_pictures(model, tmp_path, names, reference=target_file, n=9, **changes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_weights, "load", lambda path: small_inception)
        found = one(["fid_small"], inception=__file__)
    assert found["fid_small"]["n"] == 9 and found["fid_small"]["features"] == inception_weights.NETWORK
    drawn = open_pictures(tmp_path / "pictures")
    assert len({item.picture().tobytes() for item in drawn.items()}) == 9
    assert sorted(set(drawn.captions())) == sorted(classes or ["a picture"])
    if classes:
        assert sorted(drawn.captions()) == sorted(classes * 3)
    message = (
        "clip_mmd, clip_score need a CLIP, and the model has none: give --judge=DIR with one, or measure fid"
    )
    with pytest.raises(ValueError, match=message):
        one(["fid_small", "clip_mmd", "clip_score"])
    with pytest.raises(ValueError, match="fid_small needs Inception's weights"):
        one(["fid_small"])


def test_an_unconditional_model_that_its_classifier_steers_draws_the_classifiers_classes(
    small_inception, tmp_path
):
    """As ADM's unconditional generator at 256 pixels: every class as often."""
    model = pipeline.UnCLIP.load(make_class_model(tmp_path / "model", guide=True))
    target = made_set(60, 1, size=8)
    np.savez(tmp_path / "target.npz", np.stack([item.picture() for item in target.items()]))
    how = dict(reference=tmp_path / "target.npz", n=6, inception=__file__)
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_weights, "load", lambda path: small_inception)
        for name, settings in (("steered", dict(classifier=30.0)), ("plain", {})):
            (tmp_path / name).mkdir()
            measure_pictures(model, tmp_path / name, ["fid_small"], settings=settings, **how)
            drawn.append(open_pictures(tmp_path / name / "pictures"))
    steered, plain = drawn
    assert sorted(steered.captions()) == sorted(["red star", "blue ring", "yellow circle"] * 2)
    assert set(plain.captions()) == {"a picture"}
    pictures = [[item.picture().astype(int) for item in one.items()] for one in drawn]
    apart = [np.abs(a - b).max() for a, b in zip(*pictures, strict=True)]
    assert min(apart) > 1  # the same noise


def test_the_same_caption_is_drawn_as_another_picture_each_time(tmp_path):
    """Copies of one picture would be measured as if the model drew nothing else."""
    model = pipeline.UnCLIP.load(make_class_model(tmp_path / "model", ("cat", "dog")))
    found = drawn_pictures(model, ["a cat", "a dog", "a cat"], tmp_path / "out")
    alone = model.text_to_image(["a cat"], n=2).images
    first, _, last = (item.picture() for item in found.items())
    np.testing.assert_array_equal([first, last], alone)
    assert (first != last).any()
    listed = json.loads((tmp_path / "out" / "generate.json").read_text())["pictures"]
    assert [entry.get("number", 0) for entry in listed] == [0, 0, 1]


@pytest.mark.parametrize(
    ("names", "counts", "options", "message"),
    [
        (["fid"], (2047, 5000), {}, "fid of 2047 pictures would not be FID.*give more, or measure fid_small"),
        (["fid"], (5000, 2047), {}, "fid of 2047 pictures"),
        (["fid_infinity"], (9000, 9000), {}, "more than 20480 pictures, not 9000"),
        (["kid"], (999, 5000), {}, "subsets of 1000 pictures: 999 are too few"),
        (["precision_recall"], (5, 5), {}, "needs more than 5 pictures"),
        (["fid"], (5000, None), {}, "needs pictures to compare with: give --reference"),
        (["fid"], (5000, 5000), {"inception": None}, "needs Inception's weights.*clip_frechet"),
        (["clip_score"], (50, 50), {}, "not every picture of set has a caption"),
        (["aesthetic"], (50, 50), {}, "needs the weights of its head"),
        (["clip_mmd"], (50, 50), {"clip": None}, "clip_mmd needs a CLIP, and the model has none"),
        (["fdi"], (50, 50), {}, "did you mean 'fid'"),
        (["fid"], (5000, 5000), {"preset": "imagn"}, "did you mean 'imagen'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_read(names, counts, options, message):
    def fail():
        raise AssertionError("it was read")

    sets = [None if n is None else PictureSet("set", "folder", n, fail) for n in counts]
    weights = inception_weights.Weights({}, "aa", "bb")
    with pytest.raises(ValueError, match=message):
        fidelity.check(names, *sets, Networks(**{"inception": weights, "clip": "a CLIP"} | options))


# CLIP


def test_conventions_of_clip_score():
    cosine = np.array([0.5, -0.5, 0.3, -0.1])
    assert clip_score.clip_score(cosine, "raw")[0] == pytest.approx(0.05)
    assert clip_score.clip_score(cosine, "hessel")[0] == pytest.approx(2.5 * 0.2)  # cut pair by pair
    assert clip_score.clip_score(cosine, "torchmetrics")[0] == pytest.approx(5)  # cut after the mean
    assert clip_score.clip_score(-cosine, "torchmetrics")[0] == 0
    assert clip_score.clip_score(cosine, "raw")[1] == pytest.approx(cosine.std(ddof=1) / 2)
    with pytest.raises(ValueError, match="'cosine' is unknown; choose one of raw"):
        clip_score.clip_score(cosine, "cosine")


def test_cosines_do_not_see_lengths():
    x, y = np.random.default_rng(0).normal(size=(2, 5, 7))
    expected = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(clip_score.cosines(3 * x, y / 5), expected)
    with pytest.raises(ValueError, match=r"must both be \[N, E\]"):
        clip_score.cosines(x, y[:3])


def test_r_precision_counts_strict_wins():
    captions = [f"c{i}" for i in range(10)]
    text = np.eye(10)
    image = text.copy()
    image[0] = text[1]  # the wrong one
    image[1] = text[1] + text[2]  # a tie
    assert clip_r_precision.r_precision(image, text, captions, 10) == (8, 10)
    draw = np.random.default_rng(0)
    noise, words = draw.normal(size=(2, 2000, 64))
    right, count = clip_r_precision.r_precision(noise, words, [str(i) for i in range(2000)], 20)
    assert abs(right / count - 1 / 20) < 4 * np.sqrt(0.05 * 0.95 / 2000)
    with pytest.raises(ValueError, match="as many different ones, not 10"):
        clip_r_precision.r_precision(image, text, captions, 11)


def test_the_same_caption_is_no_distractor():
    text = np.eye(3)[[0, 0, 1, 2]]
    assert clip_r_precision.r_precision(text, text, ["a", "a", "b", "c"], 3) == (4, 4)


def test_the_aesthetic_head_is_that_of_torch(tmp_path):
    torch = pytest.importorskip("torch", reason="the comparison needs torch")
    sides = [(12, 8), (8, 4), (4, 1)]
    torch.manual_seed(0)
    layers = [part for side in sides for part in (torch.nn.Linear(*side), torch.nn.Dropout(0.2))]
    head = torch.nn.ModuleDict({"layers": torch.nn.Sequential(*layers[:-1])}).eval()
    x = np.random.default_rng(0).normal(size=(5, 12))
    for new in (True, False):
        torch.save(head.state_dict(), tmp_path / "head.pth", _use_new_zipfile_serialization=new)
        weight, bias, checksum = aesthetic.load(tmp_path / "head.pth", 12)
        found = aesthetic.score(3 * x, weight, bias)
        with torch.no_grad():
            unit = torch.nn.functional.normalize(torch.tensor(x, dtype=torch.float32))
            expected = head["layers"](unit)[:, 0].numpy()
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert len(checksum) == 64 and found.std() > 0.01
    with pytest.raises(ValueError, match="of 12 entries, the CLIP's have 5"):
        aesthetic.load(tmp_path / "head.pth", 5)
    torch.save({"layers.0.weight": torch.zeros(2, 3), "layers.0.bias": torch.zeros(2)}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match="ends in 2 numbers"):
        aesthetic.load(tmp_path / "two.pth", 3)
    torch.save({"fc.weight": torch.zeros(2, 3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no head of an aesthetic score"):
        aesthetic.load(tmp_path / "other.pth", 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pipeline.UnCLIP.load(make_model(tmp_path_factory.mktemp("tiny")))


def test_numbers_of_a_models_own_clip(model):
    texts = [
        f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("star", "ring", "cross")
    ]
    x, y = made_set(9, 0, texts=texts), made_set(11, 1)
    # metrics that also judge the reference, by its captions, have tests of their own: test_suites.py
    own = {name: metric for name, metric in OF_PICTURES.items() if not metric.beside}
    names = [name for name, metric in own.items() if metric.features == "clip"]
    width = model.engine.stage("clip").embed_dim
    weight = np.arange(width) / width
    found = fidelity.measure(x, y, names, Networks(clip=model, batch_size=8, head=(weight, 5.0, "cc")))
    embeds = [model.encode_image([item.picture() for item in part.items()]) for part in (x, y)]
    assert found["clip_frechet"]["value"] == pytest.approx(
        distances.frechet_distance(*map(Moments.of, embeds)), rel=1e-3, abs=1e-6
    )
    (words, _), _ = model.encode_text(texts)
    assert found["aesthetic"]["value"] == pytest.approx((embeds[0] @ weight).mean() + 5, abs=1e-4)
    assert found["aesthetic"]["head_sha256"] == "cc" and "n_reference" not in found["aesthetic"]
    raw = (embeds[0] * words).sum(axis=1).mean()
    assert found["clip_score_raw"]["value"] == pytest.approx(raw, abs=1e-5)
    assert found["clip_score_torchmetrics"]["value"] == pytest.approx(max(0, 100 * raw), abs=1e-3)
    (prefixed, _), _ = model.encode_text([f"A photo depicts {text}" for text in texts])
    hessel = 2.5 * np.maximum((embeds[0] * prefixed).sum(axis=1), 0).mean()
    assert found["clip_score_hessel"]["value"] == pytest.approx(hessel, abs=1e-5)
    assert found["clip_r_precision"]["candidates"] == 9
    assert all(entry["features"] == "CLIP of the model tiny" for entry in found.values())
    assert len(found["clip_mmd"]["weights_sha256"]) == 64 and "preset" not in found["clip_mmd"]


def test_a_model_is_measured_against_the_captions_that_it_draws(model, tmp_path):
    settings = dict(guidance_scale=2.0)

    def one(names=("clip_mmd", "clip_score"), **changes):
        common = dict(scenes="quickstart", n=8, settings=settings, batch_size=8)
        return measure_pictures(model, tmp_path, names, **common | changes)

    found = one(npz_out=tmp_path / "x.npz")
    assert found["clip_mmd"]["n"] == found["clip_mmd"]["n_reference"] == 8
    assert found["clip_mmd"]["reference"] == "quickstart_64" and found["clip_score_raw"]["n"] == 8
    drawn = tmp_path / "pictures" / "000003.png"
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (8, 32, 32, 3)
    before = drawn.read_bytes()
    drawn.unlink()
    assert one() == found and drawn.read_bytes() == before  # drawn again, and as before
    with pytest.raises(ValueError, match="of another plan"):
        one(seed=1)
    again = one(images=tmp_path / "pictures", reference=tmp_path / "x.npz", names=fidelity.WITH_CLIP)
    assert again["clip_frechet"]["value"] == pytest.approx(0, abs=1e-6) and again["clip_recall"]["value"] == 1
    with pytest.raises(ValueError, match="give --reference"):
        one(images=tmp_path / "pictures")
