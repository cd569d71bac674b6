"""Picture metrics: pictures against a reference or their captions, in one pass over the pictures.

Inception's metrics (FID, sFID, KID, inception score, precision and recall, FID extrapolated) need the user's
weights. CLIP's read the measured model's CLIP or a judge: `clip_frechet` is no FID, `clip_mmd` is CMMD only
in its formula. Each number is an entry of `metric` with

    {n, images, features, dimensions, preset, resize, weights_sha256, n_reference, reference, ...}
"""

import functools
import os
from collections.abc import Callable, Sequence

import numpy as np

from dalle2_jax.data import scenes
from dalle2_jax.evaluate.features import extract
from dalle2_jax.evaluate.metric import Features
from dalle2_jax.evaluate.metrics import OF_PICTURES, frechet
from dalle2_jax.evaluate.networks import Networks, network_of
from dalle2_jax.evaluate.picture_sets import PictureSet
from dalle2_jax.evaluate.presets import PRESETS
from dalle2_jax.evaluate.reference import Stats, pictures_of, write_stats
from dalle2_jax.runtime import processes

WITH_INCEPTION = ("fid", "kid", "precision_recall")
WITH_CLIP = ("clip_frechet", "clip_mmd", "clip_precision_recall")


def compared(name: str, reference: PictureSet | Stats | None) -> PictureSet | Stats | None:
    """The part of the reference that a metric reads: mean and covariance if they suffice, else pictures."""
    metric = OF_PICTURES[name]
    if isinstance(reference, Stats) and metric.statistics and metric.features in reference.moments:
        return reference
    return pictures_of(reference) if metric.reference or metric.beside else None


def check(
    names: Sequence[str], images: PictureSet, reference: PictureSet | Stats | None, networks: Networks
) -> None:
    """Raise ValueError for metrics that cannot be measured; no picture is read."""
    scenes.check_choice(networks.preset, tuple(PRESETS), "preset")
    for name in names:
        scenes.check_choice(name, tuple(OF_PICTURES), "metric of pictures")
    of_clip = [name for name in names if OF_PICTURES[name].features == "clip"]
    if of_clip and networks.clip is None:
        raise ValueError(
            f"{', '.join(of_clip)} need{'s' * (len(of_clip) == 1)} a CLIP, and the model has none: give "
            f"--judge=DIR with one, or measure {', '.join(WITH_INCEPTION)} with --inception=FILE"
        )
    for name in names:
        metric = OF_PICTURES[name]
        if metric.features == "classes" and networks.classifier is None:
            raise ValueError(f"{name} needs a classifier: give --judge=DIR, a model directory with one")
        if network_of(metric.features) == "inception" and networks.inception is None:
            other = f", or measure {', '.join(WITH_CLIP)} with a CLIP" if networks.clip is not None else ""
            raise ValueError(
                f"{name} needs Inception's weights: give --inception=FILE (see docs/evaluation.md){other}"
            )
        if metric.head and networks.head is None:
            raise ValueError(f"{name} needs the weights of its head: give --aesthetic=FILE")
        counts = [images.count]
        if metric.reference:
            count = _check_reference(name, reference, networks.preset)
            counts += [] if count is None else [count]
        if metric.captions:
            for pictures in (images, compared(name, reference) if metric.beside else None):
                if isinstance(pictures, PictureSet):
                    pictures.captions()
        reason = metric.refuse(name, min(counts), images.count)
        if reason or min(counts) < 2:
            raise ValueError(reason or f"{name} needs more than {min(counts)} pictures")


def _check_reference(name: str, reference: PictureSet | Stats | None, preset: str) -> int | None:
    """The number of pictures behind the part of the reference that a metric reads; None: unknown.

    Raises ValueError for a reference without that part, for statistics of another preset, and for a
    covariance of few pictures.
    """
    used = compared(name, reference)
    if reference is None:
        raise ValueError(f"{name} needs pictures to compare with: give --reference")
    if used is None and OF_PICTURES[name].statistics:
        raise ValueError(f"{reference.name} has no mu_s and sigma_s, which {name} needs")
    if used is None:
        raise ValueError(f"{name} needs the pictures of the reference, {reference.name} has statistics alone")
    if isinstance(used, Stats) and used.preset not in (None, preset):
        raise ValueError(f"{used.name} is of preset {used.preset!r}, not {preset!r}")
    if isinstance(used, Stats) and name in ("fid", "sfid") and used.count is None:
        features = OF_PICTURES[name].features
        rank, full = used.rank(features), len(used.moments[features].mean)
        if rank < min(full, frechet.FID_PICTURES - 1):
            raise ValueError(
                f"{used.name} does not record its number of pictures, and its covariance of rank {rank} is "
                f"that of {rank + 1}: {name} needs {frechet.FID_PICTURES}; measure fid_small"
            )
    return used.count


