"""Arrays in npz files, read by their headers; a header may lie, so nothing is allocated by it."""

import contextlib
import zipfile

import numpy as np

from dalle2_jax.data import transforms


@contextlib.contextmanager
def open_array(path: str, name: str):
    """(open file at the numbers, shape, whether in Fortran order, dtype) of an array in an npz.

    Raises ValueError for a file without this array.
    """
    try:
        archive = zipfile.ZipFile(path)
        file = archive.open(f"{name}.npy")
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0
        reader = reader if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(file)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} has no array {name}: {error}") from None
    with archive, file:
        yield file, shape, fortran, dtype


@contextlib.contextmanager
def open_pictures(path: str):
    """(open file at the pixels, shape) of `arr_0` uint8 [N, H, W, 3] in an npz; ValueError for another."""
    with open_array(path, "arr_0") as (file, shape, fortran, dtype):
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran or 0 in shape:
            raise ValueError(f"arr_0 of {path} must be uint8 [N, H, W, 3], not {dtype} {list(shape)}")
        if shape[1] * shape[2] > transforms.MAX_PIXELS:
            raise ValueError(f"pictures of {path} are {shape[2]} x {shape[1]}, above {transforms.MAX_PIXELS}")
        yield file, shape
