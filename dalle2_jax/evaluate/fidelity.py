"""How near pictures are to a reference, and to their captions: one pass over the pictures, many numbers.

Features of Inception (FID, sFID, KID, inception score, precision and recall, FID extrapolated) need the
user's weights; those of a model's own CLIP are always there, and what is measured with them is named so:
`clip_frechet` is no FID, `clip_mmd` is CMMD only in its formula. Each number is an entry

    {value, standard_error, interval, n, n_reference, features, dimensions, preset, resize, weights_sha256}

with a 95 % interval: value +- 1.96 standard errors as `distances` has them, or Wilson's for a share.
"""

import dataclasses
import functools
import math
import os
import zipfile
from collections.abc import Callable, Sequence

import numpy as np

from dalle2_jax import pipeline
from dalle2_jax.convert import inception_weights
from dalle2_jax.data import scenes
from dalle2_jax.evaluate import aesthetic, clip_scores, distances, inception
from dalle2_jax.evaluate.distances import Moments
from dalle2_jax.evaluate.features import BATCH_SIZE, clip_extractor, extract, inception_extractor
from dalle2_jax.evaluate.picture_sets import PictureSet, array_of_npz, open_pictures
from dalle2_jax.evaluate.presets import PRESETS
from dalle2_jax.evaluate.scene_scores import wilson
from dalle2_jax.runtime import files, processes

FID_PICTURES = 2048  # below, a covariance of 2048 features is singular
KID_SUBSET = 1000
SPLITS = 10  # of the inception score
NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5


@dataclasses.dataclass(frozen=True)
class Metric:
    """features: what it reads. reference, captions: whether it needs them. what: in words."""

    features: str
    what: str
    reference: bool = True
    captions: bool = False


METRICS = {
    "fid": Metric("pool", "Frechet distance of Inception's features"),
    "fid_small": Metric("pool", "the same of too few pictures to be called FID"),
    "sfid": Metric("spatial", "Frechet distance of 17 x 17 x 7 positions of Inception's Mixed_6d"),
    "kid": Metric("pool", "unbiased MMD^2 of Inception's features, cubic kernel, mean over subsets"),
    "fid_infinity": Metric("pool", "FID extrapolated to infinitely many generated pictures"),
    "precision_recall": Metric("pool", "neighbours of Inception's features; density and coverage too"),
    "inception_score": Metric("logits_unbiased", "of Inception's labels, 10 splits", reference=False),
    "clip_frechet": Metric("clip", "Frechet distance of the model's own CLIP embeddings"),
    "clip_mmd": Metric("clip", "1000 times the biased MMD^2 of the model's own CLIP embeddings, sigma 10"),
    "clip_precision_recall": Metric("clip", "neighbours of the model's own CLIP embeddings"),
    "clip_score": Metric("clip", "cosine of CLIP embeddings of picture and caption", False, True),
    "clip_r_precision": Metric("clip", "own caption the nearest of 100, by CLIP", False, True),
    "aesthetic": Metric("clip", "LAION's head on CLIP's image embeddings, mean", False),
}
FRECHET = ("fid", "fid_small", "sfid", "fid_infinity")  # that mean and covariance of a reference suffice for
DIMENSIONS = {"pool": 2048, "spatial": 17 * 17 * 7}
WITH_INCEPTION = ("fid", "kid", "precision_recall")
WITH_CLIP = ("clip_frechet", "clip_mmd", "clip_precision_recall")


def frechet_name(with_inception: bool, *counts: int | None) -> str:
    """The metric that is the Frechet distance of sets of so many pictures, by Inception or by CLIP."""
    if not with_inception:
        return "clip_frechet"
    return "fid" if min(n for n in counts if n is not None) >= FID_PICTURES else "fid_small"


