"""One stage of a model directory, trained on: for weights of others that `dalle2_jax.convert` has read.

    python -m dalle2_jax.train --config=configs/finetune.py:MODEL/STAGE --workdir=DIR
    --config.data.path=SHARDS

The architecture is what MODEL/STAGE/config.json says, parameters start from that folder's. Prior and decoder
read the embeddings of the CLIP beside it, stages of Imagen and IF the states of the T5 beside it. MODEL is a
folder, hf://OWNER/NAME@COMMIT, or the name of a model of the package. The numbers are a beginning for small
data: 1000 steps of 32 pictures at a constant rate. `--config.model.remat=all` and
`--config.model.dtype=bfloat16` save memory. Without a folder it trains the decoder of `scenes` on.
"""

import json
from pathlib import Path

from dalle2_jax.configs import common
from dalle2_jax.runtime import hub


def get_config(preset: str = ""):
    """`preset`: a stage's folder in a model directory, '' for the decoder of the package's scenes."""
    model, _, name = (preset.rstrip("/") or "scenes/decoder").rpartition("/")
    model = str(hub.packaged(model) or model or ".")
    where = f"{model}/{name}"
    folder = Path(hub.local(where))
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"preset {preset!r} is unknown: give a stage's folder in a model directory, such as MODEL/decoder"
        )
    stored = json.loads((folder / "config.json").read_text())
    config = common.get_config()
    config.stage = stored["stage"]
    config.model = {"dtype": "float32"} | stored["model"] | {"remat": "none"}
    config.init_from = where
    text = stored["model"].get("text") or {}
    reads_embeds = stored["stage"] == "decoder" and stored["model"].get("embed_dim", 1) > 0
    if reads_embeds or stored["stage"] in ("prior", "ar_prior"):
        config.clip = model
    elif text.get("states_width"):
        config.frozen.t5 = model
    elif (folder.parent / "tokenizer").is_dir():
        config.tokenizer.path = f"{model}/tokenizer"
    config.data.classes = tuple(stored.get("data", {}).get("classes", ()))
    config.tokenizer.context_length = text.get("context_length", 77)
    config.tokenizer.vocab_size = text.get("vocab_size", 49408)
    config.optim.update(learning_rate=1e-5, warmup_steps=0)
    config.batch_size = 32
    config.num_steps = 1000
    config.ema_decay = 0.999
    config.log_every, config.checkpoint_every = 10, 200
    config.eval_every, config.sample_every = 200, 200
    return config
