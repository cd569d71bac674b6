"""The tiny recipes that `benchmarks.systems` trains, and what each of them must show.

A gate is the floor of the system's plan, or two standard errors below the first measured value if that is
more. Where one way of drawing must beat another, both draw the same captions from the same noise.
"""

import dataclasses
import re

import jax
import numpy as np

from benchmarks.scores import Score, difference, hits, mean, share
from benchmarks.token_recipes import dalle1, vqvae, vqvae2
from benchmarks.trained import BATCH, DRAWINGS, Recipe, Trained, Training, class_captions
from dalle2_jax.configs.imagen.upsampler256 import NOISE
from dalle2_jax.data import scenes
from dalle2_jax.edit import actions
from dalle2_jax.evaluate.metrics import edits, retrieval, zero_shot
from dalle2_jax.evaluate.metrics import scenes as scenes_metric
from dalle2_jax.evaluate.scenes import find_objects
from dalle2_jax.generate.pipeline import Pipeline, Running
from dalle2_jax.models import models
from dalle2_jax.models.stages.conditions import LowRes

# Drawings of 25 steps of improved DDPM; what it may lose by its learned variance and count as "as good".
FEW_STEPS, NOT_WORSE = 1024, -0.03
STATIC = 1e-6  # this percentile is below 1, so that x0 is clipped to [-1, 1]


def dalle2(run: Trained) -> list[Score]:
    """Objects that are named right."""
    found = []
    for kind, gate in (("single", 0.95), ("pair", None)):
        captions = run.captions(kind, DRAWINGS)
        found.append(share(f"{kind}s right", run.named(run.draw(captions), captions, show=16), gate))
    return found


def clip(run: Trained) -> list[Score]:
    """Retrieval and zero-shot classes, each on unseen scenes with held-out combinations among them."""
    model, side = run.model(), run.model().engine.stage("clip").image_size
    pictures = retrieval.unseen_pictures(run.grammar, side)
    found = retrieval.measure(model, pictures)
    scores = [
        share(f"retrieval among {found['n']}, {name.replace('_', ' ')}", hits(found[name], found["n"]), 0.8)
        for name in ("image_to_text", "text_to_image")
    ]
    pictures, names = zero_shot.unseen_pictures(run.grammar, side)
    classes = zero_shot.measure(model, pictures, names)
    right = hits(classes["top1"], classes["n"])
    return [*scores, share(f"zero-shot, {classes['classes']} classes, held-out pairs among them", right, 0.8)]


def ddpm(run: Trained) -> list[Score]:
    """Pictures of an unconditional model that are scenes; its likelihood in training and at the end."""
    bits = {step: run.bits(run.at_step(step)) for step in (1000, 3000, 6000)}
    return [
        share("legal, 250 of 1000 steps", run.legal(run.draw(DRAWINGS), show=32), 0.58),
        *(mean(f"bits per dimension at step {step}", x) for step, x in bits.items()),
        difference("bits: step 1000 less 3000", bits[1000], bits[3000]),
        difference("bits: step 3000 less 6000", bits[3000], bits[6000]),
        difference("bits: histogram of the channels less the model", run.histogram_bits(), bits[6000]),
    ]


def iddpm(run: Trained) -> list[Score]:
    """Few steps with the learned variance, and with the fixed one of a network trained without it."""
    learned = run.legal(run.draw(FEW_STEPS, decoder_steps=25), show=16)
    fixed = run.legal(run.draw(FEW_STEPS, "simple", decoder_steps=25), show=16)
    bits = {"hybrid": run.bits(), "simple": run.bits("simple")}
    return [
        share("legal, 25 steps, learned variance", learned),
        share("legal, 25 steps, fixed small variance", fixed),
        difference("legal, 25 steps: learned less fixed", learned, fixed, gate=NOT_WORSE),
        share("legal, 250 steps", run.legal(run.draw(DRAWINGS)), 0.85),
        *(mean(f"bits per dimension, {name}", x) for name, x in bits.items()),
        difference("bits: simple loss less hybrid loss", bits["simple"], bits["hybrid"]),
    ]


