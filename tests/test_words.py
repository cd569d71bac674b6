"""The words of captions: counted while training, copied into models, and what of a caption is unknown."""

import pytest
from etils import epath

from dalle2_jax.data import scenes, scenes_builder, words
from dalle2_jax.generate import captions
from dalle2_jax.runtime import hub


class Model:
    """What `unseen_words` reads of an engine."""

    def __init__(self, directory):
        self.directory = epath.Path(directory)


def test_words_of_any_script():
    assert words.split("A red-brown dog's bone, 2 CATS") == [
        "a",
        "red",
        "brown",
        "dog's",
        "bone",
        "2",
        "cats",
    ]
    assert words.split("一个红色的圆 и круг") == [*"一个红色的圆", "и", "круг"]


def test_counts_go_on_and_are_merged(tmp_path):
    folder = epath.Path(tmp_path)
    assert words.read(folder) is None and words.merged([]) is None
    counter = words.WordCounter("en")
    counter.add(["a red star", "a star"])
    words.write(folder, counter.so_far())
    before = words.read(folder)
    assert before == words.Words({"a": 2, "star": 2, "red": 1}, 2, ["en"])
    assert counter.so_far(before).counts == {"a": 4, "star": 4, "red": 2}
    other = words.Words({"stern": 7, "a": 1}, 9, ["de"])
    assert words.merged([before, other]) == words.Words(
        {"stern": 7, "a": 2, "star": 2, "red": 1}, 9, ["de", "en"]
    )
    (folder / words.FILE).write_text("{")
    assert words.read(folder) is None


def test_rare_words_are_cut_beyond_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(words, "MOST", 2)
    counter = words.WordCounter("en")
    counter.add(["a b c", "a b", "a"])
    words.write(epath.Path(tmp_path), counter.so_far())
    kept = words.read(epath.Path(tmp_path))
    assert kept.counts == {"a": 3, "b": 2} and kept.cut
    assert "hardly seen 'c'" in captions.unseen_words(Model(tmp_path), ["a c"])[0]


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a red star above a blue ring", None),
        ("a purple octopus", "never seen 'octopus'"),
        ("a red sqare", "never seen 'sqare' (did you mean 'square'?)"),
        (
            "ein roter Stern",
            "none of its words; it was trained on captions in English with words such as circle",
        ),
        ("一个红色的圆", "none of its words"),
    ],
)
def test_the_bundled_model_says_which_words_it_has_not_seen(caption, said):
    lines = captions.unseen_words(Model(hub.local("scenes")), [caption])
    assert lines == [] if said is None else said in lines[0]


def test_the_bundled_words_are_those_of_its_recipe():
    """Of 300 of the 20,000 scenes; all words occur in them."""
    config = scenes_builder.CONFIGS["quickstart_64"]
    counter = words.WordCounter("en")
    for i in range(300):
        counter.add(scenes.captions(scenes.sample_scene(scenes.preset(config.preset), "train", i), "en"))
    assert counter.so_far().counts.keys() == words.read(epath.Path(hub.local("scenes"))).counts.keys()
