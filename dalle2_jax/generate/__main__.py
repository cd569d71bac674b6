"""python -m dalle2_jax.generate [--model=DIR] "caption" ["caption" ...] [--n=4 --seed=0 --out=outputs ...]

Draws captions with a model directory, or with the small model that comes with the package; a model that reads
no captions draws without. --out gets every picture as PNG (with the settings inside), a labelled grid.png,
and generate.json with the model, the settings and the times.
"""

import time

from absl import app, flags, logging
from etils import epath

from dalle2_jax.data import shards
from dalle2_jax.generate import output
from dalle2_jax.generate.captions import check_captions
from dalle2_jax.generate.flags import define_sampling_flags, sampling_settings
from dalle2_jax.generate.pipeline import Pipeline
from dalle2_jax.runtime import commandline, partition, processes

FLAGS = flags.FLAGS


def main(argv):
    """Run the command; `argv` without the flags."""
    captions = [shards.clean_caption(text) for text in argv[1:]]
    with processes.fail_together(debug=FLAGS.debug):
        if captions:
            check_captions(captions)
        settings = sampling_settings()
        partition.initialise()
        processes.join()
        began = time.monotonic()
        model = Pipeline.load(FLAGS.model, dtype=FLAGS.dtype, low_memory=FLAGS.low_memory)
        model.steps("draw")  # raises before any file is written
        if not captions and model.reads_captions:
            check_captions(captions)
        for line in model.cut_captions(captions) if captions else ():
            output.note(line)
        out = epath.Path(FLAGS.out)
        out.mkdir(parents=True, exist_ok=True)  # now, not after an hour of drawing
        settings |= dict(seed=FLAGS.seed, n=FLAGS.n, batch_size=FLAGS.batch_size)
        result = model.text_to_image(captions, **settings, progress=output.StageLines())
        if not processes.is_first():
            return
        count = len(output.write_pictures(out, result, model.name))
        compiling = sum(timing.compile_seconds for timing in result.timings.values())
        sampling = sum(timing.seconds for timing in result.timings.values())
        print(
            f"{count} picture{'s' * (count > 1)} of {model.image_size} x {model.image_size} in "
            f"{time.monotonic() - began:.1f} s (compiling {compiling:.1f} s, {sampling / count:.2f} s a "
            f"picture): {out / 'grid.png'}"
        )


if __name__ == "__main__":
    define_sampling_flags()
    commandline.DEFINE_path("out", "outputs", "Where pictures, grid.png and generate.json go.")
    flags.DEFINE_integer("n", 1, "Pictures a caption.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed; the same seed and caption give the same picture.")
    logging.set_verbosity(logging.WARNING)  # not every backend that JAX looks for in vain
    app.run(main)
