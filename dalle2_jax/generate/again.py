"""A picture of `generate`, drawn again from what its PNG says of itself."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence

import numpy as np

from dalle2_jax.generate import output, rerank
from dalle2_jax.generate.engine import BATCH_SIZE, Progress
from dalle2_jax.generate.pipeline import Pipeline, Result, Running
from dalle2_jax.generate.settings import of_step
from dalle2_jax.systems.step import Step


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A picture, and how it was drawn.

    Attributes:
      path: of its file. image: uint8 [H, W, 3].
      caption, number, seed, model: see `Result`; the name of the model.
      settings: step -> its settings.
      origin: see `output.origin`.
    """

    path: str
    image: np.ndarray
    caption: str
    number: int
    seed: int
    model: str
    settings: dict[str, dict]
    origin: dict

    @property
    def dtype(self) -> str | None:
        """The compute type that the command was given."""
        return self.origin["dtype"]

    @property
    def low_memory(self) -> bool:
        """Whether weights kept their stored type."""
        return self.origin["low_memory"]

    @property
    def negative(self) -> str | None:
        """The caption that guidance led away from; None: no such caption."""
        return next((now["negative"] for now in self.settings.values() if "negative" in now), None)


def read(path: str | os.PathLike) -> Drawn:
    """The picture of a PNG file. Raises ValueError for one that says too little, and OSError."""
    from PIL import Image

    with Image.open(path) as file:
        texts, image = getattr(file, "text", {}), np.asarray(file.convert("RGB"))
    try:
        made = json.loads(texts["dalle2_jax"])
        if "action" in made:
            raise ValueError(
                f"{path} was made by `edit {made['action']}`: only pictures of generate are drawn again"
            )
        names = ("caption", "number", "seed", "model", "settings", "origin")
        found = {name: made[name] for name in names}
        # a reranked picture has its number among the candidates
        found["settings"] = {step: now for step, now in found["settings"].items() if step != rerank.NAME}
        return Drawn(os.fspath(path), image, **found)
    except KeyError as error:
        what = "how it was drawn" if error.args[0] == "dalle2_jax" else f"its {error.args[0]}"
        others = "an edit, another program or an older version made it"
        raise ValueError(f"{path} does not say {what}: {others}") from None


def draw(model: Pipeline, drawn: Drawn, progress: Progress | None = None) -> tuple[Result, str]:
    """(the picture drawn again, a line that says whether it is the same one, and what differs).

    It is drawn alone; if that does not give the same numbers, in a batch of the first time's size, for which
    the compiler may order sums in another way. Raises ValueError for settings that the model does not have.
    """
    steps, here = _steps(model, drawn), output.origin(model, 1)()
    settings = {step.name: _settings(model, step, drawn) for step in steps if step.role}
    differences = _differences(drawn, here, settings)
    many = min(drawn.origin["count"], drawn.origin["batch_size"] or max(BATCH_SIZE, here["local_devices"]))
    for copies in dict.fromkeys((1, many)):
        how = Running(drawn.seed, drawn.origin["batch_size"], progress)
        batch: dict = {"number": [drawn.number] * copies, "negative": drawn.negative}
        batch |= {"caption": [drawn.caption] * copies} if drawn.caption else {}
        made, timings = model.run(steps, batch, settings, how)
        images = [made[f"{step.name}.image"][:1] for step in steps if "image" in step.writes]
        embeds = made.get("prior.image_embed", np.zeros((1, 0), np.float32))[:1]
        if same := np.array_equal(images[-1][0], drawn.image):
            break
    used = {name: drawn.settings[name] | values for name, values in settings.items() if name in timings}
    alone = (drawn.caption,), (drawn.number,), drawn.seed
    batch_of = {name: drawn.origin[name] for name in ("count", "batch_size")}
    origin: Callable[[], dict] = functools.partial(dict, here, **batch_of)
    result = Result(*alone, embeds, images[0], images[-1], used, timings, model.name, origin)
    verdict = f"the same picture as {drawn.path}, to the bit"
    if not same:
        verdict = f"not the same picture as {drawn.path}: {_apart(images[-1][0], drawn.image)}"
    changed = differences or ([] if same else ["nothing that the picture names has changed"])
    return result, "; ".join([verdict, *changed])


def _steps(model: Pipeline, drawn: Drawn) -> Sequence[Step]:
    """The steps that drew a picture: without the upsamplers for a base picture."""
    steps = model.steps("draw")
    ran = [i for i, step in enumerate(steps) if step.name in drawn.settings]
    known = drawn.settings.keys() <= {step.name for step in steps}  # else `_settings` says what is missing
    if not ran or not known:
        return steps
    left_out = [i for i, step in enumerate(steps) if step.role and i > ran[-1]]
    return steps[: left_out[0]] if left_out else steps


def _settings(model: Pipeline, step: Step, drawn: Drawn) -> dict:
    """The settings of a step as they were. Raises ValueError for one that the stage does not have."""
    recorded = drawn.settings.get(step.name)
    if recorded is None:
        raise ValueError(
            f"{drawn.path} was drawn without a {step.name}: give --model=DIR of model {drawn.model!r}"
        )
    recorded = {name: value for name, value in recorded.items() if name != "negative"}
    defaults = json.loads(json.dumps(model.engine.stage(step.stage).sampling))
    try:
        changes = {name: value for name, value in recorded.items() if value != defaults.get(name, ())}
        return of_step(model.engine, step, **changes)
    except ValueError as error:
        raise ValueError(f"{drawn.path} cannot be drawn again: {error}") from None


def _differences(drawn: Drawn, here: dict, settings: dict) -> list[str]:
    """What is not as it was: weights, versions, devices, settings."""
    found = [
        f"the weights of {name} are others (sha256 {now[:8]}, then {then[:8]})"
        for name, now in here["weights"].items()
        if (then := drawn.origin["weights"].get(name, "none")) != now
    ]
    was = drawn.origin["versions"] | {"devices": drawn.origin["devices"]}
    now = here["versions"] | {"devices": here["devices"]}
    found += [f"{name} is {now[name]}, then {value}" for name, value in was.items() if now.get(name) != value]
    for step, values in json.loads(json.dumps(settings)).items():
        then = drawn.settings[step]
        names = [name for name in values | then if values.get(name) != then.get(name) and name != "negative"]
        found += [f"{step}.{name} is {values.get(name)}, then {then.get(name)}" for name in names]
    return found


def _apart(one: np.ndarray, other: np.ndarray) -> str:
    """How much two pictures differ."""
    if one.shape != other.shape:
        return f"{one.shape[1]} x {one.shape[0]} pixels, then {other.shape[1]} x {other.shape[0]}"
    apart = np.abs(one.astype(int) - other)
    return f"{100 * (apart > 0).mean():.2g} % of its numbers differ, by up to {apart.max()} of 255"
