"""dalle2-jax studio [--model=DIR] [--port=7860]: a page to draw with, in the browser.

Serves this machine alone, unless --host names another address; then anybody who reaches it may draw.
"""

from dalle2_jax.runtime import start

start.begin(__name__, "studio: loading JAX")


import os

from absl import app, flags, logging

from dalle2_jax.runtime import commandline, extras, partition, processes

FLAGS = flags.FLAGS


def main(argv):
    """Run the command; `argv` without the flags."""
    if argv[1:]:
        raise app.UsageError(f"too many arguments: {' '.join(argv[1:])}")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    with processes.fail_together():
        extras.check("the studio", "gradio", "uvicorn")
        from dalle2_jax.studio import server, work

        partition.initialise()
        options = dict(dtype=FLAGS.dtype, low_memory=FLAGS.low_memory)
        studio = work.Studio(FLAGS.model or [None], FLAGS.waiting, **options)
    names = ", ".join(studio.models)
    print(f"the studio, drawing with {names}: http://{FLAGS.host}:{FLAGS.port}", flush=True)
    studio.warm()
    server.serve(studio, FLAGS.host, FLAGS.port).run()


if __name__ == "__main__":
    commandline.DEFINE_multi_path(
        "model", None, "Model directory, or several of them to choose from; by default the bundled model."
    )
    flags.DEFINE_string("host", "127.0.0.1", "Address to serve; 0.0.0.0 is the whole network.")
    flags.DEFINE_integer("port", 7860, "Port to serve.", lower_bound=1, upper_bound=65535)
    flags.DEFINE_integer("waiting", 8, "Requests at work and waiting; the next is refused.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Compute type; default: as trained.")
    flags.DEFINE_bool("low_memory", False, "Weights as they are stored, those of one stage at a time.")
    logging.set_verbosity(logging.WARNING)
    start.run(main)
