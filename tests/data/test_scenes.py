"""The scenes: sampling is pure, splits hold out what they say, sizes agree, captions are whole."""

import collections
import dataclasses
import io
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.data import scenes, scenes_builder, scenes_captions

PRESETS = [scenes.preset(name) for name in scenes.PRESETS]
HOLDING = [config for config in PRESETS if config.hold_out]


def sampled(config, split, count=150, seed=11):
    return [scenes.sample_scene(config, split, index, seed) for index in range(count)]


def names(scene):
    return [(thing.colour, thing.shape) for thing in scene.objects]


def area_average(image, size):
    factor = image.shape[0] // size
    return image.reshape(size, factor, size, factor, 3).astype(np.float64).mean((1, 3))


def lone(shape, diameter=0.8, colour="red", background="white"):
    thing = scenes.SceneObject(colour, shape, "large", 0.5, 0.5, diameter)
    return scenes.Scene((thing,), (), background)


# Sampling


def test_stream_is_splitmix64():
    # First output for state 0, from the reference implementation's published vectors.
    assert scenes.Stream().uniform() == (0xE220A8397B1DCDAF >> 11) * 2.0**-53


def test_stream_is_uniform_and_unbiased():
    stream = scenes.Stream(5)
    draws = np.array([stream.uniform() for _ in range(4000)])
    # The mean of n uniform draws has standard deviation 1 / sqrt(12 n) = 0.0046.
    assert abs(draws.mean() - 0.5) < 4 * 0.0046
    assert draws.min() >= 0 and draws.max() < 1
    picks = [scenes.Stream(6, k).weighted((0.25, 0.75)) for k in range(2000)]
    assert abs(np.mean(picks) - 0.75) < 4 * math.sqrt(0.25 * 0.75 / 2000)
    assert sorted(scenes.Stream(7).shuffled(range(20))) == list(range(20))


@pytest.mark.parametrize("config", PRESETS, ids=lambda c: c.name)
def test_a_scene_is_a_pure_function_of_config_split_index_seed(config):
    first = sampled(config, "train", 40)
    assert first == sampled(config, "train", 40)
    assert [scenes.sample_scene(config, "train", index, 11) for index in (31, 3)] == [first[31], first[3]]
    for other in (sampled(config, "validation", 40), sampled(config, "train", 40, seed=12)):
        assert not set(first) & set(other)
    assert len(set(first)) == 40


@pytest.mark.parametrize("config", PRESETS, ids=lambda c: c.name)
@pytest.mark.parametrize("split", scenes.SPLITS)
def test_geometry(config, split):
    for scene in sampled(config, split):
        assert len(set(names(scene))) == len(scene.objects) <= config.max_objects
        assert len(scene.relations) == len(scene.objects) - 1
        assert scene.background in config.backgrounds
        ranges = {size.name: size for size in config.sizes[len(scene.objects) - 1]}
        for thing in scene.objects:
            assert ranges[thing.size].low - 1e-4 <= thing.diameter <= ranges[thing.size].high + 1e-4
            reach = thing.diameter / 2 + config.margin - 1e-4
            assert reach <= thing.x <= 1 - reach and reach <= thing.y <= 1 - reach
        for places in zip(*((thing.x, thing.y) for thing in scene.objects), strict=True):
            boxed = [(place, thing.diameter / 2) for place, thing in zip(places, scene.objects, strict=True)]
            middle = (min(p - r for p, r in boxed) + max(p + r for p, r in boxed)) / 2
            assert abs(middle - 0.5) <= config.spread + 1e-3
        for i, a in enumerate(scene.objects):
            for b in scene.objects[i + 1 :]:
                apart = (a.diameter + b.diameter) / 2 + config.gap - 1e-3
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= apart
        for a, relation, b in zip(scene.objects, scene.relations, scene.objects[1:], strict=False):
            along, across = b.y - a.y, b.x - a.x
            if relation in ("left of", "right of"):
                along, across = across, along
            if relation in ("below", "right of"):
                along = -along
            assert along >= (a.diameter + b.diameter) / 2 + config.gap - 1e-3
            assert abs(across) <= config.lean * along + 1e-3


