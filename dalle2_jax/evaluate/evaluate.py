"""dalle2-jax evaluate [--model=DIR] [--metrics=scenes,retrieval,zero_shot --n=128 --out=DIR]

Measures a model directory; writes report.json, its table report.txt, and labelled grids of the pictures.

  scenes     draws n captions, n/4 of each kind (single_seen, single_heldout: one object whose colour and
             shape training showed together or never; pair_seen, pair_heldout_relation: two objects whose
             relation it showed or never); the checker reads the pictures
  retrieval  CLIP looks for the caption of each of 100 scenes of the validation and test splits
  zero_shot  CLIP names colour and shape of the object in each of 200 unseen scenes, out of all pairs
             (both take --images=SRC with captions instead, zero_shot with --classes=FILE, a name a line)
  edits      not by default: 64 unseen scenes are changed by text, varied and repainted, and checked
  loss       not by default: of each stage at fixed times with fixed noise, on n unseen scenes or
             --images=SRC with captions
  reconstruction  of a model with a tokenizer alone by default: PSNR, SSIM, use of the codes and, on scenes,
             the checker, of n unseen scenes, --images=SRC or --reference=SRC; --inception=FILE adds rFID
  bpd        not by default: bits per dimension of the base stage on n scenes of the validation split, or on
             --images=SRC or --reference=SRC; --bpd_steps=50 instead of all its steps

Measures pictures of any origin against a reference (docs/evaluation.md):

  --images=SRC --reference=SRC [--inception=FILE] [--metrics=fid,kid,precision_recall] [--preset=openai]

A SRC is a folder of pictures, tar shards or an npz. The output counts left out files by reason. Without
--images the model draws the captions of the reference, n of them; without --reference these are unseen
scenes. A model that reads no captions draws n pictures of its classes in turn. Without --inception the
features are those of the model's CLIP (clip_frechet, clip_mmd, ...), or with --judge=DIR those of another
CLIP: a model directory with a CLIP, or a folder of OpenCLIP or transformers.

  --images=SRC --reference=TRAINING --metrics=memorised   the nearest training picture of each picture

Draws a suite of prompts, --pictures of each, in GenEval's layout, for an external tool or a judge:

  --prompts=evaluation_metadata.jsonl (GenEval's; DrawBench's csv, PartiPrompts's tsv, a JSON list of texts,
    or a caption a line)
  --images=DRAWN --judge=DIR --metrics=clip_top,class_accuracy [--reference=SRC]   is the prompt among the
    first five of 100, is the class right; --reference is judged in the same way

With --compare, once for each way of drawing, it draws n captions in each way, and writes comparison.json,
comparison.md and comparison.png instead. The captions are those of `scenes`, which the checker reads, or of
--reference=SRC; pictures are compared with scenes of the same captions or with that reference, by
--inception, --judge or the model's CLIP:

  --compare="guidance_scale=1" --compare="fine: guidance_scale=3 decoder_steps=50" --compare="model=OTHER"
"""

import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from dalle2_jax.convert import inception_weights
from dalle2_jax.data import scenes
from dalle2_jax.evaluate import drawing, fidelity, page, picture_sets, presets
from dalle2_jax.evaluate.features import BATCH_SIZE
from dalle2_jax.evaluate.metric import Inputs, Request
from dalle2_jax.evaluate.metrics import METRICS, OF_MODELS, OF_PICTURES, aesthetic
from dalle2_jax.evaluate.networks import Networks, has_classifier, has_clip, network_of
from dalle2_jax.evaluate.picture_sets import PassLines, PictureSet
from dalle2_jax.evaluate.reference import open_reference, pictures_of
from dalle2_jax.generate.output import StageLines
from dalle2_jax.generate.pipeline import Pipeline
from dalle2_jax.runtime import metrics, processes

DEFAULT_METRICS = ("scenes", "retrieval", "zero_shot")
GRID_PICTURES = 64


def open_networks(model: Pipeline, request: Request, judge: Pipeline | None = None) -> Networks:
    """The networks of a request; CLIP and classifier are those of `judge`, or without one of the model.

    Raises FileNotFoundError or ValueError for weights that cannot be used.
    """
    scenes.check_choice(request.preset, tuple(presets.PRESETS), "preset")
    if request.inception and not os.path.isfile(request.inception):
        raise FileNotFoundError(f"{request.inception} does not exist")
    if request.stats_out and not request.inception:
        raise ValueError("--stats_out is of Inception's features: give --inception=FILE")
    judges = judge or model
    clip = judges if has_clip(judges) else None
    if request.aesthetic and clip is None:
        raise ValueError("--aesthetic reads a CLIP, and the model has none: give --judge=DIR with one")
    head = (
        clip and request.aesthetic and aesthetic.load(request.aesthetic, clip.engine.stage("clip").embed_dim)
    )
    weights = inception_weights.load(request.inception) if request.inception else None
    size = request.batch_size or BATCH_SIZE
    classifier = judges if has_classifier(judges) else None
    return Networks(weights, request.preset, clip, judge is not None, head or None, size, classifier)


