"""dalle2-jax edit ACTION ... [--model=DIR --out=edits --seed=0 ...]

Edits pictures with a model directory, or with the small model that comes with the package:

  variations PICTURE                    --n pictures of what CLIP sees in it; --eta, --strength, --caption
  interpolate FIRST SECOND              --frames between two pictures or captions; --same_noise
  textdiff PICTURE "TARGET"             --frames towards TARGET, away from --source="what it shows"; --theta
  image_to_image PICTURE "CAPTION"      begin as the picture; --strength, --negative
  inpaint PICTURE MASK "CAPTION"        draw the caption where the mask, a file, is opaque white, or in a box
                                        such as 0.5,0,1,1: left, top, right, bottom; --resample, --negative
  outpaint PICTURE "CAPTION"            draw around the picture, which takes the middle --scale of the side
  complete PICTURE "CAPTION"            draw the lower part by a token model; --n, --scale is the upper part
  invert PICTURE ...                    latents.npz, and the pictures drawn from it; --steps
  redraw LATENTS.npz                    draw from latents again; --eta
  reconstruct PICTURE                   from --components=4,8,16 of its embedding, or from its codes
  upscale PICTURE                       by the last upsampler; --tile, --caption

--out gets every picture as PNG (with the settings inside), grid.png and edit.json; interpolate and textdiff
also write path.webp, which moves. --keep=K keeps the K pictures closest to the caption. Several processes
(see `processes`) share the pictures of an action, and the first of them writes.

examples:
  dalle2-jax edit variations PICTURE.png --n=4
  dalle2-jax edit textdiff PICTURE.png "a yellow star" --source="a red star"
  dalle2-jax edit inpaint PICTURE.png 0.5,0,1,1 "a red star left of a blue ring" --n=8 --keep=2
"""

from dalle2_jax.runtime import start

start.begin(__name__, "edit: loading JAX")


import dataclasses
import io
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags, logging
from etils import epath

from dalle2_jax.data import shards
from dalle2_jax.edit import actions, grids
from dalle2_jax.edit.actions import INPUTS, PATHS
from dalle2_jax.edit.complete import complete
from dalle2_jax.edit.latents import Latents
from dalle2_jax.generate import output, pictures
from dalle2_jax.generate.flags import define_model_flags
from dalle2_jax.generate.output import StageLines, note, write_pictures
from dalle2_jax.generate.pipeline import Pipeline, Result
from dalle2_jax.runtime import commandline, files, grid, partition, processes

FLAGS = flags.FLAGS
# action -> its flags, besides those of all actions
FLAGS_OF = {
    "variations": ("n", "caption", "strength", "eta"),
    "interpolate": ("frames", "same_noise"),
    "textdiff": ("source", "theta", "frames"),
    "image_to_image": ("n", "negative", "strength"),
    "inpaint": ("n", "negative", "resample"),
    "outpaint": ("n", "negative", "resample", "scale"),
    "complete": ("n", "scale"),
    "redraw": ("eta",),
    "reconstruct": ("components",),
}
# The text of an input with such an ending is no caption.
PICTURE_ENDINGS = {f".{kind}" for kind in "png jpg jpeg webp gif bmp tif tiff heic avif svg".split()}


def check_arguments(argv: list[str]) -> tuple[str, list[str]]:
    """(action, its inputs) of a command line; ValueError with the inputs that the action needs."""
    if not argv or argv[0] not in INPUTS:
        found = f"{argv[0]!r} is no action" if argv else "say what to do"
        raise ValueError(f"{found}: choose one of {', '.join(INPUTS)}; --help shows their inputs")
    action, texts = argv[0], argv[1:]
    names = INPUTS[action]
    if not texts or (len(texts) != len(names) and names[-1] != "..."):
        many = names[-1] in ("caption", "target") and len(texts) > len(names)
        hint = "; put the caption in quotes" if many else ""
        raise ValueError(f"{action} needs {' '.join(names).upper()}, not {len(texts)} argument(s){hint}")
    return action, texts


def picture_or_caption(text: str):
    """The picture of an existing file, else the text, a caption."""
    if epath.Path(files.expand(text)).exists():
        return pictures.read_picture(text)
    if os.path.splitext(text)[1].lower() in PICTURE_ENDINGS:
        raise FileNotFoundError(f"no picture file {text}")
    return shards.clean_caption(text)