def adm(run: Trained) -> list[Score]:
    """An unconditional generator that a classifier steers to a class."""
    classes = run.model().engine.configs["classifier"]["data"]["classes"]
    captions = class_captions(classes)
    found, right, places = [], {}, {}
    for scale in (0, 1, 5, 10):
        images = run.draw(captions, **({"classifier": scale} if scale else {}))
        right[scale] = run.named(images, captions, show=0 if scale in (1, 5) else 16)
        places[scale] = _places(images)
        found.append(share(f"class right, scale {scale}", right[scale], 0.52 if scale == 10 else None))
    both = ~(np.isnan(places[0]) | np.isnan(places[10])).any(axis=1)
    spread = {scale: np.abs(xy[both] - xy[both].mean(axis=0)).sum(axis=1) for scale, xy in places.items()}
    return [
        *found,
        difference("class right: scale 10 less 0", right[10], right[0]),
        mean("distance from the mean place, scale 0", spread[0]),
        mean("distance from the mean place, scale 10", spread[10]),
        difference("spread of places: scale 0 less 10", spread[0], spread[10]),
    ]


def _places(images: np.ndarray) -> np.ndarray:
    """(x, y) [N, 2] of the largest object of each picture, in fractions of the side; NaN without one."""
    found = []
    for image in images:
        things, _ = find_objects(image)
        largest = max(things, key=lambda thing: thing.extent, default=None)
        found.append((largest.x, largest.y) if largest else (np.nan, np.nan))
    return np.array(found)


def cfg(run: Trained) -> list[Score]:
    """Guidance scales: two objects right, and how much pictures of one caption differ."""
    captions, found, right = run.captions("pair", DRAWINGS), [], {}
    for scale in (1, 1.5, 2, 3, 5):
        images = run.draw(captions, guidance_scale=scale)
        right[scale] = run.named(images, captions, show=16 if scale in (1, 3) else 0)
        found.append(share(f"pairs right, scale {scale:g}", right[scale]))
    repeated = [text for text in captions[::8] for _ in range(8)]
    for scale in (1, 3):
        found.append(
            mean(f"diversity, scale {scale}", _diversity(run.draw(repeated, guidance_scale=scale), 8))
        )
    return [*found, difference("pairs right: scale 2 less 1", right[2], right[1])]


def _diversity(images: np.ndarray, copies: int) -> np.ndarray:
    """Mean distance between pictures of one caption, [N / copies]: root mean square of pixels in 0 .. 1."""
    x = images.reshape(-1, copies, images[0].size).astype(np.float64) / 255
    first, second = np.triu_indices(copies, 1)
    return np.sqrt(((x[:, first] - x[:, second]) ** 2).mean(axis=-1)).mean(axis=-1)


def glide(run: Trained) -> list[Score]:
    """Objects with guidance and without; inpainting."""
    singles, pairs = run.captions("single", DRAWINGS), run.captions("pair", DRAWINGS)
    single = run.named(run.draw(singles), singles, show=16)
    guided = run.named(run.draw(pairs), pairs, show=16)
    plain = run.named(run.draw(pairs, guidance_scale=1), pairs)
    painted, kept = _inpainted(run)
    return [
        share("singles right", single, 0.98),
        share("pairs right", guided, 0.95),
        share("pairs right, scale 1", plain),
        difference("pairs right: scale 3 less 1", guided, plain),
        share("inpainting: pixels outside of the mask are equal", kept, 1.0),
        share("inpainting: the asked objects are there", painted, 0.96),
    ]


def _inpainted(run: Trained) -> tuple[np.ndarray, np.ndarray]:
    """(the target is right, the kept pixels are equal) of inpainted scenes, each bool [N]."""
    model, check, painted, kept = run.model(), scenes_metric.load_checker(), [], []
    cases = edits.inpaint_cases(run.grammar, DRAWINGS, seed=0)
    for seed, case in enumerate(cases):
        before = scenes.render(case.scene, model.image_size)
        mask = edits.mask_of(case, len(before))
        after = actions.inpaint(model, before, mask, case.target, seed=seed).images[0]
        kept.append(bool((after[~mask] == before[~mask]).all()))
        painted.append(bool(scenes_metric.verdict_aspects(check(after, case.target))["named"]))
    return np.array(painted), np.array(kept)


