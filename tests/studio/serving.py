"""A studio served on a free port of this machine, for tests."""

import contextlib
import os
import socket
import threading
import time


@contextlib.contextmanager
def served(model_dir=None, most=8):
    """(url, Studio) of a server that draws with the bundled model, or another."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from dalle2_jax.studio import server, work

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    studio = work.Studio([model_dir], most)
    studio.warm()
    running = server.serve(studio, "127.0.0.1", port)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not running.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{port}", studio
    finally:
        running.should_exit = True
        thread.join(20)
