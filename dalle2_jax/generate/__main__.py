"""dalle2-jax generate [--model=DIR] "caption" ["caption" ...] [--n=4 --seed=0 --out=outputs ...]

Draws captions with a model directory, or with the small model that comes with the package; a model that reads
no captions draws without. --out gets every picture as PNG (with the settings inside), a labelled grid.png,
and generate.json with the model, the settings and the times. --again=PICTURE draws a picture of this command
again: the same one, to the bit, with the same weights, JAX and machine. Settings of sampling are the model's
by default. python -m dalle2_jax.generate is the same command.

examples:
  dalle2-jax generate "a red star above a blue ring" "a green cross on black" --n=4
  dalle2-jax generate "a red star above a blue ring" --guidance_scale=2 --steps=50 --seed=7
  dalle2-jax generate --model=runs/karlo "a corgi in a field" --low_memory --upsampler_steps=7
  dalle2-jax generate --again=outputs/0000_a-red-star-above-a-blue-ring.png
"""

from dalle2_jax.runtime import start

start.begin(__name__, "generate: loading JAX")

import time

from absl import flags, logging
from etils import epath

from dalle2_jax.data import shards
from dalle2_jax.generate import again, output
from dalle2_jax.generate.captions import check_captions, check_quotes
from dalle2_jax.generate.flags import define_sampling_flags, sampling_settings
from dalle2_jax.generate.pipeline import Pipeline
from dalle2_jax.generate.settings import SETTINGS
from dalle2_jax.runtime import commandline, compiling, partition, processes

FLAGS = flags.FLAGS


def main(argv):
    """Run the command; `argv` without the flags."""
    captions = [shards.clean_caption(text) for text in argv[1:]]
    with processes.fail_together(debug=FLAGS.debug):
        if captions:
            check_captions(captions)
            check_quotes(captions)
        drawn = read_again(captions) if FLAGS.again else None
        settings = sampling_settings()
        partition.initialise()
        processes.join()
        watch, began = compiling.Watch(output.note), time.monotonic()
        dtype, low_memory = (drawn.dtype, drawn.low_memory) if drawn else (FLAGS.dtype, FLAGS.low_memory)
        model = Pipeline.load(FLAGS.model, dtype=dtype, low_memory=low_memory)
        model.steps("draw")  # raises before any file is written
        if not captions and model.reads_captions and not drawn:
            check_captions(captions)
        for line in model.caption_notes(captions) if captions else ():
            output.note(line)
        out = epath.Path(FLAGS.out)
        out.mkdir(parents=True, exist_ok=True)  # now, not after an hour of drawing
        output.say(f"drawing with {model.name} on {output.devices()}")
        if drawn:
            result, verdict = again.draw(model, drawn, output.StageLines())
        else:
            settings |= dict(seed=FLAGS.seed, n=FLAGS.n, batch_size=FLAGS.batch_size)
            settings |= dict(judge=Pipeline.load(FLAGS.rerank_model)) if FLAGS.rerank_model else {}
            result = model.text_to_image(captions, **settings, progress=output.StageLines())
        if not processes.is_first():
            return
        count = len(result.save(out))
        waited = sum(timing.compile_seconds for timing in result.timings.values())
        sampling = sum(timing.seconds for timing in result.timings.values())
        size, seconds = model.image_size, time.monotonic() - began
        work = f"tracing and {watch.work}" if watch.traced >= 0.1 else watch.work
        print(
            f"{count} picture{'s' * (count > 1)} of {size} x {size} in {seconds:.1f} s ("
            f"{work} {waited:.1f} s, {sampling / count:.2f} s a picture): {out / 'grid.png'}"
        )
        if drawn:
            print(verdict)
            if result.images[0].tobytes() != drawn.image.tobytes():
                raise SystemExit(1)


def read_again(captions: list[str]) -> again.Drawn:
    """The picture of --again; ValueError for captions and flags beside it, and for --out with the picture."""
    names = [
        name
        for name in ("n", "seed", "rerank", "batch_size", "dtype", "low_memory", *SETTINGS)
        if FLAGS[name].present
    ]
    if captions or names:
        beside = ", ".join(["the caption"] * bool(captions) + [f"--{name}" for name in names])
        raise ValueError(f"--again takes caption, seed and settings from the picture: leave out {beside}")
    if FLAGS["out"].using_default_value:
        FLAGS["out"].value = "again"
    if epath.Path(FLAGS.again).parent.resolve() == epath.Path(FLAGS.out).resolve():
        raise ValueError(f"--out={FLAGS.out} holds the picture of --again: give another folder")
    return again.read(FLAGS.again)


if __name__ == "__main__":
    flags.DEFINE_integer("n", 1, "Pictures a caption.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "The same seed and caption give the same picture.")
    commandline.DEFINE_path("out", "outputs", "Where pictures, grid.png and generate.json go.")
    define_sampling_flags()
    with start.group(start.SAMPLING):
        whose = "Model whose CLIP or classifier ranks; default: this one, or else the package's."
        commandline.DEFINE_path("rerank_model", None, whose)
    commandline.DEFINE_path("again", None, "Draw this picture of the command again; default of --out: again.")
    logging.set_verbosity(logging.WARNING)
    start.run(main)
