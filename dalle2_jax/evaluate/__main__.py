"""python -m dalle2_jax.evaluate [--model=DIR] [--metrics=scenes,retrieval,zero_shot --n=128 --out=DIR]"""

from absl import app, flags, logging

from dalle2_jax.evaluate import evaluate, fidelity, presets
from dalle2_jax.generate.flags import define_sampling_flags
from dalle2_jax.runtime import commandline

__doc__ = evaluate.__doc__  # what --help prints

if __name__ == "__main__":
    define_sampling_flags()
    commandline.DEFINE_path("out", "evaluation", "Where the report and the grids go.")
    flags.DEFINE_list(
        "metrics",
        None,
        f"Which of {', '.join((*evaluate.METRICS, *fidelity.METRICS))}; default: what is at hand.",
    )
    commandline.DEFINE_path("images", None, "Pictures to measure: a folder, tar shards or an npz.")
    commandline.DEFINE_path(
        "classes", None, "zero_shot of --images: a file with the name of a class on each line."
    )
    commandline.DEFINE_path(
        "templates", None, "zero_shot: a file with a template such as 'a photo of a {}' a line."
    )
    commandline.DEFINE_path("reference", None, "Pictures to compare with, or an npz of mu and sigma.")
    commandline.DEFINE_path("inception", None, "Weights that `dalle2_jax.convert inception` wrote.")
    commandline.DEFINE_path("aesthetic", None, "Weights of LAION's aesthetic head, for CLIP ViT-L/14.")
    flags.DEFINE_string("preset", "ttur", f"Protocol of FID, one of {', '.join(presets.PRESETS)}.")
    commandline.DEFINE_path("report", None, "Write one self-contained HTML page of numbers and pictures.")
    commandline.DEFINE_path("npz_out", None, "Write the images as an npz for guided-diffusion's evaluator.")
    commandline.DEFINE_path("prompts", None, "Draw the prompts of this file for a tool that judges them.")
    commandline.DEFINE_path("stats_out", None, "Write mean and covariance of the images' Inception features.")
    flags.DEFINE_integer("n", 128, "Captions to draw, in all.", lower_bound=4)
    flags.DEFINE_multi_string("compare", None, "A way of drawing, such as 'guidance_scale=2'; once for each.")
    flags.DEFINE_integer("pictures", 4, "Pictures a caption for --compare and --prompts.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of captions and pictures.", lower_bound=0)
    flags.DEFINE_string("scenes", None, "Grammar of the captions; default: the one the model was trained on.")
    logging.set_verbosity(logging.WARNING)  # not every backend that JAX looks for in vain
    app.run(evaluate.main)
