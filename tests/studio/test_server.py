"""The studio's HTTP API, served with random weights; skipped by name without gradio."""

import base64
import concurrent.futures
import io
import json
import os
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")

from tests.studio.serving import served  # noqa: E402 (where gradio is)
from tests.tiny_model import make_class_model, make_model  # noqa: E402

QUICK = {"decoder_steps": 2, "prior_steps": 2, "upsampler_steps": "1", "n": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(make_model(tmp_path_factory.mktemp("model"))) as (url, studio):
        yield url, studio


def post(url, data, headers=()):
    """(status, answer) of a request."""
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    try:
        request = urllib.request.Request(url, data, dict(headers))
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_eight_clients_at_once_get_their_own_pictures(server):
    url, studio = server
    captions = [f"a red star {i}" for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        asked = [{"caption": caption, "seed": i} | QUICK for i, caption in enumerate(captions)]
        answers = list(clients.map(lambda request: post(f"{url}/api/create", request), asked))
    for i, (status, answer) in enumerate(answers):
        assert status == 200, answer
        alone = next(iter(studio.models.values())).text_to_image(
            [captions[i]], seed=i, n=1, decoder_steps=2, prior_steps=2, upsampler_steps=[1]
        )
        with Image.open(io.BytesIO(base64.b64decode(answer["pictures"][0]["png"]))) as picture:
            assert picture.text["caption"] == captions[i]
            np.testing.assert_array_equal(np.asarray(picture), alone.images[0])


def resident() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_memory_is_flat_over_a_hundred_requests(server):
    url, _ = server
    buffer = io.BytesIO()
    Image.new("RGB", (600, 400), "green").save(buffer, "PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()

    def ask(seed):
        with concurrent.futures.ThreadPoolExecutor(4) as clients:
            create = {"caption": f"a red star {seed}", "seed": seed} | QUICK
            vary = {"picture": picture, "seed": seed, "n": 2, "num_steps": 2}
            asked = [("create", create), ("variations", vary), ("create", create), ("variations", {})]
            codes = list(clients.map(lambda each: post(f"{url}/api/{each[0]}", each[1])[0], asked))
        assert codes == [200, 200, 200, 400]

    for seed in range(5):
        ask(seed)
    before = resident()
    for seed in range(5, 30):
        ask(seed)
    more = (resident() - before) / 2**20
    print(f"{more:.1f} MiB more after 100 requests")
    assert more < 20


def test_explain_ends_with_the_picture_of_create(server):
    url, _ = server
    request = {"caption": "a blue ring"} | {k: v for k, v in QUICK.items() if k != "n"}
    status, made = post(f"{url}/api/explain", request)
    _, drawn = post(f"{url}/api/create", request | {"n": 1})
    assert status == 200 and len(made["path"]) == 2 and made["kept"] == int(np.argmax(made["cosines"]))
    last = Image.open(io.BytesIO(base64.b64decode(made["stages"]["upsampler32"])))
    picture = Image.open(io.BytesIO(base64.b64decode(drawn["pictures"][0]["png"])))
    np.testing.assert_array_equal(np.asarray(last), np.asarray(picture))


@pytest.mark.parametrize(
    ("path", "data", "status", "why"),
    [
        ("/api/create", {"caption": ""}, 400, "caption is missing|caption is empty"),
        ("/api/create", b"{", 400, "no JSON"),
        ("/api/nothing", {}, 400, "no such action"),
        ("/api/create", {"caption": "a", "model": "/etc/passwd"}, 400, "no such model"),
        ("/api/create", {"caption": "a", "upsampler_steps": [1, 1]}, 400, "upsampler_steps has 2 numbers"),
        ("/gradio_api/upload", b"x", 403, "keeps no files"),
    ],
)
def test_refusals_say_why(server, path, data, status, why):
    import re

    code, answer = post(server[0] + path, data)
    assert code == status and re.search(why, answer["error"]), answer


def encoded(image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_repainting_by_a_transparent_layer_keeps_the_rest_and_an_all_white_mask_is_noted(server):
    green = np.full((32, 32, 3), (0, 128, 0), np.uint8)
    strokes = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    strokes.paste("white", (16, 0, 32, 32))
    request = {"picture": encoded(Image.fromarray(green)), "caption": "a red star", "n": 1, "num_steps": 2}
    status, made = post(f"{server[0]}/api/inpaint", request | {"mask": encoded(strokes)})
    assert status == 200 and made["notes"] == [], made
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(made["pictures"][0]["png"]))))
    assert (image[:, :16] == green[:, :16]).all() and (image[:, 16:] != green[:, 16:]).any()
    white = encoded(Image.new("L", (32, 32), "white"))
    status, made = post(f"{server[0]}/api/inpaint", request | {"mask": white})
    assert status == 200 and "nothing of it is kept" in made["notes"][0]


def test_what_the_page_leaves_unset_is_no_component_that_cannot_be(server):
    """gr.Number, and gr.Slider, turn None into a number once they are shown."""
    import gradio

    from dalle2_jax.studio import page

    blocks, _ = page.build(server[1])
    numbers = [each for each in blocks.blocks.values() if isinstance(each, gradio.Number | gradio.Slider)]
    assert len(numbers) > 3
    assert [each.label for each in numbers if each.value is None] == []


def test_a_model_without_captions_draws_and_repaints_without(tmp_path):
    import gradio

    from dalle2_jax.studio import page, subjects, work

    studio = work.Studio([make_class_model(tmp_path)])
    (model,) = studio.models.values()
    blocks, _ = page.build(studio)
    boxes = [
        each for each in blocks.blocks.values() if isinstance(each, gradio.Textbox) and each.visible is True
    ]
    assert not [each.elem_id for each in boxes if each.elem_id]
    tabs = [each.label for each in blocks.blocks.values() if isinstance(each, gradio.Tab)]
    assert tabs == ["Brush", "Extend", "Start from it"]
    assert "no captions" in subjects.subjects(model)[0]
    (drawn,) = studio.draw("create", {"n": 1, "caption": ""})
    assert drawn.command == f"python -m dalle2_jax.generate --model={tmp_path} --seed=0 --n=1"
    mask = encoded(Image.fromarray(np.eye(8, dtype=np.uint8) * 255))
    (repainted,) = studio.draw("inpaint", {"picture": drawn.png, "mask": mask, "n": 1, "seed": 1})
    before, after = (np.asarray(Image.open(io.BytesIO(each.png))) for each in (drawn, repainted))
    kept = ~np.eye(8, dtype=bool)
    assert (before[kept] == after[kept]).all() and (before != after).any()


def test_the_page_names_the_shapes_or_classes_that_a_model_draws(tmp_path):
    from dalle2_jax.generate.pipeline import Pipeline
    from dalle2_jax.studio.subjects import subjects

    said, tries = subjects(Pipeline.load())
    assert "one to two shapes (circle, square," in said and tries[0] == "a red star above a blue ring"
    assert len(set(tries)) == len(tries) > 2
    said, tries = subjects(Pipeline.load(make_class_model(tmp_path, ("cat", "dog"))))
    assert said.endswith("cat, dog.") and tries == ["cat", "dog"]


def test_a_model_of_other_pictures_is_known_by_its_words_and_its_own_captions(tmp_path):
    from dalle2_jax.data import words
    from dalle2_jax.generate.pipeline import Pipeline
    from dalle2_jax.studio.subjects import subjects

    model = Pipeline.load(make_model(tmp_path))
    model.engine.configs["decoder"]["data"]["source"] = "tar"
    assert subjects(model) == ("It draws what its training pictures show.", [])
    words.write(tmp_path, words.Words({"a": 9, "corgi": 5, "field": 3}, 9, ["en"]))
    model.engine.configs["decoder"]["sample_captions"] = ["a corgi in a field"]
    said, tries = subjects(model)
    assert said == "It was trained on captions in English with words such as corgi, field."
    assert tries == ["a corgi in a field"]


def test_zero_steps_asked_for_are_refused_and_empty_ones_are_the_models(server):
    code, answer = post(f"{server[0]}/api/create", {"caption": "a"} | QUICK | {"decoder_steps": 0})
    assert code == 400 and "decoder_steps 0 is not allowed: give 1 to 250" in answer["error"]
    code, answer = post(f"{server[0]}/api/create", {"caption": "a"} | QUICK | {"prior_candidates": ""})
    assert code == 200, answer


def test_pages_of_other_sites_are_refused(server):
    code, answer = post(f"{server[0]}/api/create", {"caption": "a"}, {"Origin": "http://evil.example"})
    assert code == 403 and "other sites" in answer["error"]


def test_a_studio_of_this_machine_answers_to_no_other_name(server):
    code, answer = post(f"{server[0]}/api/create", {"caption": "a"}, {"Host": "evil.example"})
    assert code == 403 and "its own machine" in answer["error"]


def test_a_full_queue_is_refused_at_once(server):
    url, studio = server
    release, entered = threading.Event(), threading.Semaphore(0)

    def wait():
        with studio.turns.turn(lambda before: entered.release()):
            entered.release()
            release.wait(30)

    threads = [threading.Thread(target=wait) for _ in range(studio.turns.most)]
    try:
        for thread in threads:
            thread.start()
            assert entered.acquire(timeout=10)
        code, answer = post(f"{url}/api/create", {"caption": "a"})
        assert code == 503 and "busy" in answer["error"]
    finally:
        release.set()
        for thread in threads:
            thread.join()
