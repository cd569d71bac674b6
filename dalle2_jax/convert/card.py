"""The model card: README.md of a model directory or of a folder for diffusers, written on export.

It lists the stages, their settings, training data and steps, the weights that they were converted from with
checksums, and the licence.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dalle2_jax.runtime import modeldir

UNKNOWN = "not stated: ask the makers of these weights"
# How to use the files, by library.
USES = {
    "dalle2_jax": (
        "bash",
        'python -m dalle2_jax.generate --model=THIS_FOLDER "a red star above a blue ring" --out=pictures',
    ),
    "diffusers": (
        "python",
        'pipeline = diffusers.DiffusionPipeline.from_pretrained("THIS_FOLDER")\n'
        'pipeline("a red star above a blue ring").images[0].save("picture.png")',
    ),
    "transformers": ("python", 'model = transformers.CLIPModel.from_pretrained("THIS_FOLDER")'),
}


def model_card(index: Mapping[str, Any], stages: Mapping[str, tuple], library: str = "dalle2_jax") -> str:
    """The text of a card.

    Args:
      index: values of model_index.json: name, dalle2_jax_version, trained_steps, made_from, licence.
      stages: folder -> (stored config, parameters, or anything with their shapes).
      library: the library that reads the files, one of USES.
    """
    licence, made_from = index.get("licence", ""), index.get("made_from")
    front = ["---", f"license: {_identifier(licence)}", f"library_name: {library}"]
    front += ["pipeline_tag: text-to-image"] * ("decoder" in stages)
    lines = [*front, "tags: [unclip, dalle-2, jax]", "---", "", f"# {index.get('name', 'A model')}", ""]
    lines += [
        f"A {'DALL·E 2 (unCLIP) ' * ('prior' in stages)}model, written by dalle2_jax "
        f"{index.get('dalle2_jax_version', '(version unknown)')}.",
        "",
        "| stage | kind | parameters | steps trained | trained on |",
        "|---|---|---|---|---|",
    ]
    steps = index.get("trained_steps", {})
    for folder, (config, params) in stages.items():
        count = sum(math.prod(np.shape(leaf)) for leaf in modeldir.flatten(params).values())
        data = _data(config) or ("see its makers" if made_from else "not recorded")
        trained = steps.get(folder)
        lines.append(
            f"| `{folder}` | {config['stage']} | {count:,} | {'' if trained is None else trained} | {data} |"
        )
    language, use = USES[library]
    lines += ["", f"```{language}", use, "```", "", "## Licence", "", licence or UNKNOWN, ""]
    if made_from:
        lines += ["## Made from", "", f"Weights of the format `{made_from['format']}`:", ""]
        lines += ["| file | sha256 |", "|---|---|"]
        lines += [f"| `{name}` | `{checksum}` |" for name, checksum in made_from["sha256"].items()]
        lines += [""]
    lines += ["## Settings", ""]
    for folder, (config, _) in stages.items():
        settings = json.dumps(config["model"], ensure_ascii=False, sort_keys=True)
        lines += [f"`{folder}`:", "", "```json", settings, "```", ""]
    return "\n".join(lines)


def _identifier(licence: str) -> str:
    """The hub's identifier of a licence: a single word as it is, a sentence as 'other'."""
    return licence.lower() if re.fullmatch(r"[\w.+-]+", licence) else "other" if licence else "unknown"


def _data(config: Mapping[str, Any]) -> str:
    """The data set in a training config; '' for a config without."""
    data = config.get("data") or {}
    words = [str(data[name]) for name in ("source", "path") if data.get(name)]
    return ", ".join(words).replace("|", " ")
