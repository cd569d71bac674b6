"""python -m dalle2_jax.evaluate [--model=DIR] [--metrics=scenes,retrieval,zero_shot --n=128 --out=DIR]

Measures a model directory; writes report.json, its table report.txt, and labelled grids of what was judged.

  scenes     draws n captions, n/4 of each kind (single_seen, single_heldout: one object whose colour and
             shape training showed together or never; pair_seen, pair_heldout_relation: two objects whose
             relation it showed or never), and lets the checker read the pictures
  retrieval  CLIP looks for the caption of each of 100 scenes of the validation and test splits
  zero_shot  CLIP says which colour and shape the object in each of 200 unseen scenes has, out of all pairs
             (both take --images=SRC with captions instead, zero_shot with --classes=FILE, a name a line)
  edits      unless asked for, not: 64 unseen scenes are changed by text, varied and repainted, and checked
  loss       unless asked for, not: of each stage at fixed times with fixed noise, on n unseen scenes or
             --images=SRC with captions

Measures pictures, wherever they come from, against a reference (docs/evaluation.md):

  --images=SRC --reference=SRC [--inception=FILE] [--metrics=fid,kid,precision_recall] [--preset=openai]

A SRC is a folder of pictures, tar shards or an npz. What of it is left out is said, by reason. Without
--images the model draws the captions of the reference, n of them; without --reference these are unseen
scenes. A model that reads no captions draws n pictures of its classes in turn. Without --inception the
features are those of the model's own CLIP (clip_frechet, clip_mmd, ...).

Draws a suite of prompts for a tool that judges it, --pictures of each, in GenEval's layout, and no more:

  --prompts=evaluation_metadata.jsonl (GenEval's; DrawBench's csv, PartiPrompts's tsv, a JSON list of texts,
    or a caption a line)

With --compare, once for each way of drawing, it draws n captions in every one of these ways, and writes
comparison.json, comparison.md and comparison.png instead. The captions are those of `scenes`, which the
checker judges, or of --reference=SRC; pictures are compared with scenes of the same captions or with that
reference, by --inception or the model's own CLIP:

  --compare="guidance_scale=1" --compare="fine: guidance_scale=3 decoder_steps=50" --compare="model=OTHER"
"""

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Sequence

import numpy as np
from absl import flags
from etils import epath

from dalle2_jax import pipeline
from dalle2_jax.convert import inception_weights
from dalle2_jax.data import scenes
from dalle2_jax.evaluate import (
    aesthetic,
    captions_for,
    comparison,
    edits,
    fidelity,
    losses,
    page,
    picture_sets,
    presets,
    prompts,
    retrieval,
    scene_scores,
    zero_shot,
)
from dalle2_jax.generate.flags import sampling_settings
from dalle2_jax.generate.output import StageLines
from dalle2_jax.runtime import metrics, partition, processes

DEFAULT_METRICS = ("scenes", "retrieval", "zero_shot")
METRICS = (*DEFAULT_METRICS, "edits", "loss")
OF_CLIP = ("retrieval", "zero_shot", "edits")  # of METRICS, those that read the model's CLIP
GRID_PICTURES = 64


def scenes_of(model: pipeline.UnCLIP, name: str | None = None) -> tuple[scenes.SceneConfig, int]:
    """(grammar of scenes, side of the pictures) that a model was trained on, or the grammar called `name`.

    Raises ValueError for a model that was not trained on scenes, unless a name is given.
    """
    configs = model.engine.configs
    stored_data = (configs.get("clip") or configs.get("decoder") or {}).get("data") or {}
    data = {"path": "", "source": ""} | stored_data  # weights of others do not say
    stored, _, side = data["path"].partition("_")
    if name is None and (data["source"] != "scenes" or stored not in scenes.PRESETS):
        raise ValueError(
            f"model {model.name!r} was trained on {data['path']!r} of source {data['source']!r}: say which "
            f"scenes to draw with --scenes={'|'.join(scenes.PRESETS)}, or give --reference=SRC"
        )
    return scenes.preset(name or stored), int(side) if side.isdigit() else model.image_size