def imagen(run: Trained) -> list[Score]:
    """Objects by the states of a text encoder; dynamic thresholding; an upsampler trained on noise levels."""
    singles, pairs = run.captions("single", DRAWINGS), run.captions("pair", DRAWINGS)
    single = run.named(run.draw(singles), singles, show=16)
    pair = run.named(run.draw(pairs), pairs, show=16)
    # White and black are saturated by right: these captions name a grey background.
    bare = [text for text in run.captions("single", 2 * DRAWINGS) if not re.search(" on |background", text)]
    grey = [f"{text} on grey" for text in bare[:DRAWINGS]]
    dynamic, static = (
        _saturated(run.draw(grey, "base", guidance_scale=8, threshold=percentile))
        for percentile in (99.5, STATIC)
    )
    return [
        share("singles right", single, 0.96),
        share("pairs right", pair),
        mean("share of |x| > .99 at scale 8, dynamic threshold", dynamic),
        mean("share of |x| > .99 at scale 8, static threshold", static),
        difference("saturated: static less twice dynamic", static, 2 * dynamic),
        share("leaves of the frozen T5 are bit-equal", _rested(run, "t5"), 1.0),
        *_levels(run),
    ]


def _rested(run: Trained, name: str) -> np.ndarray:
    """bool [leaves]: which weights of a frozen stage are those of its training to the bit, as a model stores
    them: rounded to bfloat16."""
    kept, own = (
        jax.tree.leaves(models.load_stage(run.folder / path, name)[2]) for path in ("models/model", name)
    )
    rounded = [np.asarray(leaf).astype(jax.numpy.bfloat16) for leaf in own]
    return np.array([np.array_equal(a, b.astype(a.dtype)) for a, b in zip(kept, rounded, strict=True)])


def _saturated(images: np.ndarray) -> np.ndarray:
    """The share [N] of values of each picture uint8 [N, H, W, 3] beyond .99 in [-1, 1]."""
    return (np.abs(images / 127.5 - 1) > 0.99).mean(axis=(1, 2, 3))


