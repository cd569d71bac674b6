"""What the studio refuses and why, its queue, its commands; nothing is drawn."""

import base64
import io
import random
import shlex
import struct
import threading
import time
import types
import zlib

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.studio import page, requests, work


def png(mode="RGB", size=(8, 6)) -> str:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def moving() -> str:
    """A WebP file of two frames."""
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return base64.b64encode(buffer.getvalue()).decode()


def bomb(width=60000, height=60000) -> str:
    """A PNG of a few bytes whose header speaks of gigabytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


def test_defaults_are_filled_in_and_the_models_own_left_out():
    assert requests.check("create", {"caption": " a  ring "}) == {"caption": "a ring", "seed": 0, "n": 4}
    made = requests.check("create", {"caption": "a", "upsampler_steps": "4, 2", "guidance_scale": 3})
    assert made["upsampler_steps"] == [4, 2] and made["guidance_scale"] == 3.0


@pytest.mark.parametrize(
    ("action", "request_", "why"),
    [
        ("create", {}, "caption is missing"),
        ("create", {"caption": "  "}, "caption is empty"),
        ("create", {"caption": "a" * 301}, "at most 300"),
        ("create", {"caption": "\ud800"}, "no text"),
        ("create", {"caption": "a", "n": 9}, "give 1 to 8"),
        ("create", {"caption": "a", "n": 1.5}, "whole number"),
        ("create", {"caption": "a", "n": True}, "must be a number"),
        ("create", {"caption": "a", "seed": float("nan")}, "seed"),
        ("create", {"caption": "a", "seed": float("inf")}, "seed"),
        ("create", {"caption": "a", "guidance_scale": float("nan")}, "guidance_scale"),
        ("create", {"caption": "a", "decoder_steps": 10**9}, "give 1 to 250"),
        ("create", {"caption": "a", "upsampler_steps": [1] * 9}, "such as 4,2"),
        ("create", {"caption": "a", "model": "/etc/passwd"}, "no field of create"),
        ("__init__", {}, "no such action"),
        ("create", [1], "JSON object"),
        ("variations", {"picture": "/etc/passwd"}, "not base64"),
        ("variations", {"picture": "data:image/png,abc"}, "without ;base64"),
        ("variations", {"picture": base64.b64encode(b"GIF89a").decode()}, "the file is GIF; save it as PNG"),
        ("variations", {"picture": bomb()}, r"too many pixels \(3600000000\): at most 16 million"),
        ("variations", {"picture": bomb(5000, 5000)}, r"too many pixels \(5000 x 5000\): at most 16 million"),
        ("variations", {"picture": bomb(3000, 100)}, r"too long and narrow \(3000 x 100\)"),
        ("variations", {"picture": moving()}, r"animated \(2 frames\): save one frame"),
        ("variations", {"picture": bytes(requests.MAX_UPLOAD + 1)}, "file of 8.1 MiB: at most 8 MiB"),
        ("variations", {"picture": png()[:60]}, "cut off or damaged"),
        ("variations", {"picture": {"path": "/etc/passwd"}}, "must be a PNG"),
        ("interpolate", {"first": png(), "second": moving()}, "the second picture is animated"),
        ("inpaint", {"picture": png(), "mask": moving()}, "the mask is animated"),
        ("inpaint", {"picture": png(), "mask": png()}, "the mask is empty"),
        ("inpaint", {"picture": png(), "mask": png("RGBA")}, "transparent all over.*OpenAI"),
    ],
)
def test_what_is_not_allowed_is_refused_with_the_reason(action, request_, why):
    with pytest.raises(requests.Refused, match=why):
        requests.check(action, request_)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "I;16"])
def test_pictures_of_odd_modes_are_read(mode):
    assert requests.check("variations", {"picture": png(mode)})["picture"].shape == (6, 8, 3)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda data: base64.encodebytes(data).decode(),
        lambda data: base64.encodebytes(data).decode().replace("\n", "\r\n"),
        lambda data: " " + base64.b64encode(data).decode() + "\n",
        lambda data: base64.urlsafe_b64encode(data).decode(),
        lambda data: base64.urlsafe_b64encode(data).decode().rstrip("="),
        lambda data: "data:image/png;base64," + base64.encodebytes(data).decode(),
    ],
    ids=["lines", "MIME", "spaces", "for URLs", "for URLs, unpadded", "data URL"],
)
def test_base64_as_programs_write_it_is_read(wrap):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    text = wrap(buffer.getvalue())
    np.testing.assert_array_equal(requests.check("variations", {"picture": text})["picture"], noise)


def test_a_mask_of_strokes_on_a_transparent_layer_is_what_they_cover():
    strokes, buffer = Image.new("RGBA", (8, 6), (0, 0, 0, 0)), io.BytesIO()
    strokes.paste("white", (4, 0, 8, 6))
    strokes.save(buffer, "PNG")
    request = {"picture": png(), "mask": base64.b64encode(buffer.getvalue()).decode(), "caption": "a"}
    mask = requests.check("inpaint", request)["mask"]
    assert mask.dtype == bool and mask[:, 4:].all() and not mask[:, :4].any()


def test_nonsense_is_refused_and_never_breaks():
    draw = random.Random(0)
    whole = base64.b64decode(png())
    values = [None, "", "a", "九", "\0", "../x", -1, 0, 1, 4, 1e30, float("nan"), [], {}, True, b"\0", [[]]]
    accepted = 0
    for _ in range(6000):
        action = draw.choice([*requests.ACTIONS, "x", None, 3])
        names = list(requests.ACTIONS.get(action, {"caption": 0})) if isinstance(action, str) else ["a"]
        request = {name: draw.choice(values) for name in names if draw.random() < 0.6}
        if draw.random() < 0.5:
            broken = bytearray(whole)
            for _ in range(draw.randrange(4)):
                broken[draw.randrange(len(broken))] = draw.randrange(256)
            for name in sorted({"picture", "mask", "first", "second"} & set(names)):
                request[name] = bytes(broken)
        try:
            made = requests.check(action, request)
        except requests.Refused as error:
            assert str(error)
            continue
        accepted += 1
        for name, value in made.items():
            field = requests.ACTIONS[action][name]
            if field.kind in ("int", "float"):
                assert field.low <= value <= field.high
            if field.kind == "text":
                assert 0 < len(value) <= requests.MAX_CAPTION
    assert accepted > 20


def test_the_queue_is_bounded_and_the_first_come_first():
    turns, order = work.Turns(most=2), []
    entered, release = threading.Event(), threading.Event()

    def first():
        with turns.turn():
            entered.set()
            assert release.wait(10)
            order.append("first")

    def second():
        with turns.turn(lambda before: waits.set()):
            order.append("second")

    waits = threading.Event()
    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()
    assert waits.wait(10)
    with pytest.raises(work.Full, match="2 requests wait"), turns.turn():
        pass
    release.set()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "second"]


def test_who_passes_the_turn_on_lets_the_other_finish_first():
    turns, order, waits = work.Turns(), [], threading.Event()

    def short():
        with turns.turn(lambda before: waits.set()):
            order.append("short")

    with turns.turn() as pass_on:
        thread = threading.Thread(target=short)
        thread.start()
        assert waits.wait(10)
        order.append("long begins")
        pass_on()
        order.append("long ends")
    thread.join(10)
    assert order == ["long begins", "short", "long ends"]


def test_the_page_says_that_it_compiles_and_keeps_a_seed_where_it_is_fixed(monkeypatch):
    monkeypatch.setattr(page, "PATIENCE", 0.01)
    seeds = []

    def draw(action, request, tell):
        seeds.append(request["seed"])
        time.sleep(0.1)
        raise requests.Refused("enough")

    studio = types.SimpleNamespace(models={"a": None}, compiling=lambda name: True, draw=draw)
    for fixed in (True, False):
        fields = {"caption": "a", "seed": 5, "fixed": fixed}
        shown = list(page.answer(studio, "create", fields, [], {}, *fields.values()))
        assert "compiling (once for these settings)" in shown[1]["status"] and "enough" in shown[-1]["status"]
        assert shown[0]["seed"] == seeds[-1] and (seeds[-1] == 5) == fixed


def test_work_that_is_stopped_ends_at_its_next_event():
    ended, running, fields = threading.Event(), [], {"caption": "a", "seed": 5}

    def draw(action, request, tell):
        try:
            for _ in range(1000):
                tell("waiting", 1)
                time.sleep(0.01)
        except work.Stopped:
            ended.set()
            raise

    studio = types.SimpleNamespace(models={"a": None}, draw=draw)
    shown = page.answer(studio, "create", fields, running, {}, *fields.values())
    assert "starting" in next(shown)["status"] and "1 before you" in next(shown)["status"]
    page.stop_all(running)
    assert "stopped" in list(shown)[-1]["status"] and not running
    assert ended.wait(10)


def test_the_seconds_left_are_those_of_the_same_request_before():
    studio, steps = work.Studio([]), ["decoder", "upsampler"]
    same = "a", "create", "{'n': 4}"
    assert studio._left(same, steps, "decoder", 0.5, 1.0) == (0.25, None)
    assert studio._left(same, steps, "decoder", 1, 2.0) == (0.5, None)
    assert studio._left(same, steps, "upsampler", 1, 6.0) == (1.0, 0.0)
    assert studio._left(same, steps, "decoder", 0.5, 0.5) == (0.25, 7.5)
    assert studio._left(("a", "create", "{'n': 8}"), steps, "decoder", 1, 4.0) == (0.5, None)
    assert studio._left(same, steps, "text", 1, 4.0) == (None, None)


def test_the_command_line_is_safe_to_paste():
    studio = work.Studio([])
    studio.folders["a"] = None
    line = studio.command(
        "a", "create", requests.check("create", {"caption": "a'; rm -rf $HOME", "n": 2, "seed": 3})
    )
    assert shlex.split(line)[-1] == "a'; rm -rf $HOME" and "--seed=3" in shlex.split(line)
    given = {"picture": np.zeros((2, 2, 3)), "caption": "--debug", "n": 1, "seed": 0, "num_steps": 5}
    words = shlex.split(studio.command("a", "image_to_image", given))
    assert words[-3:] == ["--", "picture.png", "--debug"] and "--steps=5" in words
