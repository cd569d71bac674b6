"""python -m dalle2_jax.edit ACTION ... [--model=DIR --out=edits --seed=0 ...]

Edits pictures with a model directory, or with the small model that comes with the package:

  variations PICTURE                    --n pictures of what CLIP sees in it; --eta, --strength, --caption
  interpolate A B                       --frames from A to B, each a picture's file or a caption; --same_noise
  textdiff PICTURE "TARGET"             --frames towards TARGET, away from --source="what it shows"; --theta
  image_to_image PICTURE "CAPTION"      begin as the picture; --strength, --negative
  inpaint PICTURE MASK "CAPTION"        draw the caption where the mask, a file, is opaque white, or in a box
                                        such as 0.5,0,1,1: left, top, right, bottom; --resample, --negative
  outpaint PICTURE "CAPTION"            draw around the picture, which takes the middle --scale of the side
  invert PICTURE ...                    latents.npz, and what is drawn from it; --steps
  redraw LATENTS.npz                    draw from it again; --eta
  reconstruct PICTURE                   from --components=4,8,16 of its embedding
  upscale PICTURE                       by the last upsampler; --tile, --caption

--out gets every picture as PNG (with the settings inside), grid.png and edit.json; actions that go from one
picture to another also write path.webp, which moves. --keep=K keeps the K pictures closest to the caption.
Several processes (see `processes`) share the pictures of an action, and the first of them writes.
"""

import dataclasses
import json
import os
import time

import numpy as np
from absl import flags
from etils import epath

from dalle2_jax.data import shards
from dalle2_jax.edit import actions
from dalle2_jax.edit.latents import Latents
from dalle2_jax.generate import pictures
from dalle2_jax.generate.output import StageLines, write_pictures
from dalle2_jax.generate.pipeline import Pipeline, Result
from dalle2_jax.runtime import files, metrics, partition, processes

FLAGS = flags.FLAGS
# action -> what it is given
ARGUMENTS = {
    "variations": ("PICTURE",),
    "interpolate": ("A", "B"),
    "textdiff": ("PICTURE", "TARGET"),
    "image_to_image": ("PICTURE", "CAPTION"),
    "inpaint": ("PICTURE", "MASK", "CAPTION"),
    "outpaint": ("PICTURE", "CAPTION"),
    "invert": ("PICTURE", "..."),
    "redraw": ("LATENTS",),
    "reconstruct": ("PICTURE",),
    "upscale": ("PICTURE",),
}
PATHS = ("interpolate", "textdiff")
# A name with such an ending is no caption, read here or not.
PICTURE_ENDINGS = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".heic",
    ".avif",
    ".svg",
)


def check_arguments(argv: list[str]) -> tuple[str, list[str]]:
    """(action, its arguments) of a command line; ValueError that shows what is missing."""
    if not argv or argv[0] not in ARGUMENTS:
        found = f"{argv[0]!r} is no action" if argv else "say what to do"
        raise ValueError(f"{found}: choose one of {', '.join(ARGUMENTS)}; --help says what they are given")
    action, given = argv[0], argv[1:]
    wanted = ARGUMENTS[action]
    many = wanted[-1] == "..."
    if not given or (len(given) != len(wanted) and not many):
        raise ValueError(f"{action} is given {' '.join(wanted)}, not {len(given)} argument(s)")
    return action, given


def picture_or_caption(text: str):
    """The picture of a file that is there, else the text, a caption."""
    if epath.Path(files.expand(text)).exists():
        return pictures.read_picture(text)
    if os.path.splitext(text)[1].lower() in PICTURE_ENDINGS:
        raise FileNotFoundError(f"there is no picture {text}")
    return shards.clean_caption(text)


def read_given(action: str, given: list[str]) -> list:
    """What an action is given, read: pictures, a mask bool [H, W], latents; captions stay texts.

    Raises ValueError for a file that cannot be used, FileNotFoundError for one that is not there.
    """
    if action == "redraw":
        return [Latents.load(given[0])]
    if action == "interpolate":
        return [picture_or_caption(text) for text in given]
    if action == "invert":
        return [pictures.read_picture(path) for path in given]
    image = pictures.read_picture(given[0])
    if action == "inpaint":
        mask = pictures.read_mask(given[1], image.size)
        return [image, pictures.repaint_mask(mask, image.size), given[2]]
    return [image, *given[1:]]


