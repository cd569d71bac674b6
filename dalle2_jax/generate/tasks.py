"""What the stages of a cascade compute for one micro-batch: the functions that are compiled.

Picture `number` of a caption has the key fold_in(fold_in(key(seed), number), number of the stage), so a
picture depends on its caption, the seed and the settings alone. Seed and guidance scale are traced. Pictures
enter and leave with 256 levels, as training pictures have them. `own` is the stage's part of
`UnCLIP.settings`.
"""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.generate.cascade import GUIDES, Cascade, Task
from dalle2_jax.runtime.batch import to_float, to_uint8

# A stage's number in the keys; upsampler k is 2 + k.
_PRIOR, _DECODER, _UPSAMPLER = 0, 1, 2


def picture_keys(seed: jax.Array, numbers: jax.Array, stage_number: int) -> jax.Array:
    """Keys [N] of the pictures with these numbers [N] within their captions; to be traced."""

    def one(number):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), stage_number)

    return jax.vmap(one)(numbers)


def _spec(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _token_specs(context_length: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {"tokens": _spec((context_length,), np.int32), "token_mask": _spec((context_length,), np.bool_)}


def _drawing_scalars(seed: int, guidance_scale: float) -> dict[str, np.generic]:
    """What is traced; a guidance scale of 1 is not, as it has its own program, without the null half."""
    scalars = {"seed": np.uint32(seed)}
    return scalars if guidance_scale == 1 else scalars | {"guidance_scale": np.float32(guidance_scale)}


def _fixed(own: dict) -> dict:
    """The settings that are part of the program: all but the guidance scale, which is traced."""
    return {name: value for name, value in own.items() if name != "guidance_scale"}


def told_specs(stage) -> dict[str, jax.ShapeDtypeStruct]:
    """The rows that a decoder or an upsampler reads of captions: of tokens or states, and of classes."""
    pictures = ("image", "image_embed", "low_res", "crop_yx")
    specs = {name: spec for name, spec in stage.batch_spec(1).items() if name not in pictures}
    return {name: _spec(spec.shape[1:], spec.dtype) for name, spec in specs.items()}


def _embed_specs(decoder) -> dict[str, jax.ShapeDtypeStruct]:
    """The row of image embeddings, for a decoder that reads them."""
    return {"image_embed": _spec((decoder.embed_dim,), np.float32)} if decoder.embed_dim else {}


def text_task(cascade: Cascade, name: str = "clip") -> Task:
    """tokens, token_mask -> (text_embed, text_states), by CLIP, or the one that guides."""
    clip = cascade.stage(name)

    def function(params, batch, scalars):
        return clip.encode_text(params, batch["tokens"], batch["token_mask"])

    return Task(name, function, ("text",), _token_specs(clip.context_length), label="text")


def prior_task(cascade: Cascade, seed: int, own: dict) -> Task:
    """number, token_mask, text_embed and tokens or text_states -> image_embed."""
    prior, clip = cascade.stage("prior"), cascade.stage("clip")
    fixed = _fixed(own)
    rows = {"number": _spec((), np.uint32)} | _token_specs(prior.context_length)
    rows["text_embed"] = _spec((clip.embed_dim,), np.float32)
    if prior.states_width:
        del rows["tokens"]
        rows["text_states"] = _spec((prior.context_length, prior.states_width), np.float32)

    def function(params, batch, scalars):
        keys = picture_keys(scalars["seed"], batch["number"], _PRIOR)
        scale = scalars.get("guidance_scale", 1)
        return prior.sample(params, keys, batch, guidance_scale=scale, **fixed)

    scalars = _drawing_scalars(seed, own["guidance_scale"])
    return Task("prior", function, tuple(fixed.items()), rows, scalars, fixed.get("num_steps", 1))


def decoder_task(cascade: Cascade, seed: int, own: dict, given: Collection[str] = ()) -> Task:
    """number, image_embed and what the decoder reads of captions -> base picture in uint8.

    Where `own` has a scale for a guide, also guide_text_embed (noisy_clip's) or guide_label (the
    classifier's).
    given: which rows there are of x_T (noise, float32), init (uint8), known (uint8) with repaint (bool,
    [h, w]), negative_token_mask and what else is read of captions; see `Decoder.sample`.
    """
    decoder = cascade.stage("decoder")
    picture = (decoder.image_size, decoder.image_size, 3)
    scales = {name: own[name] for name in GUIDES if name in own}
    fixed = _fixed({name: value for name, value in own.items() if name not in scales})
    rows = {"number": _spec((), np.uint32)} | _embed_specs(decoder) | told_specs(decoder)
    optional = {
        "x_T": _spec(picture, np.float32),
        "init": _spec(picture, np.uint8),
        "known": _spec(picture, np.uint8),
        "repaint": _spec(picture[:2], np.bool_),
    } | {f"negative_{name}": spec for name, spec in told_specs(decoder).items()}
    rows |= {name: optional[name] for name in given}

    targets = {"noisy_clip": "guide_text_embed", "classifier": "guide_label"}
    if "noisy_clip" in scales:
        rows[targets["noisy_clip"]] = _spec((cascade.stage("noisy_clip").embed_dim,), np.float32)
    if "classifier" in scales:
        rows[targets["classifier"]] = _spec((), np.int32)

    def function(params, batch, scalars):
        keys = picture_keys(scalars["seed"], batch["number"], _DECODER)
        scale = scalars.get("guidance_scale", 1)
        own_params, log_p = params, None
        if scales:
            own_params = params["decoder"]

            def log_p(x_t, t):
                parts = [
                    scalars[name] * cascade.stage(name).log_p(params[name], x_t, t, batch[targets[name]])
                    for name in scales
                ]
                return sum(parts)

        drawn = decoder.sample(
            own_params,
            keys,
            batch | _as_floats(batch),
            guidance_scale=scale,
            log_p=log_p,
            **fixed,
        )
        return to_uint8(drawn)

    scalars = _drawing_scalars(seed, own["guidance_scale"])
    scalars |= {name: np.float32(value) for name, value in scales.items()}
    steps = fixed["num_steps"]
    return Task("decoder", function, tuple(fixed.items()), rows, scalars, steps, others=tuple(scales))


def _as_floats(batch: dict) -> dict:
    """The pictures in uint8 that a stage's `sample` reads as floats, under its names, and its mask."""
    names = {"low_res": "low_res", "init": "init", "known": "inpaint_image"}
    floats = {to: to_float(batch[name]) for name, to in names.items() if name in batch}
    if "repaint" in batch:
        floats["inpaint_mask"] = batch["repaint"][..., None].astype(jnp.float32)
    return floats


def invert_task(cascade: Cascade, num_steps: int) -> Task:
    """image in uint8, image_embed and what the decoder reads of captions -> x_T, by the decoder."""
    decoder = cascade.stage("decoder")
    picture = (decoder.image_size, decoder.image_size, 3)
    rows = {"image": _spec(picture, np.uint8)} | _embed_specs(decoder) | told_specs(decoder)

    def function(params, batch, scalars):
        return decoder.invert(params, batch | {"image": to_float(batch["image"])}, num_steps=num_steps)

    return Task("decoder", function, ("invert", num_steps), rows, steps=num_steps, label="inversion")


def upsampler_task(
    cascade: Cascade,
    name: str,
    seed: int,
    own: dict,
    low_res_shape: tuple[int, ...],
    keeps: bool = False,
) -> Task:
    """number, low_res in uint8 and what the upsampler reads of captions -> larger picture in uint8; `keeps`:
    also known and repaint, of its size."""
    stage, fixed = cascade.stage(name), _fixed(own)
    number = _UPSAMPLER + cascade.upsamplers.index(name)
    rows = {"number": _spec((), np.uint32), "low_res": _spec(low_res_shape, np.uint8)} | told_specs(stage)
    if keeps:
        factor = stage.image_size // stage.low_res_size
        size = (factor * low_res_shape[0], factor * low_res_shape[1])
        rows |= {"known": _spec((*size, 3), np.uint8), "repaint": _spec(size, np.bool_)}

    def function(params, batch, scalars):
        keys = picture_keys(scalars["seed"], batch["number"], number)
        return to_uint8(stage.sample(params, keys, batch | _as_floats(batch), **fixed))

    return Task(name, function, tuple(fixed.items()), rows, {"seed": np.uint32(seed)}, fixed["num_steps"])


def image_task(cascade: Cascade) -> Task:
    """image in uint8, of CLIP's size -> image_embed."""
    clip = cascade.stage("clip")

    def function(params, batch, scalars):
        return clip.encode_image(params, to_float(batch["image"]))

    rows = {"image": _spec((clip.image_size, clip.image_size, 3), np.uint8)}
    return Task("clip", function, ("image",), rows, label="image")