def _levels(run: Trained) -> list[Score]:
    """Enlarged true scenes, clean and noised, by upsamplers that trained with noise levels and without."""
    true = [
        scene
        for kind in ("single_seen", "pair_seen")
        for scene in scenes.evaluation_scenes(run.grammar, kind, DRAWINGS // 2, 1)
    ]
    texts, low_res = [scenes.caption(scene) for scene in true], [scenes.render(scene, 16) for scene in true]
    found, lost = [], {}
    for name, title in (("model", "levels"), ("plain", "no levels")):
        right = {}
        for level in (0.0, NOISE["low_res_level"]):
            images = _enlarged(run, name, np.stack(low_res), texts, level)
            right[level] = run.named(images, texts, show=8).astype(int)
            found.append(
                share(f"enlarged scenes right, small picture noised {level:g}, {title}", right[level] > 0)
            )
        lost[name] = right[0.0] - right[NOISE["low_res_level"]]
    return [
        *found,
        difference("lost by the noise: without levels less with them", lost["plain"], lost["model"]),
    ]


class _Untold(LowRes):
    """Noises the small picture; the network, which was trained without noise, reads no level."""

    def for_sampling(self, keys, low_res, schedule) -> dict:
        return super().for_sampling(keys, low_res, schedule) | {"low_res_t": None}


def _enlarged(run: Trained, name: str, low_res: np.ndarray, texts: list[str], level: float) -> np.ndarray:
    """Small pictures uint8 [N, h, w, 3], noised to a level, enlarged by a model's upsampler."""
    model = Pipeline.load(run.folder / "models" / name)
    steps = [step for step in model.steps("draw") if step.role != "decoder"]
    stage = model.engine.stage(steps[-1].stage)
    model.engine.params(steps[-1].stage)  # read as they were trained: the changed stage has a noise level
    kind = LowRes if stage.low_res.noise else _Untold
    noised = kind(**dataclasses.asdict(stage.low_res) | dict(noise=1.0, level=level))
    model.engine.stages[steps[-1].stage] = dataclasses.replace(stage, low_res=noised)
    # Compiled programs are kept by the config, which must tell this stage from the trained one.
    model.engine.configs[steps[-1].stage]["model"]["low_res"] = f"{kind.__name__} {level}"
    batch = {"caption": texts, "number": np.arange(len(texts)), f"{steps[-1].name}.low_res": low_res}
    made, _ = model.run(steps, batch, model.settings(), Running(batch_size=BATCH))
    return made[f"{steps[-1].name}.image"]


_CLIP = "--config.clip={dir}/clip"
_CHECKPOINTS = ("--config.checkpoint_every=1000", "--config.keep_checkpoints=9")
_T5 = "--config.frozen.t5={dir}/t5"
_CODES = "--config.frozen.tokenizer={dir}/tokenizer"
_PLAIN = ("--config.model.low_res_noise=0", "--config.model.low_res_level=0")


def _in_three_parts(name: str) -> tuple[Training, ...]:
    """A decoder that learns to read captions first: the presets of `configs/glide/tiny.py`."""
    return (
        Training("reader", f"{name}/tiny:reader"),
        Training("relations", f"{name}/tiny:relations", ("--config.init_from={dir}/reader",)),
        Training("decoder", f"{name}/tiny", ("--config.init_from={dir}/relations",)),
    )


RECIPES = {
    "dalle2": Recipe(
        "DALL-E 2 (`configs/tiny`)",
        (
            Training("clip", "tiny/clip"),
            Training("prior", "tiny/prior", (_CLIP,)),
            Training("decoder", "tiny/decoder", (_CLIP,)),
            Training("upsampler64", "tiny/upsampler64"),
        ),
        {"model": {"clip": "clip", "prior": "prior", "decoder": "decoder", "upsamplers": "upsampler64"}},
        dalle2,
    ),
    "clip": Recipe(
        "CLIP (`configs/tiny/clip.py`)", (Training("clip", "tiny/clip"),), {"model": {"clip": "clip"}}, clip
    ),
    "ddpm": Recipe(
        "DDPM", (Training("decoder", "ddpm/tiny", _CHECKPOINTS),), {"model": {"decoder": "decoder"}}, ddpm
    ),
    "vqvae": Recipe(
        "VQ-VAE",
        (Training("tokenizer", "vqvae/tiny"), Training("token_model", "vqvae/tiny_prior", (_CODES,))),
        {"model": {"tokenizer": "tokenizer", "token_model": "token_model"}},
        vqvae,
    ),
    "iddpm": Recipe(
        "Improved DDPM",
        (
            Training("decoder", "iddpm/tiny"),
            Training("simple", "iddpm/tiny", ("--config.model.learned_variance=False",), arm=True),
        ),
        {"model": {"decoder": "decoder"}, "simple": {"decoder": "simple"}},
        iddpm,
    ),
    "adm": Recipe(
        "ADM with a classifier",
        (Training("decoder", "adm/tiny"), Training("classifier", "tiny/classifier")),
        {"model": {"decoder": "decoder", "classifier": "classifier"}},
        adm,
    ),
    "cfg": Recipe("Classifier-free guidance", _in_three_parts("cfg"), {"model": {"decoder": "decoder"}}, cfg),
    "glide": Recipe("GLIDE", _in_three_parts("glide"), {"model": {"decoder": "decoder"}}, glide),
    "imagen": Recipe(
        "Imagen, on a text encoder of T5's shape",
        (
            Training("t5", "imagen/tiny_t5"),
            Training("decoder", "imagen/tiny", (_T5,)),
            Training("upsampler", "imagen/tiny_upsampler", (_T5,)),
            Training("plain", "imagen/tiny_upsampler", (_T5, *_PLAIN), arm=True),
        ),
        {
            "model": {"t5": "t5", "decoder": "decoder", "upsamplers": "upsampler"},
            "base": {"t5": "t5", "decoder": "decoder"},
            "plain": {"t5": "t5", "decoder": "decoder", "upsamplers": "plain"},
        },
        imagen,
    ),
    "dalle1": Recipe(
        "DALL-E 1",
        (Training("tokenizer", "dalle1/tiny_dvae"), Training("token_model", "dalle1/tiny", (_CODES,))),
        {"model": {"tokenizer": "tokenizer", "token_model": "token_model"}},
        dalle1,
    ),
    "vqvae2": Recipe(
        "VQ-VAE-2",
        (
            Training("tokenizer", "vqvae2/tiny_tokenizer"),
            Training("token_model", "vqvae2/tiny_prior", (_CODES,)),
            Training("classifier", "tiny/classifier"),
        ),
        {"model": {"classifier": "classifier", "tokenizer": "tokenizer", "token_model": "token_model"}},
        vqvae2,
    ),
}