def test_twins_differ_in_one_thing():
    config = scenes.preset("quickstart")
    seen, kinds = set(scenes.pairs(config, False)), collections.Counter()
    for index in range(0, 600, 2):
        scene, twin = (scenes.sample_scene(config, "train", index + i) for i in (0, 1))
        if [(thing.x, thing.y) for thing in twin.objects] != [(thing.x, thing.y) for thing in scene.objects]:
            kinds["none"] += 1  # none that training may contain was found
            continue
        a, b = names(scene), names(twin)
        assert (twin.relations, twin.background) == (scene.relations, scene.background)
        assert a != b and set(b) <= seen and len(set(b)) == len(b)
        assert not scenes._has_held_out_triple(twin.objects)
        differing = sum(
            x != y for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
        )
        shapes = [[shape for _, shape in pair] for pair in (a, b)]
        colours = [[colour for colour, _ in pair] for pair in (a, b)]
        if a == b[::-1]:
            kinds["exchange"] += 1
        elif len(a) == 2 and colours[0] == colours[1] and shapes[0] == shapes[1][::-1]:
            kinds["shapes"] += 1
        else:
            assert differing == 1
            kinds["shape" if colours[0] == colours[1] else "colour", len(a)] += 1
    assert kinds["none"] < 10 and min(kinds[way] for way in ("exchange", "shapes")) > 8
    assert min(kinds[way, count] for way in ("shape", "colour") for count in (1, 2)) > 8
    # other splits have none, and the same scenes as without
    plain = dataclasses.replace(config, twins=False)
    for split in scenes.SPLITS[1:]:
        assert scenes.sample_scene(config, split, 1) == scenes.sample_scene(plain, split, 1)
    assert scenes.sample_scene(config, "train", 2) == scenes.sample_scene(plain, "train", 2)


def test_uneven_relations_are_of_training_alone():
    even, uneven = scenes.preset("quickstart"), scenes.preset("uneven")
    counts = collections.Counter(
        relation for scene in sampled(uneven, "train", 600) for relation in scene.relations
    )
    pairs = counts.total()
    for often, seldom in (("above", "below"), ("left of", "right of")):
        # a share of .85 of half of the pairs; four standard deviations of a share are at most .09
        assert abs(counts[often] / (counts[often] + counts[seldom]) - 0.85) < 0.12
        assert counts[often] + counts[seldom] > pairs / 3
    for split in scenes.SPLITS[1:]:
        assert sampled(uneven, split, 20) == sampled(even, split, 20)


def test_complete_scenes_hold_nothing_out_of_training():
    even, complete = scenes.preset("quickstart"), scenes.preset("complete")
    found = sampled(complete, "train", 600)
    seen = {name for scene in found for name in names(scene)}
    assert seen == set(scenes.pairs(complete, False)) | set(scenes.pairs(complete, True))
    assert any(scenes._has_held_out_triple(scene.objects) for scene in found)
    for split in scenes.SPLITS[1:]:
        assert sampled(complete, split, 20) == sampled(even, split, 20)


# Splits


def test_held_out_pairs_take_each_colour_and_each_shape_once():
    colours, shapes = zip(*scenes.HELD_OUT_PAIRS, strict=True)
    assert sorted(colours) == sorted(scenes.COLOURS)
    assert sorted(shapes) == sorted(scenes.SHAPES)
    assert len(scenes.pairs(scenes.preset("quickstart"), True)) == 5
    for pair in (("red", "star"), ("blue", "ring")):  # the first example that anybody tries
        assert pair not in scenes.HELD_OUT_PAIRS


@pytest.mark.parametrize("config", PRESETS, ids=lambda c: c.name)
def test_held_out_triples_are_a_tenth_and_leave_every_shape_its_relations(config):
    held, seen = scenes.triples(config, True), scenes.triples(config, False)
    assert 0.08 <= len(held) / (len(held) + len(seen)) <= 0.12
    assert ("star", "above", "ring") in seen
    for shape in config.shapes:
        for relation in ("above", "left of"):
            for place in (0, 2):
                kept = [t for t in seen if t[place] == shape and t[1] == relation]
                assert len(kept) >= 0.75 * len(config.shapes)


