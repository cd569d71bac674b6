"""Arrays of .npy files whose rows are read one by one: mapped on the disk, requested from an object store."""

import numpy as np
from numpy.lib import format as npy

from dalle2_jax.data import remote

_HEADER_BYTES = 4096  # of the first request


class RemoteRows:
    """An array of a file in an object store; a row, or a slice of rows, is one request.

    Attributes:
      shape, dtype: of the array. Raises ValueError for another kind of file, for objects and Fortran order.
    """

    def __init__(self, path: str):
        with remote.RemoteFile(path, _HEADER_BYTES) as file:
            major, _ = npy.read_magic(file)
            read = npy.read_array_header_1_0 if major == 1 else npy.read_array_header_2_0
            self.shape, fortran, self.dtype = read(file)
            self._path, self._begin = path, file.tell()
            if fortran or self.dtype.hasobject or not self.shape:
                raise ValueError("objects, or rows that are not stored one after another")
            if file.size != self._begin + self.nbytes:
                raise ValueError(f"{file.size} bytes, where the header says {self._begin + self.nbytes}")

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows: int | slice) -> np.ndarray:
        begin, end, _ = rows.indices(len(self)) if isinstance(rows, slice) else (rows, rows + 1, 1)
        size = self.nbytes // max(1, len(self))
        data = remote.read(self._path, self._begin + begin * size, (end - begin) * size)
        found = np.frombuffer(data, self.dtype).reshape(end - begin, *self.shape[1:])
        return found if isinstance(rows, slice) else found[0]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype)


def open_rows(path: str) -> np.ndarray | RemoteRows:
    """The array of a .npy file. Raises ValueError, with the reason, for another kind of file; no pickles."""
    try:
        return RemoteRows(path) if remote.is_remote(path) else np.load(path, "r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no plain array of numbers: {error}") from None