@dataclasses.dataclass(frozen=True)
class Stats:
    """A reference of which means and covariances are known: features -> Moments; count None: unknown.

    pictures: that the file also holds, as ADM's do; perhaps fewer than those of the statistics.
    """

    name: str
    moments: dict[str, Moments]
    count: int | None
    preset: str | None = None
    weights_sha256: str | None = None
    pictures: PictureSet | None = None

    def said(self) -> str:
        """In a line, what there is."""
        of = "" if self.count is None else f" of {self.count} pictures"
        parts = [f"mean and covariance of {len(known.mean)} features{of}" for known in self.moments.values()]
        return (
            f"{self.name}: "
            + ", ".join(parts)
            + (f"; {self.pictures.count} pictures" if self.pictures else "; no pictures")
        )

    def summary(self) -> dict:
        """The same as JSON values."""
        return {
            "name": self.name,
            "kind": "statistics",
            "pictures": self.pictures.count if self.pictures else 0,
            "statistics": {name: len(known.mean) for name, known in self.moments.items()},
            "statistics_of": self.count,
            "preset": self.preset,
            "weights_sha256": self.weights_sha256,
        }

    def rank(self, features: str) -> int:
        """That of the covariance of these features; of fewer pictures than entries it is their number - 1."""
        values = np.linalg.eigvalsh(self.moments[features].scatter)
        return int((values > values[-1] * len(values) * np.finfo(np.float32).eps).sum())


def open_reference(path: str | os.PathLike, progress=None) -> PictureSet | Stats:
    """What is at `path` to compare with: statistics, pictures, or an npz of both; see `open_pictures`."""
    return read_stats(path) or open_pictures(path, progress)


def read_stats(path: str | os.PathLike) -> Stats | None:
    """The statistics in an npz of pytorch-fid, clean-fid, guided-diffusion or `write_stats`; None for others.

    They are mu, sigma of the pool features, and mu_s, sigma_s of the spatial ones. Pictures in `arr_0` come
    with them. Raises ValueError for statistics of other features than these, or that are not finite.
    """
    path = files.expand(path)
    if not (path.endswith(".npz") and os.path.isfile(path)):
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            if "mu" not in stored.files:
                return None
            count = int(stored["n"]) if "n" in stored.files else None
            names = ("preset", "weights_sha256")
            known = {name: str(stored[name]) for name in names if name in stored.files}
            found = {}
            for features, suffix in (("pool", ""), ("spatial", "_s")):
                if f"mu{suffix}" in stored.files:
                    found[features] = _moments(stored, features, suffix, count)
            pictured = "arr_0" in stored.files
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} does not hold statistics that can be used: {error}") from None
    pictures = open_pictures(path) if pictured else None
    return Stats(os.path.basename(path), found, count, **known, pictures=pictures)


def _moments(stored, features: str, suffix: str, count: int | None) -> Moments:
    """Of the arrays mu and sigma with this suffix. Raises ValueError or KeyError for what they cannot be."""
    entries = DIMENSIONS[features]
    for name, shape in ((f"mu{suffix}", (entries,)), (f"sigma{suffix}", (entries, entries))):
        with array_of_npz(stored.zip.filename, name) as (_, known, _, kind):  # by the header: nothing is read
            if known != shape or kind.kind != "f":
                raise ValueError(
                    f"{name} is {kind} {list(known)}, that of Inception's {features} features is float "
                    f"{list(shape)}"
                )
    mean = np.asarray(stored[f"mu{suffix}"], np.float64)
    cov = np.asarray(stored[f"sigma{suffix}"], np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"mu{suffix} or sigma{suffix} holds numbers that are not finite")
    if np.abs(cov - cov.T).max() > 1e-3 * np.abs(cov).max() or (np.diagonal(cov) < 0).any():
        raise ValueError(f"sigma{suffix} is no covariance: not symmetric, or negative on its diagonal")
    rows = count or 2  # where it is unknown, only mean and cov are used
    return Moments(rows, mean, cov * (rows - 1))


def by_statistics(name: str, reference: PictureSet | Stats | None) -> bool:
    """Whether a metric is measured against the mean and covariance that come with the reference."""
    return isinstance(reference, Stats) and name in FRECHET and METRICS[name].features in reference.moments


def pictures_of(reference: PictureSet | Stats | None) -> PictureSet | None:
    """The pictures of a reference, as far as there are any."""
    return reference.pictures if isinstance(reference, Stats) else reference