def test_a_triple_is_held_out_however_it_is_said():
    for a in scenes.SHAPES:
        for b in scenes.SHAPES:
            assert scenes.is_held_out_triple(a, "above", b) == scenes.is_held_out_triple(b, "below", a)
            assert scenes.is_held_out_triple(a, "left of", b) == scenes.is_held_out_triple(b, "right of", a)
    assert scenes.canonical_triple("star", "below", "ring") == ("ring", "above", "star")
    assert scenes.canonical_triple("star", "right of", "ring") == ("ring", "left of", "star")


def visible_triples(scene):
    """Every relation between two objects that a look at the boxes shows, said in both ways."""
    out = set()
    for a in scene.objects:
        for b in scene.objects:
            apart = (a.diameter + b.diameter) / 2
            if b.y - a.y >= apart:
                out |= {(a.shape, "above", b.shape), (b.shape, "below", a.shape)}
            if b.x - a.x >= apart:
                out |= {(a.shape, "left of", b.shape), (b.shape, "right of", a.shape)}
    return out


@pytest.mark.parametrize("config", HOLDING, ids=lambda c: c.name)
def test_splits_hold_out_what_they_say(config):
    for split in ("train", "validation"):
        for scene in sampled(config, split, 400):
            assert not set(names(scene)) & set(scenes.HELD_OUT_PAIRS)
            assert not any(scenes.is_held_out_triple(*triple) for triple in visible_triples(scene))
    for scene in sampled(config, "test_pairs", 200):
        assert set(names(scene)) & set(scenes.HELD_OUT_PAIRS)
        assert not any(scenes.is_held_out_triple(*triple) for triple in visible_triples(scene))
    for scene in sampled(config, "test_relations", 200):
        a, b = scene.objects
        assert not set(names(scene)) & set(scenes.HELD_OUT_PAIRS)
        assert scenes.is_held_out_triple(a.shape, scene.relations[0], b.shape)


@pytest.mark.parametrize("config", HOLDING, ids=lambda c: c.name)
def test_every_possibility_turns_up(config):
    train = sampled(config, "train", 1500)
    assert {pair for scene in train for pair in names(scene)} == set(scenes.pairs(config, False))
    assert {scene.background for scene in train} == set(config.backgrounds)
    assert {relation for scene in train for relation in scene.relations} == set(scenes.RELATIONS)
    drawn = train[::2] if config.twins else train  # the others repeat these
    counts = np.bincount([len(scene.objects) for scene in drawn], minlength=4)[1 : config.max_objects + 1]
    # Four standard deviations of a share in so many draws, at most sqrt(1 / 4 / draws) each.
    shares = counts / len(drawn) - np.array(config.count_weights)
    assert np.abs(shares).max() < 4 * (0.25 / len(drawn)) ** 0.5
    held = {
        names(scene)[k] for scene in sampled(config, "test_pairs", 300) for k in range(len(scene.objects))
    }
    assert set(scenes.pairs(config, True)) <= held


# Pictures


@pytest.mark.parametrize("config", PRESETS, ids=lambda c: c.name)
def test_the_small_picture_is_the_area_average_of_the_large_one(config):
    for scene in sampled(config, "train", 12):
        large = scenes.render(scene, 256)
        assert large.dtype == np.uint8 and large.shape == (256, 256, 3)
        for size in (16, 32, 64, 128):
            assert np.abs(scenes.render(scene, size) - area_average(large, size)).mean() < 0.3
        assert np.abs(scenes.render(scene, 8) - area_average(large, 8)).mean() < 1
    # Above 256 the edge is a pixel of the large picture wide rather than of the 256-pixel one.
    larger = scenes.render(scene, 1024)
    assert np.abs(area_average(larger, 256) - large).mean() < 0.5


def test_sizes_that_do_not_divide_256_agree_too():
    scene = scenes.sample_scene(PRESETS[0], "train", 2)
    large = Image.fromarray(scenes.render(scene, 960))
    for size in (24, 60, 96):
        smaller = np.asarray(large.resize((size, size), Image.BOX), np.float64)
        assert np.abs(scenes.render(scene, size) - smaller).mean() < 1