def choose_metrics(model: Pipeline, request: Request, networks: Networks) -> tuple[list[str], list[str]]:
    """(metrics of models, metrics of pictures) that a request names or, if it names none, permits.

    Raises ValueError for a metric that model, networks or request do not permit, before pictures are read.
    """
    reconstructs = "reconstruct" in model.actions and "draw" not in model.actions  # a tokenizer
    if request.metrics:
        names = list(request.metrics)
    elif reconstructs:
        names = ["reconstruction", *(fidelity.WITH_INCEPTION if request.inception else ())]
        names += fidelity.WITH_CLIP if networks.judge else ()
    elif request.images or request.reference or request.inception or networks.judge:
        names = list(fidelity.WITH_INCEPTION) if request.inception else []
        names += fidelity.WITH_CLIP if networks.judge or not request.inception else ()
    else:
        names = list(DEFAULT_METRICS)
    for name in names:
        scenes.check_choice(name, tuple(METRICS), "metric")
    for name in names:
        if name in OF_MODELS and OF_MODELS[name].needs_tokenizer and "tokenizer" not in model.engine.stages:
            raise ValueError(_without(model, name, "tokenizer"))
    of_clip = [name for name in names if name in OF_MODELS and OF_MODELS[name].needs_clip]
    if of_clip and not has_clip(model):
        listed = ", ".join(of_clip)
        if request.metrics:
            raise ValueError(_without(model, listed, "CLIP"))
        print(f"note: model {model.name!r} has no CLIP, so {listed} are left out", flush=True)
        names = [name for name in names if name not in of_clip]
    of_model, of_pictures = ([name for name in names if name in some] for some in (OF_MODELS, OF_PICTURES))
    for name in of_model:
        if request.images and OF_MODELS[name].draws:
            raise ValueError(f"{name} measures a model: leave --images out")
        if reason := OF_MODELS[name].refuse(request):
            raise ValueError(reason)
    read = {network_of(OF_PICTURES[name].features) for name in of_pictures} - {"inception"}
    if networks.judge and not read:
        held = networks.judged_by()
        raise ValueError(f"--judge is a {held}, and none of {', '.join(names)} reads it: leave it out")
    if of_pictures:
        many = _planned(1 << 40, ("a caption",))
        reference = many if request.reference or not request.images else None
        fidelity.check(of_pictures, many, reference, networks)
    return of_model, of_pictures


def _without(model: Pipeline, metric: str, what: str) -> str:
    """The message for metrics that need a stage that the model has not."""
    needs, stages = "need" if "," in metric else "needs", ", ".join(model.engine.stages)
    return f"{metric} {needs} a {what}, and model {model.name!r} has none: it has {stages}"


def _planned(count: int, captions: Sequence[str]) -> PictureSet:
    """A set of pictures that are not drawn yet, for `fidelity.check`."""
    return PictureSet("pictures", "planned", count, lambda: iter(()), tuple(captions))


def measure_pictures(inputs: Inputs, names: Sequence[str], images: PictureSet | None = None) -> dict:
    """Entries of the picture metrics `names` for `images`, `inputs.images`, or pictures that the model draws.

    Without a reference they are compared with unseen scenes. Drawn pictures go into `pictures` in
    request.out.
    """
    model, request, networks = inputs.model, inputs.request, inputs.networks
    images, reference = images or inputs.images, inputs.reference
    if reference is None and images is None:
        if drawing.reads_text(model) or any(OF_PICTURES[name].reference for name in names):
            reference = picture_sets.scene_pictures(*inputs.scenes, request.n, request.seed)
    if images is None:
        texts, numbers = drawing.what_to_draw(model, reference, request.n, request.seed, request.settings)
        fidelity.check(names, _planned(len(texts), texts), reference, networks)
        draw = functools.partial(drawing.drawn_pictures, numbers=numbers, progress=StageLines())
        draw = functools.partial(draw, seed=request.seed, batch_size=request.batch_size)
        images = draw(model, texts, epath.Path(request.out) / "pictures", settings=request.settings)
    else:
        fidelity.check(names, images, reference, networks)
    for shown, name in ((images, "images"), (pictures_of(reference), "reference")):
        if shown is not None:
            grid = metrics.labelled_grid(*picture_sets.samples(shown, GRID_PICTURES))
            metrics.save_png(inputs.out / f"samples_{name}.png", grid, {"set": shown.name})
    if request.npz_out and processes.is_first():
        square = presets.PRESETS[request.preset].square
        picture_sets.write_npz(picture_sets.mapped(images, square), request.npz_out)
    measure = functools.partial(fidelity.measure, progress=PassLines(), stats_out=request.stats_out)
    found = measure(images, reference, names, networks, seed=request.seed)
    for write in filter(None, (OF_PICTURES[name].write for name in names)):
        write(found, images, pictures_of(reference), inputs.out)
    return found


