"""Drawings of a suite, judged: is the prompt among the first five of 100, by CLIP; is the class right?

A line of the suite (`prompts`) may have

    kind      every kind has its own numbers
    others    texts, which the prompt is ranked among; else OTHERS other captions of the set, at random
    class     the class that the classifier should find; else the only one that the prompt names

Numbers are those of `metric.share_by_caption`: several drawings of a caption are one sample of captions. A
reference, such as the suite's real pictures, is judged in the same way, and its numbers stand beside.
"""

import collections

import numpy as np

from dalle2_jax.data.pipeline import label_of
from dalle2_jax.evaluate.metric import Features, PictureMetric, share_by_caption
from dalle2_jax.evaluate.networks import Networks
from dalle2_jax.evaluate.picture_sets import PictureSet

OTHERS = 99
TOPS = (1, 5)


def choices(pictures: PictureSet, seed: int) -> dict[str, list[str]]:
    """Caption -> the different texts that it is compared with. Raises ValueError where there are none."""
    captions = pictures.captions()
    distinct, draw = sorted(set(captions)), np.random.default_rng(seed)
    found: dict[str, list[str]] = {}
    for caption, line in zip(captions, pictures.fields or ({},) * len(captions), strict=True):
        if caption in found:
            continue
        others = line.get("others")
        if others is None:
            pool = [text for text in distinct if text != caption]
            others = [pool[i] for i in draw.permutation(len(pool))[:OTHERS]]
        if not isinstance(others, list) or not all(isinstance(text, str) for text in others):
            raise ValueError(f"{pictures.name}: others of {caption!r} must be a list of texts")
        found[caption] = list(dict.fromkeys(text for text in others if text != caption))
        if not found[caption]:
            raise ValueError(f"{pictures.name}: {caption!r} needs other captions to be ranked among")
    return found


def ranks(image_embed: np.ndarray, pictures: PictureSet, networks: Networks, seed: int) -> np.ndarray:
    """int [N]: of each picture, how many other texts are as near as its caption, or nearer."""
    captions, of_caption = pictures.captions(), choices(pictures, seed)
    texts = sorted({*of_caption, *(text for others in of_caption.values() for text in others)})
    (embeds, _), _ = networks.clip.encode_text(texts, networks.batch_size)
    units = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
    row_of = {text: row for row, text in enumerate(texts)}
    found = np.zeros(len(captions), int)
    for i, caption in enumerate(captions):
        own = units[row_of[caption]] @ image_embed[i]
        found[i] = (units[[row_of[text] for text in of_caption[caption]]] @ image_embed[i] >= own).sum()
    return found


def by_kind(name: str, right, pictures: PictureSet, *, use=None, **more) -> dict[str, dict]:
    """NAME/KIND -> the entry of a kind's right pictures, bool [N]; NAME where lines have no kind.

    use: bool [N], the pictures that count; None: all.
    """
    captions, rows = pictures.captions(), collections.defaultdict(list)
    for i, line in enumerate(pictures.fields or ({},) * len(captions)):
        if use is None or use[i]:
            rows[f"{name}/{line['kind']}" if line.get("kind") else name].append(i)
    return {
        key: share_by_caption(right[part], [captions[i] for i in part], images=pictures.name, **more)
        for key, part in rows.items()
    }


def _beside(x: Features, entries) -> dict[str, dict]:
    """The entries of the pictures; each is followed by that of the reference, if it has one, and their
    ratio. entries: (features [N, D], PictureSet) -> entries by name."""
    found = entries(x.images, x.pictures)
    if x.reference is None or x.reference_pictures is None:
        return found
    real, both = entries(x.reference, x.reference_pictures), {}
    for key, entry in found.items():
        both[key] = entry
        if beside := real.get(key):
            ratio = entry["value"] / beside["value"] if beside["value"] else None
            both |= {key: entry | {"of_reference": ratio}, f"{key} of the reference": beside}
    return both


def _top(name: str, x: Features) -> dict[str, dict]:
    def entries(embeds: np.ndarray, pictures: PictureSet) -> dict[str, dict]:
        found = ranks(embeds, pictures, x.networks, x.seed)
        shares = [by_kind(f"{name}{top}", found < top, pictures, others=OTHERS) for top in TOPS]
        return {key: entry for share in shares for key, entry in share.items()}

    return _beside(x, entries)


def _class_accuracy(name: str, x: Features) -> dict[str, dict]:
    names = tuple(x.networks.classifier.engine.configs["classifier"]["data"]["classes"])

    def entries(log_p: np.ndarray, pictures: PictureSet) -> dict[str, dict]:
        lines = pictures.fields or ({},) * len(log_p)
        wanted = np.array(
            [
                names.index(line["class"]) if line.get("class") in names else label_of(caption, names)
                for line, caption in zip(lines, pictures.captions(), strict=True)
            ]
        )
        if (wanted < 0).all():
            raise ValueError(f"{pictures.name}: no caption names exactly one class of {', '.join(names)}")
        more = dict(use=wanted >= 0, without_class=int((wanted < 0).sum()))
        return by_kind(name, log_p.argmax(axis=1) == wanted, pictures, **more)

    return _beside(x, entries)


METRICS = {
    "clip_top": PictureMetric(
        "its caption among the first of 100, by CLIP", _top, reference=False, captions=True, beside=True
    ),
    "class_accuracy": PictureMetric(
        "its class found by a classifier", _class_accuracy, "classes", False, captions=True, beside=True
    ),
}