def write_stats(path: str | os.PathLike, features: dict[str, np.ndarray], preset: str, sha256: str) -> None:
    """Write what `read_stats` and pytorch-fid read, of the features of a set."""
    arrays = {"preset": np.array(preset), "weights_sha256": np.array(sha256)}
    for name, suffix in (("pool", ""), ("spatial", "_s")):
        if name in features:
            moments = Moments.of(features[name])
            arrays |= {
                f"mu{suffix}": moments.mean,
                f"sigma{suffix}": moments.cov,
                "n": np.array(moments.count),
            }
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def check(
    metrics: Sequence[str],
    images: PictureSet,
    reference: PictureSet | Stats | None,
    *,
    preset: str,
    with_inception: bool,
    with_head: bool = False,
    with_clip: bool = True,
) -> None:
    """Raise ValueError, with one sentence, for what cannot be measured; nothing is read for that."""
    scenes.check_choice(preset, tuple(PRESETS), "preset")
    for name in metrics:
        scenes.check_choice(name, tuple(METRICS), "metric of pictures")
    of_clip = [name for name in metrics if METRICS[name].features == "clip"]
    if of_clip and not with_clip:
        raise ValueError(
            f"{', '.join(of_clip)} need{'s' * (len(of_clip) == 1)} a CLIP, and the model has none: give a "
            f"--model with one, or measure {', '.join(WITH_INCEPTION)} with --inception=FILE"
        )
    for name in metrics:
        metric = METRICS[name]
        if metric.features != "clip" and not with_inception:
            other = f", or measure {', '.join(WITH_CLIP)} with the model's own CLIP" if with_clip else ""
            raise ValueError(
                f"{name} needs Inception's weights: give --inception=FILE (see docs/evaluation.md){other}"
            )
        if name == "aesthetic" and not with_head:
            raise ValueError("aesthetic needs the weights of its head: give --aesthetic=FILE")
        if metric.reference and reference is None:
            raise ValueError(f"{name} needs pictures to compare with: give --reference")
        if metric.captions:
            images.captions()
        target = reference
        if metric.reference and by_statistics(name, reference):
            _check_statistics(name, reference, preset)
        elif metric.reference and isinstance(reference, Stats):
            target = reference.pictures
            if target is None and name in FRECHET:
                raise ValueError(f"{reference.name} has no mu_s and sigma_s, which {name} needs")
            if target is None:
                raise ValueError(
                    f"{name} needs the pictures of the reference, {reference.name} has statistics alone"
                )
        counts = [images.count, target.count] if metric.reference else [images.count]
        fewest = min(count for count in counts if count is not None)
        if name in ("fid", "sfid") and fewest < FID_PICTURES:
            raise ValueError(
                f"{name} of {fewest} pictures would not be FID: of fewer than {FID_PICTURES} the covariance "
                "is singular and the number says how few they are; give more, or measure fid_small or kid"
            )
        if name == "kid" and fewest < KID_SUBSET:
            raise ValueError(f"kid is a mean over subsets of {KID_SUBSET} pictures, there are {fewest}")
        if name == "fid_infinity" and images.count // 10 < FID_PICTURES + 1:
            raise ValueError(
                f"fid_infinity needs more than {10 * FID_PICTURES} pictures, there are {images.count}"
            )
        if "precision_recall" in name and fewest <= DENSITY_NEIGHBOURS or fewest < 2:
            raise ValueError(f"{name} needs more than {fewest} pictures")


def _check_statistics(name: str, reference: Stats, preset: str) -> None:
    """Raise ValueError for statistics of another preset, and for those of too few pictures."""
    if reference.preset not in (None, preset):
        raise ValueError(f"{reference.name} is of preset {reference.preset!r}, not {preset!r}")
    if name in ("fid", "sfid") and reference.count is None:
        features = METRICS[name].features
        rank, full = reference.rank(features), len(reference.moments[features].mean)
        if rank < min(full, FID_PICTURES - 1):
            raise ValueError(
                f"{reference.name} does not say how many pictures it is of, and its covariance of "
                f"rank {rank} is that of {rank + 1}: {name} needs {FID_PICTURES}; measure fid_small"
            )


