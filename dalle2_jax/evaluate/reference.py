"""References: pictures to compare with, or mean and covariance of their Inception features in an npz.

The npz is that of pytorch-fid, clean-fid, guided-diffusion or `write_stats`: mu, sigma of the pool features
and mu_s, sigma_s of the spatial features. ADM's files also hold pictures in `arr_0`.
"""

import dataclasses
import os
import zipfile
from typing import Any

import numpy as np

from dalle2_jax.evaluate import npz
from dalle2_jax.evaluate.distances import Moments
from dalle2_jax.evaluate.picture_sets import PictureSet, open_pictures
from dalle2_jax.runtime import files

DIMENSIONS = {"pool": 2048, "spatial": 17 * 17 * 7}
SUFFIXES = {"pool": "", "spatial": "_s"}


@dataclasses.dataclass(frozen=True)
class Stats:
    """Mean and covariance of a reference.

    Attributes:
      moments: features -> Moments.
      count: number of pictures behind the moments; None: unknown.
      preset, weights_sha256: how the features were computed; None: unknown.
      pictures: the pictures of the file, perhaps others than those behind the moments.
    """

    name: str
    moments: dict[str, Moments]
    count: int | None
    preset: str | None = None
    weights_sha256: str | None = None
    pictures: PictureSet | None = None

    def describe(self) -> str:
        """The contents in a line."""
        of = "" if self.count is None else f" of {self.count} pictures"
        parts = [f"mean and covariance of {len(m.mean)} features{of}" for m in self.moments.values()]
        pictures = f"{self.pictures.count} pictures" if self.pictures else "no pictures"
        return f"{self.name}: {', '.join(parts)}; {pictures}"

    def summary(self) -> dict:
        """The contents as JSON values."""
        return {
            "name": self.name,
            "kind": "statistics",
            "pictures": self.pictures.count if self.pictures else 0,
            "statistics": {name: len(moments.mean) for name, moments in self.moments.items()},
            "statistics_of": self.count,
            "preset": self.preset,
            "weights_sha256": self.weights_sha256,
        }

    def rank(self, features: str) -> int:
        """Rank of a covariance; for fewer pictures than features it is the number of pictures - 1."""
        values = np.linalg.eigvalsh(self.moments[features].cov)
        return int((values > values[-1] * len(values) * np.finfo(np.float32).eps).sum())


def pictures_of(reference: PictureSet | Stats | None) -> PictureSet | None:
    """The pictures of a reference, or None."""
    return reference.pictures if isinstance(reference, Stats) else reference


def open_reference(path: str | os.PathLike, progress=None) -> PictureSet | Stats:
    """The statistics, the pictures, or the npz of both at `path`; see `open_pictures`."""
    return read_stats(path) or open_pictures(path, progress)


def read_stats(path: str | os.PathLike) -> Stats | None:
    """The statistics in an npz, or None for another file.

    Raises ValueError for statistics of other features than Inception's, and for numbers that are not finite.
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
            made_with = {name: str(stored[name]) for name in names if name in stored.files}
            moments = {
                features: _moments(stored, features)
                for features, suffix in SUFFIXES.items()
                if f"mu{suffix}" in stored.files
            }
            has_pictures = "arr_0" in stored.files
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} does not hold statistics that can be used: {error}") from None
    pictures = open_pictures(path) if has_pictures else None
    return Stats(os.path.basename(path), moments, count, **made_with, pictures=pictures)


def _moments(stored, features: str) -> Moments:
    """The moments in mu and sigma of these features. Raises ValueError or KeyError for impossible arrays."""
    entries, suffix = DIMENSIONS[features], SUFFIXES[features]
    for name, expected in ((f"mu{suffix}", (entries,)), (f"sigma{suffix}", (entries, entries))):
        with npz.open_array(stored.zip.filename, name) as (_, shape, _, kind):  # the header alone is read
            if shape != expected or kind.kind != "f":
                raise ValueError(
                    f"{name} is {kind} {list(shape)}, that of Inception's {features} features is float "
                    f"{list(expected)}"
                )
    mean = np.asarray(stored[f"mu{suffix}"], np.float64)
    cov = np.asarray(stored[f"sigma{suffix}"], np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"mu{suffix} or sigma{suffix} holds numbers that are not finite")
    if np.abs(cov - cov.T).max() > 1e-3 * np.abs(cov).max() or (np.diagonal(cov) < 0).any():
        raise ValueError(f"sigma{suffix} is no covariance: not symmetric, or negative on its diagonal")
    return Moments(mean, cov)


def write_stats(path: str | os.PathLike, features: dict[str, np.ndarray], preset: str, sha256: str) -> None:
    """Write an npz for `read_stats` and pytorch-fid from features [N, D] of a set."""
    arrays: dict[str, Any] = {"preset": np.array(preset), "weights_sha256": np.array(sha256)}
    for name, suffix in SUFFIXES.items():
        if name in features:
            moments, count = Moments.of(features[name]), len(features[name])
            arrays |= {f"mu{suffix}": moments.mean, f"sigma{suffix}": moments.cov, "n": np.array(count)}
    with open(path, "wb") as file:
        np.savez(file, **arrays)
