"""Whether JAX compiles or reads the cache, by its own events: a note when it compiles, the seconds of it.

A program that the cache holds is traced and read, not compiled; one of `programs` is only read.
"""

import threading
from collections.abc import Callable

import jax

NOTE_AFTER = 2.0  # seconds; reading a program from the cache takes less
REQUEST = "/jax/compilation_cache/compile_requests_use_cache"
COMPILED = "/jax/core/compile/backend_compile_duration"  # or read from the cache
READ = "/jax/compilation_cache/cache_retrieval_time_sec"
TRACED = "/jax/core/compile/jaxpr_trace_duration"


class Watch:
    """Counts the seconds of the compiler, and of tracing, in this process from now on.

    Args:
      say: called once, with a line, when a program is compiled for longer than NOTE_AFTER.
    """

    def __init__(self, say: Callable[[str], None] = lambda line: None):
        self.seconds, self.traced, self._say, self._lock = 0.0, 0.0, say, threading.Lock()
        self._waiting: dict[int, threading.Timer] = {}  # by thread
        jax.monitoring.register_event_listener(self._began)
        jax.monitoring.register_event_duration_secs_listener(self._ended)

    def close(self) -> None:
        """Stops counting."""
        jax.monitoring.unregister_event_listener(self._began)
        jax.monitoring.unregister_event_duration_listener(self._ended)
        for timer in self._waiting.values():
            timer.cancel()

    @property
    def work(self) -> str:
        """'compiling (once)', or 'reading compiled programs', those of an earlier run."""
        return "compiling (once)" if self.seconds >= 0.1 else "reading compiled programs"

    def _began(self, event: str, **_) -> None:
        if event == REQUEST:
            timer = self._waiting[threading.get_ident()] = threading.Timer(NOTE_AFTER, self._note)
            timer.daemon = True
            timer.start()

    def _ended(self, event: str, duration_secs: float, **_) -> None:
        if event == READ:
            duration_secs = -duration_secs
        elif event == COMPILED and (timer := self._waiting.pop(threading.get_ident(), None)):
            timer.cancel()
        with self._lock:
            self.seconds += duration_secs if event in (READ, COMPILED) else 0
            self.traced += duration_secs if event == TRACED else 0  # nested ones count twice

    def _note(self) -> None:
        with self._lock:
            say, self._say = self._say, lambda line: None
        folder = jax.config.values.get("jax_compilation_cache_dir")
        say("compiling" + (f" (once: later runs read the programs from {folder})" if folder else ""))
