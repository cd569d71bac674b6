"""What the model card and docs say of the bundled model, compared with its files."""

import json
import re
from pathlib import Path

import pytest

from tests import bundled_card

ROOT = Path(__file__).resolve().parents[1]
MODEL = bundled_card.MODEL
INDEX = json.loads((MODEL / "model_index.json").read_text("utf-8"))
CONFIGS = {
    name: json.loads((MODEL / name / "config.json").read_text("utf-8")) for name in INDEX["trained_steps"]
}


def section(page: str) -> str:
    text = (ROOT / "docs" / page).read_text("utf-8").partition("## The bundled model\n")[2]
    return " ".join(text.partition("\n## ")[0].split())


def megabytes() -> str:
    return f"{sum(path.stat().st_size for path in MODEL.glob('*/model.safetensors')) / 1e6:.1f} MB"


def test_the_card_is_what_convert_writes():
    assert bundled_card.CARD.read_text("utf-8") == bundled_card.text(), "python -m tests.bundled_card"
    assert INDEX["licence"] == "Apache-2.0"


@pytest.mark.parametrize("page", ["models.md", "quickstart.md"])
def test_pages_have_its_size(page):
    assert f"{megabytes()} in bfloat16" in section(page)
    sizes = re.findall(r"[\d.]+ MB", section(page))
    assert set(sizes) == {megabytes()}


def test_models_has_its_stages():
    """Steps, guidance and candidates: tests/test_docs.py."""
    clip, prior, decoder = (CONFIGS[name]["model"] for name in ("clip", "prior", "decoder"))
    text = section("models.md")
    said = ["{vocab_size} tokens, {context_length} a caption".format(**clip["text"])]
    said += ["{image_size} x {image_size}, ResNet tower, embeddings of {embed_dim} entries".format(**clip)]
    said += [
        f"{prior['text']['depth']} layers",
        f"{decoder['image_size']} x {decoder['image_size']}, predicts v",
    ]
    assert not [words for words in said if words not in text]
    assert clip["vision"]["kind"] == "resnet" and decoder["objective"] == "v"
    assert prior.get("guidance_scale", 1.0) == 1.0 and "no guidance" in text
    assert CONFIGS["clip"]["data"]["language"] == "en" and "English captions" in text


def logged_minutes(stage: str) -> float:
    """Of the steps alone: without starting, evaluation and samples."""
    lines = (MODEL / stage / "train_log.jsonl").read_text("utf-8").splitlines()
    steps, seconds = 0, 0.0
    for line in map(json.loads, lines):
        seconds += (line["step"] - steps) / line["speed/steps_per_s"]
        steps = line["step"]
    return seconds / 60


def test_quickstart_has_its_training():
    text, rows = section("quickstart.md"), []
    for name, config in CONFIGS.items():
        model = config["model"]
        title = {"clip": "CLIP", "prior": "prior", "decoder": "decoder {image_size} x {image_size}"}
        title = title.get(name, "upsampler {low_res_size} -> {image_size}").format(**model)
        rows += [f"| {title} | {INDEX['trained_steps'][name]} x {config['batch_size']} |"]
    assert not [row for row in rows if row not in text]
    for row, name in zip(rows, CONFIGS, strict=True):
        minutes = float(re.match(r" (\d+) \|", text.partition(row)[2])[1])
        assert abs(minutes - logged_minutes(name)) < 1.5, name
    guidance = re.search(r"With guidance \S+ instead of (\S+) ", text)[1]
    assert float(guidance) == CONFIGS["decoder"]["model"]["guidance_scale"]


def test_index_has_the_steps_that_the_logs_end_with():
    for name, steps in INDEX["trained_steps"].items():
        last = (MODEL / name / "train_log.jsonl").read_text("utf-8").splitlines()[-1]
        assert json.loads(last)["step"] == CONFIGS[name]["num_steps"] == steps
