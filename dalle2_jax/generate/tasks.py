"""A step of an action as a function that is compiled for micro-batches.

Picture `number` of a caption has the key fold_in(fold_in(key(seed), number), fold of the step): it depends on
its caption, the seed and the settings alone. Seed and scales are traced. Pictures are uint8 outside of the
function, since training pictures have 256 levels.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.generate.engine import Engine, Task
from dalle2_jax.models.stages import narrow_in_loop
from dalle2_jax.runtime.batch import to_float, to_uint8
from dalle2_jax.systems.step import PICTURES, Step

# Optional fields: noise or a picture to start from; the picture to inpaint, and True where it is drawn anew.
_OPTIONAL = {"x_T": np.float32, "init": np.uint8, "inpaint_image": np.uint8, "inpaint_mask": np.bool_}


def picture_keys(seed: jax.Array, numbers: jax.Array, fold: int) -> jax.Array:
    """Keys [N] of the pictures with these numbers [N] within their captions; to be traced."""

    def one(number):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), fold)

    return jax.vmap(one)(numbers)


def guide_fields(engine: Engine, step: Step, settings: Mapping) -> dict[str, str]:
    """The guides of a step that the settings use -> the names of their targets in a batch."""
    return {guide: f"{guide}.{engine.system.GUIDES[guide]}" for guide in step.guides if guide in settings}


def specs(engine: Engine, step: Step, settings: Mapping, examples: Mapping | None = None) -> dict:
    """Shape and type of one example of each input of a step, including its guides' targets.

    examples: field -> array [N, ...]; the result has these fields, with the sizes of the arrays. None: the
      required fields, with the sizes that the stage declares.
    """
    found = step.specs(engine.stage(step.stage))
    optional = {f"negative_{name}": spec for name, spec in found.items()}
    optional |= {name: jax.ShapeDtypeStruct((), dtype) for name, dtype in _OPTIONAL.items()}
    if step.fold is not None:
        found["number"] = jax.ShapeDtypeStruct((), np.uint32)
    for guide, name in guide_fields(engine, step, settings).items():
        width = () if name.endswith(".label") else (engine.stage(guide).embed_dim,)
        found[name] = jax.ShapeDtypeStruct(width, np.float32 if width else np.int32)
    if examples is None:
        return found
    types = {name: spec.dtype for name, spec in (optional | found).items()}
    return {name: jax.ShapeDtypeStruct(np.shape(x)[1:], types[name]) for name, x in examples.items()}


def make_task(engine: Engine, step: Step, settings: Mapping, specs: dict, seed: int = 0) -> Task:
    """The task of a step.

    Args:
      engine: the opened model.
      step: of one of its actions.
      settings: keywords of the operation, and scales of guides. All but scales are part of the program. A
        guidance scale of 1 has another program, without the unconditional half.
      specs: see `specs`; free axes have the sizes of the examples.
      seed: of all pictures.
    """
    stage, guides = engine.stage(step.stage), guide_fields(engine, step, settings)
    scale = settings.get("guidance_scale", 1)
    fixed = {k: v for k, v in settings.items() if k != "guidance_scale" and k not in guides}
    operation = getattr(stage, step.do)

    def function(params, batch, scalars):
        batch = {name: to_float(x) if name in PICTURES else x for name, x in batch.items()}
        if "inpaint_mask" in batch:
            batch["inpaint_mask"] = batch["inpaint_mask"][..., None].astype(jnp.float32)  # [B, h, w, 1]
        keywords = dict(fixed)
        if "guidance_scale" in settings:
            keywords["guidance_scale"] = scalars.get("guidance_scale", 1)
        if guides:
            keywords["log_p"] = log_p_of(params, batch, scalars)
            params = params[step.stage]
        arguments = [batch] if step.reads is None else [batch[name] for name in step.reads]
        if step.fold is not None:
            arguments.insert(0, picture_keys(scalars["seed"], batch["number"], step.fold))
        made = operation(params, *arguments, **keywords)
        made = dict(zip(step.writes, made if isinstance(made, tuple) else (made,), strict=True))
        return {name: to_uint8(x) if name in PICTURES else x for name, x in made.items()}

    def log_p_of(params, batch, scalars):
        def log_p(x_t, t):
            held, x_t = narrow_in_loop({guide: params[guide] for guide in guides}, x_t)
            return sum(
                scalars[guide] * engine.stage(guide).log_p(held[guide], x_t, t, batch[name])
                for guide, name in guides.items()
            )

        return log_p

    scalars: dict[str, np.generic] = {guide: np.float32(settings[guide]) for guide in guides}
    scalars |= {"seed": np.uint32(seed)} if step.fold is not None else {}
    scalars |= {"guidance_scale": np.float32(scale)} if scale != 1 else {}
    key = (step.do, step.op, step.fold, "guidance_scale" in settings, *fixed.items())
    steps, others = fixed.get("num_steps", 1), tuple(guides)
    return Task(step.stage, function, key, specs, scalars, steps, step.name, others, keep=True)