def read_inputs(action: str, texts: list[str]) -> dict:
    """name -> input of an action: pictures, a mask bool [H, W], latents; captions stay texts.

    Raises ValueError for an unusable file, FileNotFoundError for a missing one.
    """
    if action == "invert":
        return {"pictures": [pictures.read_picture(path) for path in texts]}
    ends = dict.fromkeys(("first", "second"), picture_or_caption)
    readers: dict[str, Callable] = {"picture": pictures.read_picture, "latents": Latents.load} | ends
    inputs: dict[str, Any] = dict(zip(INPUTS[action], texts, strict=True))
    inputs |= {name: readers[name](text) for name, text in inputs.items() if name in readers}
    if "mask" in inputs:
        size = inputs["picture"].size
        inputs["mask"] = pictures.repaint_mask(pictures.read_mask(inputs["mask"], size), size)
    return inputs


def edit(model: Pipeline, action: str, inputs: dict, out: epath.Path) -> Result:
    """The `Result` of an action with the settings of the flags; 'invert' also writes latents.npz to `out`."""
    running = dict(seed=FLAGS.seed, batch_size=FLAGS.batch_size, progress=StageLines())
    if action == "invert":
        return invert(model, inputs["pictures"], out, running)
    options = {name: FLAGS[name].value for name in FLAGS_OF[action] if FLAGS[name].value is not None}
    if "components" in options:
        options["components"] = [int(k) if k.strip().isdigit() else 0 for k in FLAGS.components]
    options |= dict(num_steps=FLAGS.steps, guidance_scale=FLAGS.guidance_scale, fit=FLAGS.fit)
    if action == "complete" and options.pop("num_steps") is not None:
        raise ValueError("complete draws codes, a step each: leave --steps out")
    others: dict[str, Callable] = {"redraw": actions.from_latents, "complete": complete}
    function = others.get(action) or getattr(actions, action)
    return function(model, **inputs, **options, **running)


def invert(model: Pipeline, images: list, out: epath.Path, running: dict) -> Result:
    """Write the latents of pictures to `out`, and draw from them."""
    steps = FLAGS.steps or actions.INVERSION_STEPS
    latents = actions.invert(model, images, num_steps=steps, fit=FLAGS.fit, **running)
    result = actions.from_latents(model, latents, **running)
    difference = result.base.astype(np.float32) - actions.base_pictures(model, images, FLAGS.fit)
    if processes.is_first():
        latents.save(out / "latents.npz")
        error = np.abs(difference).mean() / 255
        print(f"base pictures come back with a mean absolute error of {error:.4f} (black to white is 1)")
    return result


def write_animation(path: epath.Path, images: np.ndarray, seconds: float = 0.25) -> None:
    """Pictures uint8 [N, H, W, 3] as a WebP that runs there and back for ever."""
    from PIL import Image

    first, *others = (Image.fromarray(image) for image in [*images, *images[-2:0:-1]])
    buffer, milliseconds = io.BytesIO(), round(1000 * seconds)
    how = dict(save_all=True, append_images=others, duration=milliseconds, loop=0, lossless=True)
    first.save(buffer, format="WEBP", **how)
    path.write_bytes(buffer.getvalue())


def kept(model: Pipeline, result: Result, caption: str, keep: int) -> Result:
    """The `keep` pictures of a result that CLIP finds closest to `caption`, the closest first."""
    order = actions.rank(model, result.images, caption)[:keep]
    return dataclasses.replace(
        result,
        captions=tuple(result.captions[i] for i in order),
        numbers=tuple(result.numbers[i] for i in order),
        **{name: getattr(result, name)[order] for name in ("image_embeds", "base", "images")},
    )


def upscale(model: Pipeline, picture, out: epath.Path, record: dict) -> str:
    """Draw and write upscaled.png, with `record` inside; its size and path as text."""
    settings = dict(num_steps=FLAGS.steps, tile=FLAGS.tile, caption=FLAGS.caption)
    image = actions.upscale(model, picture, seed=FLAGS.seed, progress=StageLines(), **settings)
    if processes.is_first():
        origin = output.origin(model, 1)()
        made = json.dumps(record | {"model": model.name, "seed": FLAGS.seed, "origin": origin})
        grid.save_png(out / "upscaled.png", image, {"dalle2_jax": made})
    return f"{image.shape[1]} x {image.shape[0]}: {out / 'upscaled.png'}"


