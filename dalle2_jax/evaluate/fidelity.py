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


def by_statistics(name: str, reference: PictureSet | Stats | None) -> bool:
    """Whether a metric uses the mean and covariance of the reference instead of its pictures."""
    metric = OF_PICTURES[name]
    return isinstance(reference, Stats) and metric.statistics and metric.features in reference.moments


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
        _check_networks(name, networks)
        metric = OF_PICTURES[name]
        if metric.reference and reference is None:
            raise ValueError(f"{name} needs pictures to compare with: give --reference")
        if metric.captions:
            images.captions()
        against = _compared(name, reference, networks.preset) if metric.reference else None
        counts = (images.count, against.count) if metric.reference else (images.count,)
        fewest = min(count for count in counts if count is not None)
        reason = metric.refuse(name, fewest, images.count)
        if reason or fewest < 2:
            raise ValueError(reason or f"{name} needs more than {fewest} pictures")


def _check_networks(name: str, networks: Networks) -> None:
    """Raise ValueError for a metric of Inception without its weights, or of an absent aesthetic head."""
    metric = OF_PICTURES[name]
    if metric.features != "clip" and networks.inception is None:
        other = f", or measure {', '.join(WITH_CLIP)} with a CLIP" if networks.clip is not None else ""
        raise ValueError(
            f"{name} needs Inception's weights: give --inception=FILE (see docs/evaluation.md){other}"
        )
    if metric.head and networks.head is None:
        raise ValueError(f"{name} needs the weights of its head: give --aesthetic=FILE")


def _compared(name: str, reference: PictureSet | Stats, preset: str) -> PictureSet | Stats:
    """What a metric uses of the reference: its statistics or its pictures. Raises ValueError for neither."""
    if by_statistics(name, reference):
        _check_statistics(name, reference, preset)
        return reference
    pictures = pictures_of(reference)
    if pictures is None and OF_PICTURES[name].statistics:
        raise ValueError(f"{reference.name} has no mu_s and sigma_s, which {name} needs")
    if pictures is None:
        raise ValueError(f"{name} needs the pictures of the reference, {reference.name} has statistics alone")
    return pictures


def _check_statistics(name: str, reference: Stats, preset: str) -> None:
    """Raise ValueError for statistics of another preset or of too few pictures."""
    if reference.preset not in (None, preset):
        raise ValueError(f"{reference.name} is of preset {reference.preset!r}, not {preset!r}")
    if name in ("fid", "sfid") and reference.count is None:
        features = OF_PICTURES[name].features
        rank, full = reference.rank(features), len(reference.moments[features].mean)
        if rank < min(full, frechet.FID_PICTURES - 1):
            raise ValueError(
                f"{reference.name} does not say how many pictures it is of, and its covariance of "
                f"rank {rank} is that of {rank + 1}: {name} needs {frechet.FID_PICTURES}; measure fid_small"
            )


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
    if any(by_statistics(name, reference) for name in names):
        if reference.weights_sha256 not in (None, networks.inception.sha256):
            raise ValueError(f"{reference.name} was made with other weights than those of --inception")
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
    compared = [name for name in names if OF_PICTURES[name].reference and not by_statistics(name, reference)]
    missing = {OF_PICTURES[name].features for name in compared} - y.keys()
    y |= features_of(pictures_of(reference), missing) if missing else {}
    if stats_out and processes.is_first():
        write_stats(stats_out, x, networks.preset, networks.inception.sha256)
    described = {network: networks.describe(network) for network in extractors}
    results = {}
    for name in names:
        metric = OF_PICTURES[name]
        target = y.get(metric.features) if metric.reference else None
        if by_statistics(name, reference):
            target = reference.moments[metric.features]
        common = {"n": images.count, "images": images.name, "what": metric.what}
        common |= {"dimensions": x[metric.features].shape[1], **described[network_of(metric.features)]}
        common |= _describe_reference(name, reference) if metric.reference else {}
        common |= {"images_refused": images.refused} if images.refused else {}
        features = Features(x[metric.features], target, images, networks, seed)
        results |= {key: found | common for key, found in metric.measure(name, features).items()}
    return results


def _describe_reference(name: str, reference: PictureSet | Stats) -> dict:
    """The reference of a metric, and whether it uses its 'statistics' or its 'pictures'; JSON values."""
    if by_statistics(name, reference):
        return {
            "reference": reference.name,
            "reference_by": "statistics",
            "n_reference": reference.count,
            "reference_preset": reference.preset,
            "reference_weights_sha256": reference.weights_sha256,
        }
    pictures = pictures_of(reference)
    found = {"reference": pictures.name, "reference_by": "pictures", "n_reference": pictures.count}
    return found | ({"reference_refused": pictures.refused} if pictures.refused else {})


def table(results: dict[str, dict]) -> str:
    """The entries as lines of text."""
    lines = [f"{'':26}{'value':>11}   {'95 %':24}{'N':>7} {'reference':>9}  features"]
    for name, entry in results.items():
        interval = entry["interval"]
        shown = "" if interval is None else f"{interval[0]:.4g} .. {interval[1]:.4g}"
        if "n_reference" in entry:
            against = "unknown" if entry["n_reference"] is None else str(entry["n_reference"])
        else:
            against = "-"
        lines.append(
            f"{name:26}{entry['value']:>11.4f}   {shown:24}{entry['n']:>7} {against:>9}  {entry['features']}"
        )
    return "\n".join(lines + _notes(results))


def _notes(results: dict[str, dict]) -> list[str]:
    """Lines naming the numbers by a reference's statistics and by its pictures; none without statistics."""
    by = {"statistics": [], "pictures": []}
    for name, entry in results.items():
        if "reference_by" in entry:
            by[entry["reference_by"]].append(name)
    if not by["statistics"]:
        return []
    entry = results[by["statistics"][0]]
    line = f"{', '.join(by['statistics'])}: by the mean and covariance that {entry['reference']} holds"
    if entry["reference_weights_sha256"] is None:
        line += "; it does not say with which Inception and preset they were made"
    if not by["pictures"]:
        return [line]
    return [line, f"{', '.join(by['pictures'])}: by the pictures of {entry['reference']}"]