def area(shape, diameter):
    """The area of a shape in fractions of the picture, from its ideal outline."""
    star, inner = 0.525, 0.45 * 0.525
    unit = {
        "circle": math.pi * 0.49**2,
        "square": 0.88**2,
        "triangle": 0.92 / 2,
        "star": 5 * star * inner * math.sin(math.pi / 5),
        "ring": math.pi * (0.495**2 - 0.235**2),
        "cross": 2 * 0.98 * 0.33 - 0.33**2,
        # A square of side s on its corner and two half discs of diameter s; s = 0.41 sqrt 2.
        "heart": 2 * 0.41**2 * (1 + math.pi / 4),
        "diamond": 0.72 * 1.0 / 2,
    }
    return unit[shape] * diameter**2


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("size", [16, 256])
def test_area_and_symmetry_of_shapes(shape, size):
    image = scenes.render(lone(shape), size).astype(np.float64)
    white, red = np.array([255.0] * 3), np.array(scenes.COLOURS["red"], np.float64)
    coverage = (image - white) @ (red - white) / ((red - white) @ (red - white))
    assert coverage.mean() == pytest.approx(area(shape, 0.8), rel=0.01)
    assert np.abs(coverage - coverage[:, ::-1]).max() < 0.01
    upright = shape in ("circle", "square", "ring", "cross", "diamond")
    assert (np.abs(coverage - coverage[::-1]).max() < 0.01) == upright


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_shapes_stay_within_their_diameter(shape):
    image = scenes.render(lone(shape, 0.5), 256)
    ys, xs = np.nonzero((image != 255).any(-1))
    assert min(xs.min(), ys.min()) >= 64 - 2 and max(xs.max(), ys.max()) <= 191 + 2
    assert max(np.ptp(xs), np.ptp(ys)) >= 0.42 * 256


def test_colours_are_exact_and_edges_soft():
    image = scenes.render(lone("circle", 0.5, "green", "grey"), 64)
    assert tuple(image[32, 32]) == scenes.COLOURS["green"]
    assert tuple(image[0, 0]) == scenes.BACKGROUNDS["grey"]
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10


@pytest.mark.parametrize("size", [7, 1025])
def test_sizes_out_of_range(size):
    with pytest.raises(ValueError, match="8..1024"):
        scenes.render(lone("star"), size)


# Captions


def test_the_plain_forms():
    star = scenes.SceneObject("red", "star", "large", 0.5, 0.25, 0.4)
    ring = scenes.SceneObject("blue", "ring", "large", 0.5, 0.75, 0.4)
    assert scenes.caption(scenes.Scene((star,), (), "white")) == "a red star"
    pair = scenes.Scene((star, ring), ("above",), "white", ("background",))
    texts = scenes.captions(pair)
    assert scenes.caption(pair) == texts[0] == "a red star above a blue ring"
    expected = {
        "red star over blue ring",
        "a picture of a red star with a blue ring below it",
        "a blue ring below a red star",
        "a red star above a blue ring on a white background",
    }
    assert expected <= set(texts)
    assert scenes.caption(pair, "en", len(texts) + 1) == texts[1]
    assert scenes.caption(pair, "zh") == "一个红色五角星在一个蓝色圆环的上方"
    orange = dataclasses.replace(star, colour="orange")
    assert scenes.caption(scenes.Scene((orange,), (), "white")) == "an orange star"


@pytest.mark.parametrize("config", PRESETS, ids=lambda c: c.name)
def test_every_caption_names_every_object(config):
    chinese_colours, chinese_shapes = scenes_captions._COLOURS_ZH, scenes_captions._SHAPES_ZH
    for scene in sampled(config, "train", 100):
        english, chinese = scenes.captions(scene), scenes.captions(scene, "zh")
        for texts in (english, chinese):
            assert len(set(texts)) == len(texts) >= 4
        for colour, shape in names(scene):
            assert all(f"{colour} {shape}" in text for text in english)
            assert all(chinese_colours[colour] + chinese_shapes[shape] in text for text in chinese)
        if config.details == ("background",):
            share = np.mean([scene.background in text for text in english])
            assert 0.25 <= share <= 0.45
            assert not any(
                word in text for text in english for word in ("small", "medium", "large", "corner")
            )
        assert not any(text.isascii() for text in chinese)


