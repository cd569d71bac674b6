"""dalle2-jax evaluate [--model=DIR] [--metrics=scenes,retrieval,zero_shot --n=128 --out=DIR]"""

from dalle2_jax.runtime import start

start.begin(__name__, "evaluate: loading JAX")


import contextlib
import dataclasses
import functools
import os
import tempfile
from typing import Any

from absl import flags, logging
from etils import epath

from dalle2_jax import pipeline
from dalle2_jax.evaluate import comparison, evaluate, metrics, networks, presets, prompts
from dalle2_jax.evaluate.metric import Request
from dalle2_jax.generate.flags import define_sampling_flags, sampling_settings
from dalle2_jax.generate.output import StageLines
from dalle2_jax.runtime import commandline, partition, processes

__doc__ = evaluate.__doc__  # --help prints it
FLAGS = flags.FLAGS


def read_request() -> Request:
    """The flags as a request."""
    names = {field.name for field in dataclasses.fields(Request)} - {"metrics", "settings"}
    values: dict[str, Any] = {name: FLAGS[name].value for name in names}
    return Request(metrics=tuple(FLAGS.metrics or ()), settings=sampling_settings(), **values)


def main(argv):
    """Run the command; `argv` without the flags."""
    with processes.fail_together(debug=FLAGS.debug), contextlib.ExitStack() as stack:
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments {argv[1:]}: captions are for dalle2_jax.generate")
        partition.initialise()
        processes.join()
        out, request = epath.Path(FLAGS.out), read_request()
        if not processes.is_first():  # every process measures, one writes and prints
            out = epath.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        load = functools.partial(pipeline.UnCLIP.load, dtype=FLAGS.dtype, low_memory=FLAGS.low_memory)
        if FLAGS.prompts:
            suite = prompts.read_prompts(FLAGS.prompts)
            how = dict(n=FLAGS.pictures, seed=request.seed, settings=request.settings, progress=StageLines())
            prompts.draw(load(FLAGS.model), suite, FLAGS.out, batch_size=request.batch_size, **how)
            print(f"{len(suite)} prompts, {FLAGS.pictures} pictures each: {FLAGS.out}")
            return
        model = None if FLAGS.compare else load(FLAGS.model)
        judge = stack.enter_context(networks.open_judge(FLAGS.judge)) if FLAGS.judge else None
        if FLAGS.compare:
            how = dict(model_dir=FLAGS.model, pictures=FLAGS.pictures, load=load, judge=judge)
            comparison.write_report(out, comparison.compare(FLAGS.compare, request, out, **how), FLAGS.report)
        else:
            evaluate.write_report(out, *evaluate.evaluate(model, request, out, judge), FLAGS.report)


if __name__ == "__main__":
    some = f"Some of {', '.join(metrics.METRICS)}; default: those that the other flags permit."
    flags.DEFINE_list("metrics", None, some)
    flags.DEFINE_integer("n", 128, "Captions to draw, in all.", lower_bound=4)
    flags.DEFINE_integer("seed", 0, "Seed of captions and pictures.", lower_bound=0)
    commandline.DEFINE_path("out", "evaluation", "Where the report and the grids go.")
    commandline.DEFINE_path("report", None, "Write one self-contained HTML page of numbers and pictures.")
    flags.DEFINE_multi_string("compare", None, "A way of drawing, such as 'guidance_scale=2'; once for each.")
    flags.DEFINE_integer("pictures", 4, "Pictures a caption for --compare and --prompts.", lower_bound=1)
    with start.group("what is measured, and by what"):
        commandline.DEFINE_path("images", None, "Pictures to measure: a folder, tar shards or an npz.")
        commandline.DEFINE_path("reference", None, "Pictures to compare with, or an npz of mu and sigma.")
        commandline.DEFINE_path("inception", None, "Weights that `dalle2_jax.convert inception` wrote.")
        flags.DEFINE_string("preset", "ttur", f"Protocol of FID, one of {', '.join(presets.PRESETS)}.")
        of_judge = "Another model, whose CLIP and classifier read the pictures; a folder."
        commandline.DEFINE_path("judge", None, of_judge)
        commandline.DEFINE_path("aesthetic", None, "Weights of LAION's aesthetic head, for CLIP ViT-L/14.")
        commandline.DEFINE_path("classes", None, "zero_shot of --images: a file with a class on each line.")
        commandline.DEFINE_path(
            "templates", None, "zero_shot: a file with a line like 'a photo of a {}' each."
        )
        of_scenes = "Grammar of the captions; default: the one the model was trained on."
        flags.DEFINE_string("scenes", None, of_scenes)
        flags.DEFINE_integer(
            "bpd_steps", 0, "Steps of the bound of bpd; 0: all of the model's.", lower_bound=0
        )
    with start.group("for other programs"):
        commandline.DEFINE_path("prompts", None, "Draw the prompts of this file for an external tool.")
        of_images = "Write the images as an npz for guided-diffusion's evaluator."
        commandline.DEFINE_path("npz_out", None, of_images)
        of_features = "Write mean and covariance of the images' Inception features."
        commandline.DEFINE_path("stats_out", None, of_features)
    define_sampling_flags()
    logging.set_verbosity(logging.WARNING)
    start.run(main)