def _checker():
    try:
        from dalle2_jax.evaluate.scenes import check
    except ModuleNotFoundError as error:
        raise ValueError(f"the checker needs {error.name}: pip install 'dalle2_jax[eval]'") from error
    return check


def evaluate_scenes(
    model: pipeline.UnCLIP,
    out: str | os.PathLike,
    *,
    config: scenes.SceneConfig,
    n: int,
    seed: int = 0,
    batch_size: int | None = None,
    settings: dict | None = None,
    progress=None,
) -> tuple[dict, picture_sets.PictureSet]:
    """Draw `n` captions, check them, write them as grids: (scores of `scene_scores.score`, the pictures).

    Args:
      settings: keywords of `UnCLIP.text_to_image` that say how to draw.
    """
    check = _checker()
    captions, kinds = scene_scores.draw_captions(config, n, seed)
    result = model.text_to_image(
        captions, seed=seed, batch_size=batch_size, progress=progress, **(settings or {})
    )
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
    return scene_scores.score(verdicts, kinds), picture_sets.of_images("drawn", result.images, captions)


def _mark(verdict) -> str:
    wrong = [name for name, right in scene_scores.verdict_aspects(verdict).items() if right is False]
    wrong = [name for name in wrong if name not in ("named", "correct")]
    return "right" if verdict.correct else f"WRONG {', '.join(wrong)}".rstrip()


def evaluate_retrieval(
    model: pipeline.UnCLIP,
    *,
    config: scenes.SceneConfig | None = None,
    image_size: int | None = None,
    pictures: picture_sets.PictureSet | None = None,
    n: int = 100,
    seed: int = 0,
    batch_size: int | None = None,
) -> dict:
    """The numbers of `retrieval.retrieval` for `n` unseen scenes of `config`, rendered at `image_size`.

    Or for `n` of `pictures`, drawn at random, no two of which have the same caption.
    """
    if pictures is not None:
        texts = pictures.captions()
        images, rows = picture_sets.chosen(
            pictures, list({t: i for i, t in enumerate(texts)}.values()), n, seed
        )
        captions = [texts[row] for row in rows]
    else:
        found, captions = retrieval.unseen_scenes(config, n, seed)
        images = [scenes.render(scene, image_size) for scene in found]
    (text_embed, _), _ = model.encode_text(captions, batch_size)
    return retrieval.retrieval(model.encode_image(images, batch_size), text_embed)


def evaluate_zero_shot(
    model: pipeline.UnCLIP,
    *,
    config: scenes.SceneConfig | None = None,
    image_size: int | None = None,
    pictures: picture_sets.PictureSet | None = None,
    names: Sequence[str] = (),
    templates: Sequence[str] = zero_shot.TEMPLATES,
    n: int = 200,
    seed: int = 0,
    batch_size: int | None = None,
) -> dict:
    """The numbers of `zero_shot.accuracy` for `n` unseen scenes of one object, rendered at `image_size`.

    Or for `n` of `pictures`, drawn at random from those whose caption names exactly one of `names`.
    """
    if pictures is not None:
        labels = zero_shot.labels(pictures.captions(), names)
        images, rows = picture_sets.chosen(pictures, np.flatnonzero(labels >= 0), n, seed)
        labels = labels[rows]
    else:
        found, names, labels = zero_shot.single_objects(config, n, seed)
        images = [scenes.render(scene, image_size) for scene in found]
    classes = zero_shot.class_embeddings(
        lambda texts: model.encode_text(texts, batch_size)[0][0], names, templates
    )
    return zero_shot.accuracy(model.encode_image(images, batch_size), classes, labels)