def test_sizes_and_places_are_named_where_they_are_unmistakable():
    full = scenes.preset("full")
    corner = scenes.SceneObject("pink", "heart", "small", 0.2, 0.2, 0.16)
    texts = scenes.captions(scenes.Scene((corner,), (), "brown", full.details))
    assert "a small pink heart in the top left corner" in texts
    assert "pink heart on brown" in texts
    assert scenes.place_name(dataclasses.replace(corner, x=0.5, y=0.5)) == "centre"
    assert scenes.place_name(dataclasses.replace(corner, x=0.5, y=0.8)) == "bottom"
    assert scenes.place_name(dataclasses.replace(corner, x=0.39)) is None


def test_wrong_requests():
    with pytest.raises(ValueError, match="did you mean 'quickstart'"):
        scenes.preset("quikstart")
    with pytest.raises(ValueError, match="did you mean 'test_pairs'"):
        scenes.sample_scene(PRESETS[0], "test_pair", 0)
    with pytest.raises(ValueError, match="'en' or 'zh'"):
        scenes.captions(lone("star"), "de")
    with pytest.raises(ValueError, match="did you mean 'orange'"):
        dataclasses.replace(PRESETS[0], colours=("orang",))
    with pytest.raises(ValueError, match="one entry for each"):
        dataclasses.replace(PRESETS[0], count_weights=(1.0,))
    huge = (scenes.SizeRange("large", 0.6, 0.7),)
    with pytest.raises(ValueError, match="smaller"):
        scenes.sample_scene(
            dataclasses.replace(PRESETS[0], count_weights=(0.0, 1.0), sizes=(huge, huge)), "train", 0
        )


# What evaluations ask for


@pytest.mark.parametrize("config", PRESETS, ids=lambda c: c.name)
@pytest.mark.parametrize("kind", scenes.KINDS)
def test_evaluation_captions(config, kind):
    texts = scenes.evaluation_captions(config, kind, 48, seed=3)
    assert len(texts) == 48 == len(set(texts))
    assert texts == scenes.evaluation_captions(config, kind, 48, seed=3)
    assert texts != scenes.evaluation_captions(config, kind, 48, seed=4)
    held_out = [f"{colour} {shape}" for colour, shape in scenes.HELD_OUT_PAIRS]
    for text in texts:
        assert any(pair in text for pair in held_out) == (kind == "single_heldout")
        named = sum(text.count(f"{colour} {shape}") for colour in config.colours for shape in config.shapes)
        assert named == (1 if kind.startswith("single") else 2)


def test_evaluation_captions_repeat_only_when_there_are_no_more():
    config = scenes.preset("quickstart")
    texts = scenes.evaluation_captions(config, "single_heldout", 200)
    distinct = len(set(texts))
    assert len(texts) == 200 and distinct >= 5 * 8
    assert len(set(texts[:distinct])) == distinct


# The dataset


def test_json_round_trip():
    for scene in sampled(PRESETS[1], "train", 20):
        assert scenes.Scene.from_json(scene.to_json()) == scene


def test_drawing_needs_no_tensorflow():
    code = "import sys, dalle2_jax.data.scenes; print('tensorflow' in sys.modules, 'jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_builder():
    assert scenes_builder.CONFIGS.keys() >= {"quickstart_64", "quickstart_256", "full_256"}
    config, preset = scenes_builder.CONFIGS["debug_64"], scenes.preset("quickstart")
    for split in ("train", "test_relations"):
        examples = list(scenes_builder.examples_of(config, split))
        assert len(examples) == 64
        for index in (0, 1, 63):
            scene, example = scenes.sample_scene(preset, split, index), examples[index]
            assert [scenes.Scene.from_json(text.decode()) for text in example["scene"]] == [scene]
            (picture,) = example["image"]
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture))), scenes.render(scene, 64))
            texts = {
                name: [text.decode() for text in values] for name, values in example.items() if "cap" in name
            }
            assert texts == {
                "caption": [scenes.caption(scene)],
                "captions": scenes.captions(scene),
                "caption_zh": [scenes.caption(scene, "zh")],
                "captions_zh": scenes.captions(scene, "zh"),
            }
