"""How often drawn scenes are right: n captions, n / 4 of each kind, drawn and read by the checker.

The kinds are single_seen, single_heldout (one object, whose colour and shape training showed together or
never), pair_seen and pair_heldout_relation (two objects, whose relation training showed or never).

A model that reads no captions draws n pictures, and the share of legal ones counts: one or two objects, all
of a named colour and shape, on a background with a name.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from dalle2_jax import pipeline
from dalle2_jax.data import scenes
from dalle2_jax.evaluate import picture_sets
from dalle2_jax.evaluate.metric import Inputs, ModelMetric, wilson
from dalle2_jax.generate.output import StageLines
from dalle2_jax.runtime import extras, metrics

GRID_PICTURES = 64
# Aspects of a verdict of the checker. `named` is colour, shape and relation at once; `correct` is every
# aspect of the caption, and nothing else in the picture.
JUDGED = ("colour", "shape", "relation", "count", "background", "correct")
ASPECTS = ("colour", "shape", "relation", "named", "count", "background", "correct")


def load_checker(name: str = "check"):
    """`evaluate.scenes.check`, or `is_legal`. Raises ValueError where scipy is not installed."""
    try:
        from dalle2_jax.evaluate import scenes as checker
    except ModuleNotFoundError as error:
        raise ValueError(f"the checker needs {error.name}: {extras.how_to_install('scipy')}") from error
    return getattr(checker, name)


def draw_captions(config: scenes.SceneConfig, n: int, seed: int) -> tuple[list[str], list[str]]:
    """(`n` captions, their kinds), split evenly over the kinds that `config` has."""
    captions, labels = [], []
    for kind, count in _split(config, n):
        captions += scenes.evaluation_captions(config, kind, count, seed)
        labels += [kind] * count
    return captions, labels


def draw_scenes(config: scenes.SceneConfig, n: int, copies: int, seed: int) -> list[scenes.Scene]:
    """`copies` scenes of each caption of `draw_captions`, side by side."""
    found = []
    for kind, count in _split(config, n):
        found += scenes.evaluation_scenes(config, kind, count, copies, seed)
    return found


def _split(config: scenes.SceneConfig, n: int) -> list[tuple[str, int]]:
    """[(kind, number of captions)] of the kinds that `config` has, `n` in all."""
    kinds = [kind for kind in scenes.KINDS if kind.startswith("single") or config.max_objects > 1]
    return [(kind, n // len(kinds) + (i < n % len(kinds))) for i, kind in enumerate(kinds)]


def verdict_aspects(verdict) -> dict[str, bool | None]:
    """aspect -> whether it is right, None for an aspect that the caption does not name."""
    judged = {aspect: getattr(verdict, aspect) for aspect in JUDGED}
    named = all(judged[aspect] is not False for aspect in ("colour", "shape", "relation"))
    return judged | {"named": named}


def score(verdicts: Sequence, kinds: Sequence[str]) -> dict:
    """kind -> {'n', each of ASPECTS, 'interval': {aspect -> [low, high]}}.

    Args:
      verdicts: of the checker, one a picture. kinds: of the captions, one a picture.

    Returns:
      Shares in 0 .. 1, None for an aspect that no caption of the kind names.
    """
    result = {}
    for kind in dict.fromkeys(kinds):
        chosen = [
            verdict_aspects(verdict) for verdict, label in zip(verdicts, kinds, strict=True) if label == kind
        ]
        entry: dict[str, Any] = {"n": len(chosen)}
        intervals = {}
        for aspect in ASPECTS:
            judged = [bool(value) for value in (verdict[aspect] for verdict in chosen) if value is not None]
            entry[aspect] = float(np.mean(judged)) if judged else None
            if judged:
                intervals[aspect] = [round(bound, 4) for bound in wilson(sum(judged), len(judged))]
        result[kind] = entry | {"interval": intervals}
    return result


def score_legal(legal: Sequence[bool]) -> dict:
    """{'uncaptioned': {'n', 'legal', 'interval'}} of pictures without captions."""
    interval = {"legal": [round(bound, 4) for bound in wilson(int(np.sum(legal)), len(legal))]}
    return {"uncaptioned": {"n": len(legal), "legal": float(np.mean(legal)), "interval": interval}}


def table(scores: dict) -> str:
    """The scores of `score` as lines of text, the interval of `named` last; or those of `score_legal`."""
    if (entry := scores.get("uncaptioned")) is not None:
        low, high = entry["interval"]["legal"]
        return f"legal scenes: {entry['legal']:.3f} of {entry['n']} ({low:.3f} .. {high:.3f})"
    lines = [f"{'':24}{'n':>6}" + "".join(f"{aspect:>11}" for aspect in ASPECTS) + "   95 % of named"]
    for kind, entry in scores.items():
        shares = "".join(f"{'-' if entry[a] is None else format(entry[a], '.3f'):>11}" for a in ASPECTS)
        low, high = entry["interval"]["named"]
        lines.append(f"{kind:24}{entry['n']:>6}{shares}   {low:.3f} .. {high:.3f}")
    return "\n".join(lines)


def measure(
    model: pipeline.Pipeline,
    out: epath.Path,
    *,
    config: scenes.SceneConfig,
    n: int,
    seed: int = 0,
    batch_size: int | None = None,
    settings: dict | None = None,
    progress=None,
) -> tuple[dict, picture_sets.PictureSet]:
    """Draw and check `n` captions; writes grids and scenes.jsonl into `out`: (`score`, the drawn pictures).

    settings: keywords of `UnCLIP.text_to_image`.
    """
    how = dict(seed=seed, batch_size=batch_size, progress=progress, **(settings or {}))
    if not model.reads_captions:
        return _measure_uncaptioned(model, out, n, how)
    check = load_checker()
    captions, kinds = draw_captions(config, n, seed)
    result = model.text_to_image(captions, **how)
    verdicts = [check(image, caption) for image, caption in zip(result.images, captions, strict=True)]
    pictures = []
    for kind in dict.fromkeys(kinds):
        rows = [i for i, label in enumerate(kinds) if label == kind]
        labels = [f"{_mark(verdicts[i])}: {captions[i]}" for i in rows]
        shown = rows[:GRID_PICTURES]
        grid = metrics.labelled_grid(result.images[shown], labels[: len(shown)])
        metrics.save_png(epath.Path(out) / f"scenes_{kind}.png", grid, {"captions": json.dumps(labels)})
        pictures += [{"kind": kind, "caption": captions[i], "verdict": _mark(verdicts[i])} for i in rows]
    lines = "".join(json.dumps(picture, ensure_ascii=False) + "\n" for picture in pictures)
    (epath.Path(out) / "scenes.jsonl").write_text(lines)
    return score(verdicts, kinds), picture_sets.of_images("drawn", result.images, captions)


def _measure_uncaptioned(
    model: pipeline.Pipeline, out: epath.Path, n: int, how: dict
) -> tuple[dict, picture_sets.PictureSet]:
    """`measure` of a model that reads no captions; writes scenes_uncaptioned.png."""
    legal = load_checker("is_legal")
    images = model.text_to_image(n=n, **how).images
    right = [legal(image) for image in images]
    labels = ["legal" if one else "not legal" for one in right[:GRID_PICTURES]]
    grid = metrics.labelled_grid(images[:GRID_PICTURES], labels)
    metrics.save_png(epath.Path(out) / "scenes_uncaptioned.png", grid)
    return score_legal(right), picture_sets.of_images("drawn", images)


def _mark(verdict) -> str:
    wrong = [name for name, right in verdict_aspects(verdict).items() if right is False]
    wrong = [name for name in wrong if name not in ("named", "correct")]
    return "right" if verdict.correct else f"WRONG {', '.join(wrong)}".rstrip()


def _measure(inputs: Inputs) -> tuple[dict, str]:
    request = inputs.request
    scores, inputs.drawn = measure(
        inputs.model,
        inputs.out,
        config=inputs.scenes[0],
        n=request.n,
        seed=request.seed,
        batch_size=request.batch_size,
        settings=request.settings,
        progress=StageLines(),
    )
    return scores, table(scores)


def _compared(inputs: Inputs) -> tuple[list[str], picture_sets.PictureSet]:
    """(the captions that `measure` draws, a rendered scene of each)."""
    (config, side), request = inputs.scenes, inputs.request
    captions, _ = draw_captions(config, request.n, request.seed)
    scenes_ = draw_scenes(config, request.n, 1, request.seed)
    return captions, picture_sets.rendered("scenes of the captions", scenes_, side)


METRICS = {"scenes": ModelMetric(_measure, draws=True, compare_with=_compared)}
