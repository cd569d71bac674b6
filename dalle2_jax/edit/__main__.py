"""python -m dalle2_jax.edit ACTION ... [--model=DIR --out=edits --seed=0 ...]"""

from absl import app, flags, logging

from dalle2_jax.edit import edit
from dalle2_jax.generate import pictures
from dalle2_jax.runtime import commandline

__doc__ = edit.__doc__  # what --help prints

if __name__ == "__main__":
    commandline.DEFINE_path("model", None, "Model directory; default: the small model of the package.")
    commandline.DEFINE_path("out", "edits", "Where pictures, grid.png and edit.json go.")
    flags.DEFINE_integer("seed", 0, "Seed; the same seed and input give the same picture.")
    flags.DEFINE_integer("n", 4, "Pictures to draw.", lower_bound=1)
    flags.DEFINE_integer("keep", None, "Keep so many of them, those closest to the caption.", lower_bound=1)
    flags.DEFINE_integer("steps", None, "Steps of the decoder, and of the inversion before it.")
    flags.DEFINE_float("guidance_scale", None, "Guidance of the decoder; 1 is none.")
    flags.DEFINE_string("caption", None, "variations, upscale: what the picture shows, to be read.")
    flags.DEFINE_string("source", None, "textdiff: what the picture shows.")
    flags.DEFINE_string("negative", None, "A caption to lead away from.")
    flags.DEFINE_float("eta", None, "Noise of DDIM, 0 to 1; variations: 1, redraw: 0.")
    flags.DEFINE_float("strength", None, "Share of the steps, 0 to 1; variations: 1, image_to_image: 0.7.")
    flags.DEFINE_float("theta", 0.5, "textdiff: how far to go, 0 to 1; 0.25 to 0.5 are usual.")
    flags.DEFINE_integer("frames", 8, "Pictures of a path, both ends included.", lower_bound=2)
    flags.DEFINE_bool("same_noise", False, "interpolate: all from one noise.")
    flags.DEFINE_integer("resample", None, "inpaint, outpaint: how often each step is taken.", lower_bound=1)
    flags.DEFINE_float("scale", 0.5, "outpaint: the share of the side that the picture keeps.")
    flags.DEFINE_list("components", ["4", "8", "16"], "reconstruct: how many principal components.")
    flags.DEFINE_integer("tile", None, "upscale: side of the windows drawn at a time.")
    flags.DEFINE_enum("fit", "crop", pictures.FITS, "How a picture becomes square.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Compute type; default: as trained.")
    flags.DEFINE_bool("low_memory", False, "Weights as they are stored, those of one stage at a time.")
    flags.DEFINE_integer("batch_size", None, "Pictures at a time.")
    flags.DEFINE_bool("debug", False, "Show the whole traceback of an error.")
    logging.set_verbosity(logging.WARNING)  # not every backend that JAX looks for in vain
    app.run(edit.main)
