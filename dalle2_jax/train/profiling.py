"""A profile of some steps of a run, for TensorBoard and xprof."""

import jax
from etils import epath


class Profile:
    """Records `profile_steps` steps of a run into WORKDIR/profile, from step `profile_at` on; 0: none.

    It is a context, which also ends a profile that an error or a signal cuts short.
    """

    def __init__(self, workdir: epath.Path, config: dict):
        self._folder, self._first = str(workdir / "profile"), config["profile_at"]
        self._last = min(self._first + config["profile_steps"] - 1, config["num_steps"])
        self._active = False

    def begin(self, step: int) -> None:
        """Called before each step."""
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._active = True

    def end(self, step: int, scalars: dict) -> None:
        """Called after each step, with its scalars."""
        if self._active and step >= self._last:
            jax.block_until_ready(scalars)
            self.close()

    def close(self) -> None:
        """Ends a profile that is being recorded."""
        if self._active:
            self._active = False
            jax.profiler.stop_trace()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
