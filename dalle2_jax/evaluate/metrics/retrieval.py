"""Retrieval: whether CLIP finds a picture's caption among all, for 100 unseen scenes or --images."""

import jax.numpy as jnp
import numpy as np

from dalle2_jax import pipeline
from dalle2_jax.data import scenes
from dalle2_jax.evaluate import picture_sets
from dalle2_jax.evaluate.metric import Inputs, ModelMetric
from dalle2_jax.models.stages import clip

SCENES = 100


def facts(scene: scenes.Scene) -> tuple:
    """The content of a scene's captions in any wording: its objects, and its relations in one direction."""
    names = tuple((thing.colour, thing.shape) for thing in scene.objects)
    relations = set()
    for a, relation, b in zip(names, scene.relations, names[1:], strict=False):
        turned = relation in ("below", "right of")
        relations.add((b, scenes.CONVERSE[relation], a) if turned else (a, relation, b))
    return frozenset(names), frozenset(relations)


def unseen_scenes(
    config: scenes.SceneConfig, count: int, seed: int = 0
) -> tuple[list[scenes.Scene], list[str]]:
    """(`count` scenes with different facts, their randomly worded captions), from the splits in turn.

    Raises ValueError if `config` has fewer facts.
    """
    used: set[tuple] = set()

    def is_new(scene: scenes.Scene) -> bool:
        before = len(used)
        used.add(facts(scene))
        return len(used) > before

    found = picture_sets.unseen_scenes(config, count, seed, keep=is_new)
    if len(found) < count:
        raise ValueError(f"scenes of {config.name!r} have only {len(found)} distinct facts, not {count}")
    draw = np.random.default_rng(seed)
    return found, [scenes.caption(scene, index=int(draw.integers(1 << 30))) for scene in found]


def retrieval(image_embed: np.ndarray, text_embed: np.ndarray) -> dict[str, float]:
    """Share of pairs [N, E] whose nearest match is the partner, in both directions, and their mean cosine."""
    image_to_text, text_to_image = clip.retrieval_accuracy(jnp.asarray(image_embed), jnp.asarray(text_embed))
    cosine = (clip.unit_norm(jnp.asarray(image_embed)) * clip.unit_norm(jnp.asarray(text_embed))).sum(axis=-1)
    return {
        "n": len(image_embed),
        "image_to_text": float(image_to_text),
        "text_to_image": float(text_to_image),
        "cosine": float(cosine.mean()),
    }


def unseen_pictures(config: scenes.SceneConfig, image_size: int, n: int = SCENES, seed: int = 0):
    """`unseen_scenes`, rendered, as a picture set."""
    found, captions = unseen_scenes(config, n, seed)
    return picture_sets.rendered("unseen scenes", found, image_size, captions)


def measure(
    model: pipeline.Pipeline,
    pictures: picture_sets.PictureSet,
    *,
    n: int = SCENES,
    seed: int = 0,
    batch_size: int | None = None,
) -> dict:
    """`retrieval` by the model's CLIP for at most `n` of `pictures`, drawn at random, one of each caption."""
    texts = pictures.captions()
    distinct = list({text: i for i, text in enumerate(texts)}.values())
    images, rows = picture_sets.chosen(pictures, distinct, n, seed)
    (text_embed, _), _ = model.encode_text([texts[row] for row in rows], batch_size)
    return retrieval(model.encode_image(images, batch_size), text_embed)


def _measure(inputs: Inputs) -> tuple[dict, str]:
    request, pictures, n = inputs.request, inputs.images, inputs.request.n
    if pictures is None:
        pictures, n = unseen_pictures(*inputs.scenes, seed=request.seed), SCENES
    found = measure(inputs.model, pictures, n=n, seed=request.seed, batch_size=request.batch_size)
    return found, (
        f"retrieval among {found['n']}: image to text {found['image_to_text']:.3f}, "
        f"text to image {found['text_to_image']:.3f}"
    )


METRICS = {"retrieval": ModelMetric(_measure, needs_clip=True)}