def main(argv):
    """Run the command; `argv` without the flags."""
    with processes.fail_together(debug=FLAGS.debug):
        action, texts = check_arguments(argv[1:])
        captioned = INPUTS[action][-1] == "caption"
        if captioned:  # names of files stay as they are
            texts[-1] = shards.clean_caption(texts[-1])
        if FLAGS.keep is not None and not captioned:
            raise ValueError(f"--keep chooses by a caption, and {action} has none")
        partition.initialise()
        processes.join()
        began, out = time.monotonic(), epath.Path(FLAGS.out)
        inputs = read_inputs(action, texts)
        if "mask" in inputs and pictures.keeps_nothing(inputs["mask"], FLAGS.fit):
            note(pictures.ALL_WHITE)
        model = Pipeline.load(FLAGS.model, dtype=FLAGS.dtype, low_memory=FLAGS.low_memory)
        model.steps(action)  # raises before any file is written
        for line in model.caption_notes(texts[-1:]) if captioned else ():
            note(line)
        out.mkdir(parents=True, exist_ok=True)
        record = {"action": action, "given": texts}
        if action == "upscale":
            written = upscale(model, inputs["picture"], out, record)
        else:
            result = edit(model, action, inputs, out)
            if FLAGS.keep is not None:
                result = kept(model, result, texts[-1], FLAGS.keep)
            if processes.is_first():
                options = {
                    name: FLAGS[name].value for name in FLAGS_OF.get(action, ()) if FLAGS[name].present
                }
                source = grids.source_of(model, action, inputs, result, options, FLAGS.fit)
                origin = output.origin(model, len(result.images), FLAGS.batch_size)()
                made = dict(record, origin=origin)
                write_pictures(out, result, model.name, command="edit", source=source, **made)
                if action in PATHS:
                    write_animation(out / "path.webp", result.images)
            count = len(result.images)
            written = f"{count} picture{'s' * (count > 1)}: {out / 'grid.png'}"
        if processes.is_first():
            print(f"{action} in {time.monotonic() - began:.1f} s, {written}")


if __name__ == "__main__":
    flags.DEFINE_integer("n", 4, "Pictures to draw.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "The same seed and input give the same picture.")
    commandline.DEFINE_path("out", "edits", "Where pictures, grid.png and edit.json go.")
    flags.DEFINE_string("caption", None, "variations, upscale: what the picture shows.")
    flags.DEFINE_string("source", None, "textdiff: what the picture shows.")
    flags.DEFINE_float("theta", 0.5, "textdiff: how far to go, 0 to 1; 0.25 to 0.5 are usual.")
    flags.DEFINE_integer("frames", 8, "Pictures of a path, both ends included.", lower_bound=2)
    flags.DEFINE_float("strength", None, "Share of the steps, 0 to 1; variations: 1, image_to_image: 0.7.")
    flags.DEFINE_float("scale", 0.5, "outpaint, complete: the share that the picture keeps.")
    flags.DEFINE_enum("fit", "crop", pictures.FITS, "How a picture becomes square.")
    keep = "Keep so many of them, those closest to the caption."
    flags.DEFINE_integer("keep", None, keep, lower_bound=1)
    with start.group(start.SAMPLING):
        flags.DEFINE_integer("steps", None, "Steps of the decoder, and of the inversion before it.")
        flags.DEFINE_float("guidance_scale", None, "Guidance of the decoder; 1: no guidance.")
        flags.DEFINE_string("negative", None, "A caption to lead away from.")
        flags.DEFINE_float("eta", None, "Noise of DDIM, 0 to 1; variations: 1, redraw: 0.")
        flags.DEFINE_bool("same_noise", False, "interpolate: all from one noise.")
        often = "inpaint, outpaint: how often each step is taken."
        flags.DEFINE_integer("resample", None, often, lower_bound=1)
        of_components = "reconstruct: how many principal components; default: 4,8,16."
        flags.DEFINE_list("components", None, of_components)
    with start.group(start.MEMORY):
        flags.DEFINE_integer("tile", None, "upscale: side of the windows drawn at a time.")
    define_model_flags()
    logging.set_verbosity(logging.WARNING)
    start.run(main)