def evaluate_edits(
    model: pipeline.UnCLIP,
    out: str | os.PathLike,
    *,
    config: scenes.SceneConfig,
    n: int = 64,
    seed: int = 0,
    progress=None,
) -> dict:
    """The shares of `edits.measure`; writes the pictures as grids."""
    found, shown = edits.measure(model, config, _checker(), n=n, seed=seed, progress=progress)
    for way, (images, labels) in shown.items():
        columns = 3 if way == "variations" else 2
        grid = metrics.labelled_grid(np.stack(images[:96]), labels[:96], columns * 4)
        metrics.save_png(epath.Path(out) / f"edits_{way}.png", grid, {"labels": json.dumps(labels)})
    return found


def compare(
    ways: Sequence[str],
    out: str | os.PathLike,
    *,
    model_dir: str | None,
    name: str | None = None,
    n: int,
    pictures: int,
    seed: int = 0,
    reference: str | None = None,
    inception_file: str | None = None,
    preset: str = "ttur",
    batch_size: int | None = None,
    dtype: str | None = None,
    low_memory: bool = False,
    progress=None,
) -> list[comparison.Row]:
    """Draw `n` captions, `pictures` each, in every one of `ways`, and write what `comparison` says of them.

    Args:
      ways: texts like 'guidance_scale=2 prior_steps=64' or 'model=DIR', of settings that differ, '' for none;
        a name and a colon may stand before.
      name: of the grammar of the captions; None: the one of the model `model_dir`.
      reference: captioned pictures in the place of scenes; nobody then says what is right.
      inception_file, preset: measure against the reference with Inception, as `measure_pictures`.

    Raises ValueError for an unknown setting, before anything is drawn.
    """
    asked = []
    for way in ways:
        label, _, said = way.rpartition(":")
        parts = [part.partition("=") for part in said.split()]
        if any(not equals for _, equals, _ in parts):
            raise ValueError(f"--compare={way!r} must be settings like 'guidance_scale=2 prior_steps=64'")
        changes = {setting: value for setting, _, value in parts}
        directory = changes.pop("model", model_dir)
        asked.append((label.strip() or way or "as it is", directory, sampling_settings(changes)))
    weights = inception_weights.load(inception_file) if inception_file else None
    models = {
        directory: pipeline.UnCLIP.load(directory, dtype=dtype, low_memory=low_memory)
        for directory in dict.fromkeys([model_dir, *(directory for _, directory, _ in asked)])
    }
    for model in models.values():
        if not captions_for.has_clip(model):
            raise ValueError(
                f"--compare needs a CLIP for diversity and cosine, and model {model.name!r} has none"
            )
    used = [models[directory].settings(**settings) for _, directory, settings in asked]
    if reference is None:
        check = _checker()
        config, side = scenes_of(models[model_dir], name)
        captions, _ = scene_scores.draw_captions(config, n, seed)
        drawn = scene_scores.draw_scenes(config, n, pictures, seed)
        target = picture_sets.rendered("scenes of the captions", drawn, side)
    else:
        check, target = None, picture_sets.open_pictures(reference, PassLines("pictures checked"))
        print(f"reference: {target.said()}", flush=True)
        captions = captions_for.some_captions(target, n, seed)
    fidelity_of = comparison.against(
        target,
        len(captions) * pictures,
        models[model_dir],
        weights=weights,
        preset=preset,
        batch_size=batch_size,
        seed=seed,
    )
    rows, report = [], []
    for (way, directory, settings), stages in zip(asked, used, strict=True):
        print(f"{way}:", flush=True)
        row, result = comparison.measure(
            way,
            models[directory],
            captions,
            check,
            n=pictures,
            seed=seed,
            settings=settings,
            batch_size=batch_size,
            progress=progress,
            fidelity_of=fidelity_of,
        )
        rows.append(row)
        report.append(dataclasses.asdict(row) | {"model": models[directory].name, "settings": stages})
        shown = slice(0, GRID_PICTURES // pictures * pictures)
        grid = metrics.labelled_grid(result.images[shown], result.captions[shown], pictures)
        metrics.save_png(epath.Path(out) / f"comparison_{len(rows)}.png", grid, {"way": way})
        # After every way, so that nothing is lost if this is stopped.
        whole = {"seed": seed, "captions": len(captions), "reference": target.summary(), "rows": report}
        text = json.dumps(whole, indent=2) + "\n"
        (epath.Path(out) / "comparison.json").write_text(text)
        (epath.Path(out) / "comparison.md").write_text(comparison.table(rows) + "\n")
        comparison.plot(rows, epath.Path(out) / "comparison.png")
    return rows


def measure_pictures(
    model: pipeline.UnCLIP,
    out: str | os.PathLike,
    *,
    images: str | picture_sets.PictureSet | None,
    reference: str | picture_sets.PictureSet | fidelity.Stats | None,
    names: Sequence[str] | None,
    inception_file: str | None,
    preset: str,
    scenes_name: str | None = None,
    n: int = 128,
    seed: int = 0,
    settings: dict | None = None,
    batch_size: int | None = None,
    folder: str | os.PathLike | None = None,
    npz_out: str | None = None,
    stats_out: str | None = None,
    aesthetic_file: str | None = None,
    progress=None,
) -> dict[str, dict]:
    """The entries of `fidelity.measure` for `images`, or pictures drawn by the model, against `reference`.

    Args:
      names: of metrics; None for those that need no captions and what is at hand permits.
      folder: for pictures that are drawn, which all processes see; OUT/pictures if not given.
      n: captions to draw where there are no `images`, see `captions_for.what_to_draw`.
      npz_out: also write the images, squared by the preset, as an npz.
    """
    scenes.check_choice(preset, tuple(presets.PRESETS), "preset")
    weights = inception_weights.load(inception_file) if inception_file else None
    head = None
    if aesthetic_file:
        head = aesthetic.load(aesthetic_file, model.engine.stage("clip").embed_dim)
    given = dict(preset=preset, with_inception=weights is not None, with_head=head is not None)
    given["with_clip"] = captions_for.has_clip(model)
    if stats_out and weights is None:
        raise ValueError("--stats_out is of Inception's features: give --inception=FILE")
    if names is None:
        names = fidelity.WITH_CLIP if weights is None else fidelity.WITH_INCEPTION
    target = fidelity.open_reference(reference) if isinstance(reference, str) else reference
    if target is None and images is None:
        if captions_for.reads_text(model) or any(fidelity.METRICS[name].reference for name in names):
            target = picture_sets.scene_pictures(*scenes_of(model, scenes_name), n, seed)
    if images is not None:
        pictures = picture_sets.open_pictures(images) if isinstance(images, str) else images
        fidelity.check(names, pictures, target, **given)
    else:
        texts, numbers = captions_for.what_to_draw(model, target, n, seed)
        planned = picture_sets.PictureSet("pictures", "folder", len(texts), lambda: iter(()), tuple(texts))
        fidelity.check(names, planned, target, **given)
        pictures = picture_sets.drawn_pictures(
            model,
            texts,
            folder or epath.Path(out) / "pictures",
            numbers=numbers,
            seed=seed,
            settings=settings,
            batch_size=batch_size,
            progress=progress,
        )
    for shown, name in ((pictures, "images"), (fidelity.pictures_of(target), "reference")):
        if shown is not None:
            grid = metrics.labelled_grid(*picture_sets.samples(shown, GRID_PICTURES))
            metrics.save_png(epath.Path(out) / f"samples_{name}.png", grid, {"set": shown.name})
    if npz_out:
        picture_sets.write_npz(picture_sets.mapped(pictures, presets.PRESETS[preset].square), npz_out)
    return fidelity.measure(
        pictures,
        target,
        names,
        weights=weights,
        model=model,
        preset=preset,
        batch_size=batch_size,
        seed=seed,
        progress=PassLines(),
        stats_out=stats_out,
        aesthetic_head=head,
    )


class PassLines:
    """Prints how far a pass over pictures is, every few seconds."""

    def __init__(self, what: str = "pictures read", clock=time.monotonic, every: float = 10.0):
        self._what, self._clock, self._every, self._last = what, clock, every, clock()

    def __call__(self, name: str, done: int, count: int) -> None:
        """Print progress, at most once in `every` seconds and at the end."""
        if self._clock() - self._last >= self._every:
            self._last = self._clock()
            print(f"{name}: {done}/{count} {self._what}", flush=True)


FLAGS = flags.FLAGS


def run_comparison(out: epath.Path) -> None:
    """--compare: the ways of drawing, their table and page."""
    if FLAGS.pictures < 2:
        raise ValueError("--compare measures how pictures of a caption differ: give --pictures=2 or more")
    out.mkdir(parents=True, exist_ok=True)
    rows = compare(
        FLAGS.compare,
        out,
        model_dir=FLAGS.model,
        name=FLAGS.scenes,
        n=FLAGS.n,
        pictures=FLAGS.pictures,
        seed=FLAGS.seed,
        reference=FLAGS.reference,
        inception_file=FLAGS.inception,
        preset=FLAGS.preset,
        batch_size=FLAGS.batch_size,
        dtype=FLAGS.dtype,
        low_memory=FLAGS.low_memory,
        progress=StageLines(),
    )
    print(comparison.table(rows))
    print(f"wrote {out / 'comparison.json'}, comparison.md and comparison.png")
    if FLAGS.report and processes.is_first():
        report = {"rows": [dataclasses.asdict(row) for row in rows]}
        found = sorted(out.glob("comparison*.png"))
        shown = comparison.columns(rows)
        numbers = page.table(list(shown), list(zip(*shown.values(), strict=True)))
        page.write(FLAGS.report, "Ways of drawing", numbers, comparison.table(rows), found, report)


def run_prompts() -> None:
    """--prompts: a suite drawn for a tool that judges it."""
    suite = prompts.read_prompts(FLAGS.prompts)
    model = pipeline.UnCLIP.load(FLAGS.model, dtype=FLAGS.dtype, low_memory=FLAGS.low_memory)
    common = dict(seed=FLAGS.seed, settings=sampling_settings(), batch_size=FLAGS.batch_size)
    prompts.draw(model, suite, FLAGS.out, n=FLAGS.pictures, progress=StageLines(), **common)
    print(f"{len(suite)} prompts, {FLAGS.pictures} pictures each: {FLAGS.out}")


def metrics_asked(model: pipeline.UnCLIP) -> tuple[list[str], list[str]]:
    """(those of METRICS, those of pictures) that --metrics names, or what is at hand permits.

    Raises ValueError for what the model, or what was given, does not permit; nothing is read for that.
    """
    given = FLAGS.images or FLAGS.reference or FLAGS.inception
    asked = FLAGS.metrics or ([] if given else list(DEFAULT_METRICS))
    for name in asked:
        scenes.check_choice(name, (*METRICS, *fidelity.METRICS), "metric")
    of_clip = [name for name in asked if name in OF_CLIP]
    if of_clip and not captions_for.has_clip(model) and FLAGS.metrics:
        needs = f"{', '.join(of_clip)} need{'s' * (len(of_clip) == 1)} a CLIP"
        there = ", ".join(model.engine.stages)
        raise ValueError(f"{needs}, and model {model.name!r} has none: it has {there}")
    if of_clip and not captions_for.has_clip(model):
        print(f"note: model {model.name!r} has no CLIP, so {', '.join(of_clip)} are left out", flush=True)
        asked = [name for name in asked if name not in of_clip]
    of_model = [name for name in asked if name in METRICS]
    drawing = [name for name in of_model if name in ("scenes", "edits")]
    if FLAGS.images and drawing:
        raise ValueError(f"{drawing[0]} measures a model: leave --images out")
    if FLAGS.images and "zero_shot" in of_model and not FLAGS.classes:
        raise ValueError("zero_shot of pictures needs --classes=FILE, the name of a class on each line")
    of_pictures = [name for name in asked if name in fidelity.METRICS]
    if FLAGS.inception and not os.path.isfile(FLAGS.inception):
        raise FileNotFoundError(f"there is no file {FLAGS.inception}")
    if of_pictures or not of_model:  # before pictures are decoded, all that does not depend on how many
        names = of_pictures or (fidelity.WITH_INCEPTION if FLAGS.inception else fidelity.WITH_CLIP)
        many = picture_sets.PictureSet("images", "planned", 1 << 40, lambda: iter(()), ("a caption",))
        compared = many if FLAGS.reference or not FLAGS.images else None
        fidelity.check(names, many, compared, **_given(model))
    return of_model, of_pictures


def _given(model: pipeline.UnCLIP) -> dict:
    """What the flags and the model give for `fidelity.check`."""
    given = dict(with_inception=bool(FLAGS.inception), with_head=bool(FLAGS.aesthetic))
    return given | dict(preset=FLAGS.preset, with_clip=captions_for.has_clip(model))


def _opened(name: str, path: str | None, opener) -> tuple:
    """(what `opener` finds at `path`, {name: its summary}, [a line that says it]); nothing for no path."""
    if not path:
        return None, {}, []
    found = opener(path, PassLines("pictures checked"))
    line = f"{name}: {found.said()}"
    print(line, flush=True)
    return found, {name: found.summary()}, [line]


def run_metrics(out: epath.Path) -> None:
    """--metrics: what was asked for, in report.json and report.txt."""
    began, settings = time.monotonic(), sampling_settings()
    model = pipeline.UnCLIP.load(FLAGS.model, dtype=FLAGS.dtype, low_memory=FLAGS.low_memory)
    of_model, of_pictures = metrics_asked(model)
    report = {"model": model.name}
    if not FLAGS.images and (not of_model or of_pictures or {"scenes", "edits"} & set(of_model)):
        report["settings"] = model.settings(**settings)
    images, summary, lines = _opened("images", FLAGS.images, picture_sets.open_pictures)
    reference, more, said = _opened("reference", FLAGS.reference, fidelity.open_reference)
    summary, lines = summary | more, lines + said
    if summary:
        report["pictures"] = summary
    config = image_size = None
    if of_model and images is None:
        config, image_size = scenes_of(model, FLAGS.scenes)
        report["scenes_config"] = config.name
    out.mkdir(parents=True, exist_ok=True)
    common = dict(seed=FLAGS.seed, batch_size=FLAGS.batch_size)
    measured, captioned = {}, images
    if "scenes" in of_model:
        shared = of_pictures and images is None and reference is None  # the pictures of scenes serve for both
        if shared:
            reference = _scenes_to_compare(of_pictures, config, image_size, _given(model))
        measured["scenes"], drawn = evaluate_scenes(
            model, out, config=config, n=FLAGS.n, settings=settings, progress=StageLines(), **common
        )
        lines.append(scene_scores.table(measured["scenes"]))
        images = drawn if shared else images
    if of_pictures or not of_model:
        found = measure_pictures(
            model,
            out,
            images=images,
            reference=reference,
            names=of_pictures or None,
            inception_file=FLAGS.inception,
            preset=FLAGS.preset,
            scenes_name=FLAGS.scenes,
            n=FLAGS.n,
            settings=settings,
            folder=epath.Path(FLAGS.out) / "pictures",
            npz_out=FLAGS.npz_out if processes.is_first() else None,
            stats_out=FLAGS.stats_out,
            aesthetic_file=FLAGS.aesthetic,
            progress=StageLines(),
            **common,
        )
        measured |= found
        lines.append(fidelity.table(found))
    _measure_model(model, out, of_model, captioned, config, image_size, measured, lines)
    report |= {"seed": FLAGS.seed, "seconds": round(time.monotonic() - began, 1)}
    (out / "report.json").write_text(json.dumps(measured | report, indent=2, ensure_ascii=False) + "\n")
    (out / "report.txt").write_text("\n".join(lines) + "\n")
    if FLAGS.report and processes.is_first():
        found = [path for kind in ("samples", *of_model) for path in sorted(out.glob(f"{kind}_*.png"))]
        numbers = {name: entry for name, entry in measured.items() if name not in METRICS}
        numbers = page.entries(numbers) if numbers else ""
        page.write(FLAGS.report, model.name, numbers, "\n".join(lines), found, measured | report)
    print("\n".join(lines))
    print(f"wrote {out / 'report.json'}, the table in report.txt")


def _measure_model(model, out, names, captioned, config, image_size, measured: dict, lines: list) -> None:
    """Puts retrieval, zero_shot, loss and edits, as far as `names` has them, into `measured` and `lines`.

    Of the pictures `captioned`, or of scenes of `config` rendered at `image_size`.
    """
    common = dict(seed=FLAGS.seed, batch_size=FLAGS.batch_size)
    of_clip = dict(pictures=captioned, n=FLAGS.n) if captioned else dict(config=config, image_size=image_size)
    if "retrieval" in names:
        found = measured["retrieval"] = evaluate_retrieval(model, **of_clip, **common)
        lines.append(
            f"retrieval among {found['n']}: image to text {found['image_to_text']:.3f}, "
            f"text to image {found['text_to_image']:.3f}"
        )
    if "zero_shot" in names:
        if FLAGS.templates:
            of_clip["templates"] = zero_shot.read_templates(FLAGS.templates)
        if captioned:
            of_clip["names"] = zero_shot.read_names(FLAGS.classes)
        found = measured["zero_shot"] = evaluate_zero_shot(model, **of_clip, **common)
        tops = ", ".join(f"top {k[3:]} {share:.3f}" for k, share in found.items() if k.startswith("top"))
        lines.append(f"zero-shot among {found['classes']} classes: {tops} of {found['n']}")
    if "loss" in names:
        unseen = captioned or picture_sets.scene_pictures(config, image_size, FLAGS.n, FLAGS.seed)
        size = dict(batch_size=FLAGS.batch_size) if FLAGS.batch_size else {}
        told = PassLines("pictures through its loss")
        measured["loss"] = losses.measure(
            model.engine, unseen, n=FLAGS.n, seed=FLAGS.seed, progress=told, **size
        )
        lines.append(losses.table(measured["loss"]))
    if "edits" in names:
        measured["edits"] = evaluate_edits(
            model, out, config=config, seed=FLAGS.seed, progress=PassLines("edits of scenes")
        )
        lines.append(edits.table(measured["edits"]))


def _scenes_to_compare(names: Sequence[str], config, image_size: int, given: dict) -> picture_sets.PictureSet:
    """Scenes of the captions that `evaluate_scenes` draws. Raises ValueError for metrics that cannot be."""
    captions, _ = scene_scores.draw_captions(config, FLAGS.n, FLAGS.seed)
    known = scene_scores.draw_scenes(config, FLAGS.n, 1, FLAGS.seed)
    reference = picture_sets.rendered("scenes of the captions", known, image_size)
    planned = picture_sets.PictureSet("drawn", "memory", FLAGS.n, lambda: iter(()), tuple(captions))
    fidelity.check(names, planned, reference, **given)
    return reference


def main(argv):
    """Run the command; `argv` without the flags."""
    with processes.together(debug=FLAGS.debug):
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments {argv[1:]}: captions are for dalle2_jax.generate")
        partition.initialise()
        processes.join()
        with contextlib.ExitStack() as stack:
            out = epath.Path(FLAGS.out)
            if not processes.is_first():  # every process measures, one writes and prints
                out = epath.Path(stack.enter_context(tempfile.TemporaryDirectory()))
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            if FLAGS.compare:
                run_comparison(out)
            elif FLAGS.prompts:
                run_prompts()
            else:
                run_metrics(out)