def edit(model: Pipeline, action: str, given: list, out: epath.Path) -> Result:
    """The `Result` of an action with the flags' settings; 'invert' also writes latents.npz to `out`.

    given: what `read_given` read.
    """
    common = dict(seed=FLAGS.seed, batch_size=FLAGS.batch_size, progress=StageLines())
    drawing = common | dict(num_steps=FLAGS.steps, guidance_scale=FLAGS.guidance_scale, fit=FLAGS.fit)
    if action == "redraw":
        own = dict(num_steps=FLAGS.steps, guidance_scale=FLAGS.guidance_scale)
        return actions.from_latents(model, given[0], eta=FLAGS.eta or 0.0, **own, **common)
    if action == "interpolate":
        return actions.interpolate(model, *given, frames=FLAGS.frames, same_noise=FLAGS.same_noise, **drawing)
    if action == "invert":
        latents = actions.invert(
            model,
            given,
            num_steps=FLAGS.steps or actions.INVERSION_STEPS,
            fit=FLAGS.fit,
            batch_size=FLAGS.batch_size,
            progress=common["progress"],
        )
        result = actions.from_latents(model, latents, **common)
        error = (
            np.abs(result.base.astype(np.float32) - actions.base_pictures(model, given, FLAGS.fit)).mean()
            / 255
        )
        if processes.is_first():
            latents.save(out / "latents.npz")
            print(f"base pictures come back with a mean absolute error of {error:.4f} (black to white is 1)")
        return result
    image = given[0]
    if action == "variations":
        eta = 1.0 if FLAGS.eta is None else FLAGS.eta
        strength = FLAGS.strength or 1.0
        return actions.variations(
            model, image, n=FLAGS.n, eta=eta, strength=strength, caption=FLAGS.caption, **drawing
        )
    if action == "textdiff":
        settings = dict(theta=FLAGS.theta, frames=FLAGS.frames)
        return actions.textdiff(model, image, FLAGS.source, given[1], **settings, **drawing)
    if action == "reconstruct":
        counts = [int(text) if text.strip().isdigit() else 0 for text in FLAGS.components]
        return actions.reconstruct(model, image, counts, **drawing)
    drawing |= dict(n=FLAGS.n, negative=FLAGS.negative)
    if action == "image_to_image":
        return actions.image_to_image(model, image, given[1], strength=FLAGS.strength or 0.7, **drawing)
    if action == "outpaint":
        return actions.outpaint(model, image, given[1], scale=FLAGS.scale, resample=FLAGS.resample, **drawing)
    return actions.inpaint(model, image, *given[1:], resample=FLAGS.resample, **drawing)


def write_animation(path: epath.Path, images: np.ndarray, seconds: float = 0.25) -> None:
    """Pictures uint8 [N, H, W, 3] as a WebP that runs there and back for ever."""
    import io

    from PIL import Image

    frames = [Image.fromarray(image) for image in [*images, *images[-2:0:-1]]]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=round(1000 * seconds),
        loop=0,
        lossless=True,
    )
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


def upscale(model: Pipeline, image, out: epath.Path, said: dict) -> str:
    """Draw and write upscaled.png, with what is `said` inside; what was written, in words."""
    image = actions.upscale(
        model,
        image,
        seed=FLAGS.seed,
        num_steps=FLAGS.steps,
        tile=FLAGS.tile,
        caption=FLAGS.caption,
        progress=StageLines(),
    )
    if processes.is_first():
        made = json.dumps(said | {"model": model.name, "seed": FLAGS.seed})
        metrics.save_png(out / "upscaled.png", image, {"dalle2_jax": made})
    return f"{image.shape[1]} x {image.shape[0]}: {out / 'upscaled.png'}"


def main(argv):
    """Run the command; `argv` without the flags."""
    with processes.fail_together(debug=FLAGS.debug):
        action, given = check_arguments(argv[1:])
        captioned = ARGUMENTS[action][-1] == "CAPTION"
        if captioned:  # the others are files, whose names stay as they are
            given[-1] = shards.clean_caption(given[-1])
        if FLAGS.keep is not None and not captioned:
            raise ValueError(f"--keep chooses by a caption, and {action} is given none")
        partition.initialise()
        processes.join()
        began, out = time.monotonic(), epath.Path(FLAGS.out)
        read = read_given(action, given)
        if action == "inpaint" and pictures.keeps_nothing(read[1], FLAGS.fit) and processes.is_first():
            print(f"note: {pictures.ALL_WHITE}", flush=True)
        model = Pipeline.load(FLAGS.model, dtype=FLAGS.dtype, low_memory=FLAGS.low_memory)
        model.steps(action)  # what the model cannot do is said before any file is written
        for line in model.cut_captions(given[-1:]) if captioned and processes.is_first() else ():
            print(f"note: {line}", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        said = {"action": action, "given": given}
        if action == "upscale":
            shown = upscale(model, read[0], out, said)
        else:
            result = edit(model, action, read, out)
            if FLAGS.keep is not None:
                result = kept(model, result, given[-1], FLAGS.keep)
            if processes.is_first():
                write_pictures(out, result, model.name, command="edit", **said)
                if action in PATHS:
                    write_animation(out / "path.webp", result.images)
            count = len(result.images)
            shown = f"{count} picture{'s' * (count > 1)}: {out / 'grid.png'}"
        if processes.is_first():
            print(f"{action} in {time.monotonic() - began:.1f} s, {shown}")
