"""Latents of pictures, kept in a file, and the great circles between them."""

import dataclasses
import os

import numpy as np
from etils import epath

from dalle2_jax.runtime import files


@dataclasses.dataclass(frozen=True)
class Latents:
    """Pictures as latents.

    Attributes:
      image_embeds: [N, E] float32 of unit norm.
      x_T: [N, h, w, 3] float32, of the decoder's size.
      num_steps: of the inversion; drawing takes as many. captions: what it was conditioned on, or None.
    """

    image_embeds: np.ndarray
    x_T: np.ndarray
    num_steps: int
    captions: tuple[str, ...] | None = None

    def save(self, path: str | os.PathLike) -> None:
        """Write one .npz file, without pickle."""
        captions = np.array(self.captions or (), dtype=str)
        with epath.Path(files.expand(path)).open("wb") as file:
            np.savez(file, **vars(self) | {"captions": captions})

    @staticmethod
    def load(path: str | os.PathLike) -> "Latents":
        """Read what `save` wrote; ValueError for another file."""
        try:
            place = epath.Path(files.expand(path))
            with place.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return Latents(
                    stored["image_embeds"],
                    stored["x_T"],
                    int(stored["num_steps"]),
                    tuple(stored["captions"].tolist()) or None,
                )
        except (ValueError, KeyError, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"{path} holds no latents, such as `edit invert` writes: {error}") from error


def slerp(a: np.ndarray, b: np.ndarray, theta: float) -> np.ndarray:
    """From `a` (theta 0) to `b` (theta 1) along the great circle, both of any one shape; float32.

    sin((1 - theta) w) / sin(w) a + sin(theta w) / sin(w) b, with w the angle between them (Shoemake 1985);
    a straight line where they point the same way. Raises ValueError where they point in opposite ways.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"cannot go from shape {a.shape} to {b.shape}")
    cosine = np.vdot(a, b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12)
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.pi - angle < 1e-4:
        raise ValueError("opposite vectors have no one way between them")
    if angle < 1e-4:
        return ((1 - theta) * a + theta * b).astype(np.float32)
    return ((np.sin((1 - theta) * angle) * a + np.sin(theta * angle) * b) / np.sin(angle)).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    """Vectors [..., E] scaled to norm 1."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
