"""What the tiny recipes of VQ-VAE, VQ-VAE-2 and DALL-E 1 must show; see `benchmarks.recipes`."""

import json

import jax
import numpy as np

from benchmarks.scores import Score, difference, hits, mean, share
from benchmarks.trained import BATCH, DRAWINGS, Trained, class_captions
from dalle2_jax.data import scenes
from dalle2_jax.edit import codes
from dalle2_jax.evaluate import picture_sets
from dalle2_jax.evaluate.metrics import reconstruction
from dalle2_jax.evaluate.metrics import scenes as scenes_metric
from dalle2_jax.evaluate.stage_examples import StageExamples
from dalle2_jax.runtime.batch import as_floats

GUIDANCE = 2  # of VQ-VAE-2's samples by their class
TRAINING_PICTURES = 1024  # whose codes make a histogram


def vqvae(run: Trained) -> list[Score]:
    """Scenes that a tokenizer gives back: right, with little error, by many codes; their prior."""
    count = DRAWINGS // len(scenes.KINDS)
    true = [one for kind in scenes.KINDS for one in scenes.evaluation_scenes(run.grammar, kind, count, 1)]
    texts = [scenes.caption(scene) for scene in true]
    pictures = picture_sets.rendered("scenes", true, 64, texts)
    found, images, originals, _ = reconstruction.measure(run.model(), pictures, n=DRAWINGS, batch_size=BATCH)
    check = scenes_metric.load_checker()
    right = [
        scenes_metric.verdict_aspects(check(*pair))["correct"] for pair in zip(images, texts, strict=True)
    ]
    book = found["codes"]["level_0"]
    for image, original in list(zip(images, originals, strict=True))[:: DRAWINGS // 8]:
        run.show(original, "original")
        run.show(image, "reconstruction")
    coded = _code_batch(run, "validation", DRAWINGS)
    prior = _losses(run, coded)["loss"] / np.log(2)
    histogram = _histogram_bits(_code_batch(run, "train", TRAINING_PICTURES)["codes"], coded["codes"])
    return [
        share("reconstructions correct", np.array(right, bool), 0.9),
        mean("PSNR of reconstructions, dB", reconstruction.psnr(images, originals)),
        share(f"codes used, of {book['book']}", hits(book["usage"], book["book"])),
        share(
            "perplexity above a quarter of the book", np.array([book["perplexity"] > book["book"] / 4]), 1.0
        ),
        mean("bits a code, prior", prior),
        mean("bits a code, histogram of the codes", histogram),
        difference("bits a code: histogram less prior", histogram, prior),
        share("samples legal", run.legal(run.draw(DRAWINGS), show=16)),
    ]


def vqvae2(run: Trained) -> list[Score]:
    """Scenes beside what the tokenizer can show; a classifier's choice; the bottom follows the top."""
    model, (true, texts) = run.model(), _single_scenes(run)
    back = codes.reconstruct(model, true, batch_size=BATCH).images
    shown = run.legal(back)
    classes = model.engine.configs["classifier"]["data"]["classes"]
    captions = class_captions(classes)
    plain, chosen = run.draw(captions), run.draw(captions, rerank=2)
    images = run.draw(captions, guidance_scale=GUIDANCE)
    right, better = run.named(plain, captions), run.named(chosen, captions)
    own, other = _bottom_losses(run)
    return [
        share("reconstructions right", run.named(back, texts), 0.97),
        share("reconstructions legal", shown),
        share("samples legal, scale 1", run.legal(plain)),
        share("samples legal", run.legal(images), 0.8 * shown.mean()),
        share("class right", run.named(images, captions, show=16)),
        share("class right, scale 1", right),
        share("class right, scale 1, the likelier of two by the classifier", better),
        difference("class right, scale 1: the likelier of two less one", better, right),
        mean("nats of a bottom code, given its own top", own),
        mean("nats of a bottom code, given another picture's top", other),
        difference("nats of a bottom code: another picture's top less its own", other, own),
    ]


def _bottom_losses(run: Trained) -> tuple[np.ndarray, np.ndarray]:
    """Nats [N] of a code of the lowest level, given the picture's upper codes, and its neighbour's."""
    coded = _code_batch(run, "validation", DRAWINGS)
    grids = run.model().engine.stage("token_model").grids
    name, lowest = f"level{len(grids) - 1}_loss", grids[-1][0] * grids[-1][1]
    upper, bottom = np.split(coded["codes"], [-lowest], axis=1)
    swapped = np.concatenate([np.roll(upper, 1, axis=0), bottom], axis=1)
    return _losses(run, coded)[name], _losses(run, coded | {"codes": swapped})[name]


def dalle1(run: Trained) -> list[Score]:
    """Objects beside what the tokenizer can show; the best of 8 candidates by the package's CLIP."""
    model, (true, texts) = run.model(), _single_scenes(run)
    shown = run.named(codes.reconstruct(model, true, batch_size=BATCH).images, texts, show=8)
    singles, pairs = run.captions("single", DRAWINGS), run.captions("pair", DRAWINGS)
    single = run.named(run.draw(singles, top_p=0.95), singles, show=16)
    one = run.named(run.draw(pairs), pairs)
    best = run.named(run.draw(pairs, rerank=8), pairs, show=16)
    gap = _validation(run, "tokenizer", "hard_gap")
    return [
        share("reconstructions right", shown, 0.98),
        share("singles right", single, 0.97),
        share("pairs right, one candidate", one),
        share("pairs right, best of 8", best),
        difference("pairs right: best of 8 less one", best, one),
        share("hard and soft codes came closer", np.array([abs(gap[-1]) < abs(gap[0])]), 1.0),
    ]


def _validation(run: Trained, training: str, name: str) -> list[float]:
    """A scalar of the validations of a training, in the order of steps."""
    lines = (run.folder / training / "metrics.jsonl").read_text().splitlines()
    return [entry[f"eval/{name}"] for entry in map(json.loads, lines) if f"eval/{name}" in entry]


def _single_scenes(run: Trained) -> tuple[list[np.ndarray], list[str]]:
    """(pictures, captions) of DRAWINGS scenes of one object."""
    kinds = [kind for kind in scenes.KINDS if kind.startswith("single")]
    true = [
        scene
        for kind in kinds
        for scene in scenes.evaluation_scenes(run.grammar, kind, -(-DRAWINGS // len(kinds)), 1)
    ][:DRAWINGS]
    return [scenes.render(scene, 64) for scene in true], [scenes.caption(scene) for scene in true]


def _code_batch(run: Trained, split: str, count: int) -> dict[str, np.ndarray]:
    """What the token model reads of scenes of a split: codes int32 [count, L], and label [count]."""
    engine, pictures = run.model().engine, run.scenes(split, count)
    examples = StageExamples(engine, "token_model")
    batch = examples.make([item.picture() for item in pictures.items()], pictures.texts, seed=0)
    params = {called: engine.params(own) for called, own in examples.uses.items()}
    encode = jax.jit(lambda fields: examples.frozen.encode_batch(params, as_floats(fields)))
    parts = [encode({k: x[i : i + BATCH] for k, x in batch.items()}) for i in range(0, count, BATCH)]
    return {field: np.concatenate([part[field] for part in parts]) for field in parts[0]}


def _losses(run: Trained, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The token model's scalars of a loss [N], of each example of a batch; in nats a code."""
    engine = run.model().engine
    stage, params, key = engine.stage("token_model"), engine.params("token_model"), jax.random.key(0)

    def one(example):
        alone = {field: x[None] for field, x in example.items()}
        return stage.loss(params, key, alone, train=False).scalars

    many = jax.jit(jax.vmap(one))
    count = len(batch["codes"])
    parts = [many({k: x[i : i + BATCH] for k, x in batch.items()}) for i in range(0, count, BATCH)]
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}


def _histogram_bits(training: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Mean bits [N] of codes [N, L] of one book, by the shares of codes [M, L] in training."""
    counts = np.bincount(training.ravel(), minlength=held_out.max() + 1) + 1.0
    return -np.log2(counts / counts.sum())[held_out].mean(axis=1)