def evaluate(
    model: Pipeline, request: Request, out: epath.Path, judge: Pipeline | None = None
) -> tuple[dict, list[str]]:
    """Measure a request, with grids in `out`: (JSON values by metric and about the run, lines of text)."""
    began = time.monotonic()
    inputs = Inputs(model, request, open_networks(model, request, judge), out)
    of_model, of_pictures = choose_metrics(model, request, inputs.networks)
    report: dict[str, Any] = {"model": model.name}
    drawing_first = [name for name in of_model if OF_MODELS[name].compare_with]
    compares_given = any(OF_MODELS[name].reads_reference for name in drawing_first)
    shared = drawing_first and of_pictures and (compares_given or not (request.images or request.reference))
    draws = (of_pictures and not (shared and compares_given)) or any(OF_MODELS[n].draws for n in of_model)
    if draws and not request.images:
        report["settings"] = model.settings(**request.settings)
    lines = []
    if judged := inputs.networks.judge_summary():
        report["judge"] = judged
        sha256 = ", ".join(judged[key] for key in ("weights_sha256", "classifier_sha256") if key in judged)
        lines.append(f"judge: {inputs.networks.judged_by()} of {judged['name']}, sha256 {sha256}")
    openers: dict[str, Callable] = {"images": picture_sets.open_pictures, "reference": open_reference}
    for name, opener in openers.items():
        if path := getattr(request, name):
            opened = opener(path, PassLines("pictures checked"))
            setattr(inputs, name, opened)
            report.setdefault("pictures", {})[name] = opened.summary()
            lines.append(f"{name}: {opened.describe()}")
    for line in lines:
        print(line, flush=True)
    reference = inputs.reference is not None
    if any(not (reference and OF_MODELS[name].reads_reference) for name in of_model) and not inputs.images:
        report["scenes_config"] = inputs.scenes[0].name
    out.mkdir(parents=True, exist_ok=True)
    measured = {}
    for name in drawing_first:
        compare_with = OF_MODELS[name].compare_with
        if shared and compare_with:  # picture metrics measure the pictures that it draws
            captions, inputs.reference = compare_with(inputs)
            planned = _planned(len(captions), captions)
            fidelity.check(of_pictures, planned, inputs.reference, inputs.networks)
        measured[name], text = OF_MODELS[name].measure(inputs)
        lines.append(text)
    if of_pictures:
        found = measure_pictures(inputs, of_pictures, inputs.drawn if shared else None)
        measured |= found
        lines.append(fidelity.table(found))
    for name in of_model:
        if name not in drawing_first:
            measured[name], text = OF_MODELS[name].measure(inputs)
            lines.append(text)
    report |= {"seed": request.seed, "seconds": round(time.monotonic() - began, 1)}
    return measured | report, lines


def write_report(out: epath.Path, report: dict, lines: Sequence[str], html: str | None = None) -> None:
    """Write report.json and report.txt into `out`, and the page `html`; process 0 alone writes the page."""
    (out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    (out / "report.txt").write_text("\n".join(lines) + "\n")
    if html and processes.is_first():
        kinds = ("samples", *(name for name in METRICS if name in report))
        pictures = [path for kind in kinds for path in sorted(out.glob(f"{kind}_*.png"))]
        entries = {name: x for name, x in report.items() if isinstance(x, dict) and "features" in x}
        names = [name for name in report if name in METRICS or name in entries]
        found = [figure for name in names for figure in page.figures(name, report[name])]
        numbers = page.of_figures(found) + (page.entries(entries) if entries else "")
        given = report.get("pictures", {})
        subject = given["images"]["name"] if "images" in given else f"model {report['model']}"
        against = f" against {given['reference']['name']}" if "reference" in given else ""
        about = f"seed {report['seed']}, measured in {report['seconds']} s"
        title = f"{', '.join(names)}: {subject}{against}"
        page.write(html, title, numbers, "\n".join(lines), pictures, report, found, about)
    print("\n".join(lines))
    print(f"wrote {out / 'report.json'}, the table in report.txt")