def measure(
    images: PictureSet,
    reference: PictureSet | Stats | None,
    metrics: Sequence[str],
    *,
    weights: inception_weights.Weights | None = None,
    model: pipeline.UnCLIP | None = None,
    preset: str = "ttur",
    batch_size: int | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    stats_out: str | os.PathLike | None = None,
    aesthetic_head: tuple | None = None,
    known: dict[str, np.ndarray] | None = None,
) -> dict[str, dict]:
    """Entries by name, as the module says, of `metrics` (names in METRICS).

    Args:
      weights: of Inception, for metrics that read it. model: whose CLIP the others read.
      preset: one of `presets.PRESETS`; CLIP's metrics have their own way with pictures.
      seed: of the captions that R-precision looks among, and of the subsets of fid_infinity.
      progress: called with the name of a set, pictures done, pictures in all.
      aesthetic_head: what `aesthetic.load` gave, for 'aesthetic'.
      known: features of the reference by name. What is there is not computed; what was computed is put in.
      stats_out: an npz for the mean and covariance of the images' Inception features, written by process 0.

    Raises ValueError, before anything is read, for what cannot be measured.
    """
    given = dict(with_inception=weights is not None, with_head=aesthetic_head is not None)
    given["with_clip"] = model is not None and "clip" in model.engine.stages
    check(metrics, images, reference, preset=preset, **given)
    if any(by_statistics(name, reference) for name in metrics):
        if reference.weights_sha256 not in (None, weights.sha256):
            raise ValueError(f"{reference.name} was made with other weights than those of --inception")
    wanted = {METRICS[name].features for name in metrics}
    if stats_out:
        if weights is None:
            raise ValueError("statistics are of Inception's features: give --inception=FILE")
        wanted |= {"pool", "spatial"}
    size = batch_size or BATCH_SIZE
    extractors = {}
    if wanted - {"clip"}:
        extractors["inception"] = inception_extractor(weights, preset, size)
    if "clip" in wanted:
        extractors["clip"] = clip_extractor(model, size)

    def features_of(pictures: PictureSet, names: set[str]) -> dict[str, np.ndarray]:
        needed = [extractors[family] for family in sorted({_family(name) for name in names})]
        told = None if progress is None else functools.partial(progress, pictures.name)
        return extract(pictures, needed, names, size, told)

    x = features_of(images, wanted)
    y = {} if known is None else known
    against = [name for name in metrics if METRICS[name].reference and not by_statistics(name, reference)]
    missing = {METRICS[name].features for name in against} - y.keys()
    y |= features_of(pictures_of(reference), missing) if missing else {}
    if stats_out and processes.is_first():
        write_stats(stats_out, x, preset, weights.sha256)
    said = {"inception": weights and _said_of_inception(weights, preset)}
    said["clip"] = _said_of_clip(model) if "clip" in wanted else None
    results = {}
    for name in metrics:
        features = METRICS[name].features
        common = {"what": METRICS[name].what, "dimensions": x[features].shape[1], **said[_family(features)]}
        target = y.get(features)
        if METRICS[name].reference:
            common |= _said_of_reference(name, reference)
            target = reference.moments[features] if by_statistics(name, reference) else target
        if images.refused:
            common["images_refused"] = images.refused
        for key, entry in _numbers(
            name, x[features], target, images, model, aesthetic_head, seed, size
        ).items():
            results[key] = entry | {"n": images.count, "images": images.name} | common
    return results


def _family(features: str) -> str:
    """Which network gives these features."""
    return "clip" if features == "clip" else "inception"


def _said_of_reference(name: str, reference: PictureSet | Stats) -> dict:
    """Of what a metric's reference is, and what it is measured by: 'statistics' or 'pictures'."""
    if by_statistics(name, reference):
        return {
            "reference": reference.name,
            "reference_by": "statistics",
            "n_reference": reference.count,
            "reference_preset": reference.preset,
            "reference_weights_sha256": reference.weights_sha256,
        }
    pictures = pictures_of(reference)
    said = {"reference": pictures.name, "reference_by": "pictures", "n_reference": pictures.count}
    return said | ({"reference_refused": pictures.refused} if pictures.refused else {})


def _said_of_inception(weights: inception_weights.Weights, preset: str) -> dict:
    chosen = PRESETS[preset]
    return {
        "features": inception_weights.NETWORK,
        "preset": preset,
        "resize": f"{chosen.what}; then {inception.RULES[chosen.rule].what} to 299 x 299",
        "weights_sha256": weights.sha256,
        "source_sha256": weights.source_sha256,
    }


