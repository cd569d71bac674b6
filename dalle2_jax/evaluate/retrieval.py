"""Whether CLIP finds the right caption among many, for scenes that training never saw."""

import jax.numpy as jnp
import numpy as np

from dalle2_jax.data import scenes
from dalle2_jax.models.stages import clip

SPLITS = ("validation", "test_pairs", "test_relations")


def facts(scene: scenes.Scene) -> tuple:
    """What captions of the scene say, however worded: its objects, and its relations said one way round."""
    names = tuple((thing.colour, thing.shape) for thing in scene.objects)
    relations = set()
    for a, relation, b in zip(names, scene.relations, names[1:], strict=False):
        turned = relation in ("below", "right of")
        relations.add((b, scenes.CONVERSE[relation], a) if turned else (a, relation, b))
    return frozenset(names), frozenset(relations)


def unseen_scenes(
    config: scenes.SceneConfig, count: int, seed: int = 0, splits: tuple[str, ...] = SPLITS
) -> tuple[list[scenes.Scene], list[str]]:
    """(scenes, their captions in a random wording), `count` of them, no two of which say the same.

    They come from the splits in turn. Raises ValueError where `config` has not as many facts.
    """
    if config.max_objects < 2:
        splits = tuple(split for split in splits if split != "test_relations")
    chosen, captions, used = [], [], set()
    draw = np.random.default_rng(seed)
    for i in range(100 * count):
        scene = scenes.sample_scene(config, splits[i % len(splits)], i // len(splits), seed)
        if facts(scene) not in used:
            used.add(facts(scene))
            chosen.append(scene)
            captions.append(scenes.caption(scene, index=int(draw.integers(1 << 30))))
        if len(chosen) == count:
            return chosen, captions
    raise ValueError(
        f"scenes of {config.name!r} have only {len(chosen)} distinct facts, {count} are asked for"
    )


def retrieval(image_embed: np.ndarray, text_embed: np.ndarray) -> dict[str, float]:
    """Share of pairs [N, E] whose nearest match is the partner, both ways, and the partners' mean cosine."""
    image_to_text, text_to_image = clip.retrieval_accuracy(jnp.asarray(image_embed), jnp.asarray(text_embed))
    cosine = (clip.unit_norm(jnp.asarray(image_embed)) * clip.unit_norm(jnp.asarray(text_embed))).sum(axis=-1)
    return {
        "n": len(image_embed),
        "image_to_text": float(image_to_text),
        "text_to_image": float(text_to_image),
        "cosine": float(cosine.mean()),
    }