def measure(
    images: PictureSet,
    reference: PictureSet | Stats | None,
    names: Sequence[str],
    networks: Networks,
    *,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    stats_out: str | os.PathLike | None = None,
    reference_features: dict[str, np.ndarray] | None = None,
) -> dict[str, dict]:
    """Entries by name of the picture metrics `names`.

    Args:
      seed: of the captions that R-precision chooses from, and of the subsets of fid_infinity.
      progress: called as progress(name of the set, pictures done, all pictures).
      stats_out: npz file for mean and covariance of the images' Inception features; process 0 writes it.
      reference_features: cache of the reference's features by name, read and filled.

    Raises ValueError, before anything is read, for metrics that cannot be measured.
    """
    check(names, images, reference, networks)
    used = {name: compared(name, reference) for name in names}
    for part in used.values():
        if isinstance(part, Stats) and part.weights_sha256 not in (None, networks.inception.sha256):
            raise ValueError(f"{part.name} was made with other weights than those of --inception")
    needed = {OF_PICTURES[name].features for name in names}
    if stats_out:
        if networks.inception is None:
            raise ValueError("--stats_out is of Inception's features: give --inception=FILE")
        needed |= {"pool", "spatial"}
    extractors = {network: networks.extractor(network) for network in {network_of(name) for name in needed}}

    def features_of(pictures: PictureSet, features: set[str]) -> dict[str, np.ndarray]:
        chosen = [extractors[network] for network in sorted({network_of(name) for name in features})]
        report = None if progress is None else functools.partial(progress, pictures.name)
        return extract(pictures, chosen, features, networks.batch_size, report)

    x = features_of(images, needed)
    y = {} if reference_features is None else reference_features
    by_pictures = [name for name, part in used.items() if isinstance(part, PictureSet)]
    pictures = pictures_of(reference)
    missing = {OF_PICTURES[name].features for name in by_pictures} - y.keys()
    if pictures and missing:
        y |= features_of(pictures, missing)
    if stats_out and processes.is_first():
        write_stats(stats_out, x, networks.preset, networks.inception.sha256)
    described = {network: networks.describe(network) for network in extractors}
    results: dict[str, dict] = {}
    for name, part in used.items():
        metric = OF_PICTURES[name]
        target = part.moments[metric.features] if isinstance(part, Stats) else y.get(metric.features)
        features = Features(x[metric.features], target if part else None, images, networks, seed, pictures)
        common = {"n": images.count, "images": images.name, "what": metric.what}
        common |= {"dimensions": x[metric.features].shape[1], **described[network_of(metric.features)]}
        common |= _describe_reference(part) if part else {}
        common |= {"images_refused": images.refused} if images.refused else {}
        # what a metric says of one of its numbers, such as its own n, wins
        results |= {key: own | common | own for key, own in metric.measure(name, features).items()}
    return results


def _describe_reference(used: PictureSet | Stats) -> dict:
    """The part of the reference that a metric reads, as JSON values."""
    found = {"reference": used.name, "n_reference": used.count}
    if isinstance(used, Stats):
        made = {"reference_preset": used.preset, "reference_weights_sha256": used.weights_sha256}
        return found | {"reference_by": "statistics"} | made
    refused = {"reference_refused": used.refused} if used.refused else {}
    return found | {"reference_by": "pictures"} | refused


def table(results: dict[str, dict]) -> str:
    """The entries as lines of text."""
    width = max(26, *(len(name) + 2 for name in results))
    lines = [f"{'':{width}}{'value':>11}   {'95 %':24}{'N':>7} {'reference':>9}  features"]
    for name, entry in results.items():
        interval = entry["interval"]
        shown = "" if interval is None else f"{interval[0]:.4g} .. {interval[1]:.4g}"
        count = entry.get("n_reference", "-")
        against = f"{'unknown' if count is None else count:>9}  {entry['features']}"
        lines.append(f"{name:{width}}{entry['value']:>11.4f}   {shown:24}{entry['n']:>7} {against}")
    return "\n".join(lines + _notes(results))


def _notes(results: dict[str, dict]) -> list[str]:
    """Lines naming the numbers by a reference's statistics and by its pictures; none without statistics."""
    by_statistics, by_pictures = (
        [name for name, entry in results.items() if entry.get("reference_by") == kind]
        for kind in ("statistics", "pictures")
    )
    if not by_statistics:
        return []
    entry = results[by_statistics[0]]
    line = f"{', '.join(by_statistics)}: by the mean and covariance that {entry['reference']} holds"
    if entry["reference_weights_sha256"] is None:
        line += "; their Inception and preset are not recorded"
    pictures = f"{', '.join(by_pictures)}: by the pictures of {entry['reference']}"
    return [line, pictures] if by_pictures else [line]