def _said_of_clip(model: pipeline.UnCLIP) -> dict:
    size = model.engine.stage("clip").image_size
    return {
        "features": f"CLIP of the model {model.name}",
        "resize": f"shorter side bicubic to {size}, central square",
        "weights_sha256": model.engine.weights_sha256("clip"),
    }


def _entry(value: float, error: float | None, at_least: float = -math.inf, **more) -> dict:
    value, error = float(value), None if error is None else float(error)
    interval = None if error is None else [max(at_least, value - 1.96 * error), value + 1.96 * error]
    return {"value": value, "standard_error": error, "interval": interval} | more


def _share(value: float, count: int, **more) -> dict:
    interval = list(wilson(round(value * count), count))
    return {"value": value, "standard_error": None, "interval": interval, "share": True} | more


def _numbers(name, x, target, images, model, head, seed, batch_size) -> dict[str, dict]:
    """The entries of one metric of features x, of the target's features or Moments."""
    if name in ("fid", "fid_small", "sfid", "clip_frechet"):
        if isinstance(target, Moments):
            return {name: _entry(distances.frechet_distance(Moments.of(x), target), None)}
        return {name: _entry(*distances.frechet_with_error(x, target), at_least=0.0)}
    if name == "fid_infinity":
        known = target if isinstance(target, Moments) else Moments.of(target)
        value, error_of_fit = distances.frechet_infinity(x, known, seed=seed)
        if isinstance(target, Moments):
            return {name: _entry(value, None, error_of_fit=error_of_fit)}
        error = math.hypot(error_of_fit, distances.frechet_with_error(x, target)[1])
        return {name: _entry(value, error, error_of_fit=error_of_fit)}
    if name == "kid":
        value, spread, error = distances.kid(x, target, subset_size=KID_SUBSET)
        return {name: _entry(value, error, spread_of_subsets=spread, subset_size=KID_SUBSET)}
    if name == "clip_mmd":
        return {name: _entry(*distances.cmmd(x, target), at_least=0.0)}
    if name == "inception_score":
        value, spread = distances.inception_score(x, SPLITS)
        error = spread / math.sqrt(SPLITS - 1)  # of the mean; spread is divided by their number
        return {name: _entry(value, error, at_least=1.0, spread_of_splits=spread)}
    if name in ("precision_recall", "clip_precision_recall"):
        prefix = name.removesuffix("precision_recall")
        near = distances.neighbourhoods(x, target, NEIGHBOURS)
        wide = distances.neighbourhoods(x, target, DENSITY_NEIGHBOURS)
        return {
            f"{prefix}precision": _share(near["precision"], len(x), neighbours=NEIGHBOURS),
            f"{prefix}recall": _share(near["recall"], len(target), neighbours=NEIGHBOURS),
            f"{prefix}density": _entry(
                wide["density"], wide["density_error"], at_least=0.0, neighbours=DENSITY_NEIGHBOURS
            ),
            f"{prefix}coverage": _share(wide["coverage"], len(target), neighbours=DENSITY_NEIGHBOURS),
        }
    if name == "aesthetic":
        scores = aesthetic.score(x, *head[:2])
        return {name: _entry(scores.mean(), scores.std(ddof=1) / np.sqrt(len(x)), head_sha256=head[2])}
    captions = images.captions()
    (texts, _), _ = model.encode_text(captions, batch_size)
    if name == "clip_r_precision":
        candidates = min(100, len(set(captions)))
        right, count = clip_scores.r_precision(x, texts, captions, candidates, seed)
        return {name: _share(right / count, count, candidates=candidates)}
    (prefixed, _), _ = model.encode_text([clip_scores.PREFIX + caption for caption in captions], batch_size)
    found = {}
    for convention in clip_scores.CONVENTIONS:
        cosine = clip_scores.cosines(x, prefixed if convention == "hessel" else texts)
        value, error = clip_scores.clip_score(cosine, convention)
        least = -1.0 if convention == "raw" else 0.0
        found[f"clip_score_{convention}"] = _entry(value, error, at_least=least, convention=convention)
    return found


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
    """Lines that say which numbers are by the statistics of a reference, and which by its pictures."""
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
