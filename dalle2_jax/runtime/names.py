"""The nearest valid name, for error messages. Standard library only, so that every floor may import it."""

import difflib
from collections.abc import Callable, Collection, Iterable

# Names of other programs -> the names here, the likeliest first.
SYNONYMS = {
    "batch": ("batch_size",),
    "bs": ("batch_size",),
    "callback_on_step_end": ("progress",),
    "cfg": ("guidance_scale",),
    "cfg_scale": ("guidance_scale",),
    "checkpoint": ("model", "init_from"),
    "ckpt": ("model", "init_from"),
    "count": ("n", "num_samples"),
    "data_path": ("path", "images"),
    "dataset": ("path", "images"),
    "decoder_guidance_scale": ("guidance_scale",),
    "decoder_num_inference_steps": ("steps", "decoder_steps"),
    "devices": ("data",),
    "ema": ("ema_decay",),
    "epochs": ("num_steps",),
    "generator": ("seed",),
    "gradient_accumulation_steps": ("grad_accum",),
    "input": ("path", "images"),
    "iterations": ("num_steps", "steps"),
    "lr": ("learning_rate",),
    "max_steps": ("num_steps", "steps"),
    "negative_prompt": ("negative",),
    "num_images": ("n",),
    "num_images_per_prompt": ("n",),
    "num_inference_steps": ("steps", "decoder_steps"),
    "outdir": ("out", "workdir"),
    "output": ("out", "workdir"),
    "output_dir": ("out", "workdir"),
    "precision": ("dtype",),
    "pretrained": ("init_from", "model"),
    "prior_num_inference_steps": ("prior_steps",),
    "prompt": ("captions", "caption"),
    "resolution": ("image_size",),
    "sampler": ("method",),
    "samples": ("n", "num_samples"),
    "save_every": ("checkpoint_every",),
    "scale": ("guidance_scale",),
    "scheduler": ("method", "schedule"),
    "size": ("image_size",),
    "steps": ("num_steps",),
    "super_res_num_inference_steps": ("upsampler_steps",),
    "train_batch_size": ("batch_size",),
    "warmup": ("warmup_steps",),
    "wd": ("weight_decay",),
    "workers": ("num_workers",),
}


def nearest(name: object, choices: Iterable[str], most: int = 1, show: Callable[[str], str] = repr) -> str:
    """Up to `most` of the choices that resemble `name`, such as "'a' or 'b'"; '' if none does."""
    return " or ".join(map(show, difflib.get_close_matches(str(name), list(choices), n=most)))


def synonym(name: str, known: Collection[str]) -> str:
    """The name among `known` of what other programs call `name`; '' if there is none."""
    return next((ours for ours in SYNONYMS.get(name, ()) if ours in known), "")


def nearest_setting(name: str, settings: Iterable[str]) -> str:
    """The setting 'group.word' whose last word is, means or resembles that of `name`; '' if none does.

    lr -> optim.learning_rate, by `SYNONYMS`. Of several settings with that word the shortest wins.
    """
    last: dict[str, str] = {}
    for setting in sorted(settings, key=len, reverse=True):
        last[setting.rpartition(".")[2]] = setting
    word = name.rpartition(".")[2].replace("-", "_")
    meant = [word, *SYNONYMS.get(word, ()), *difflib.get_close_matches(word, last, n=1)]
    return next((last[candidate] for candidate in meant if candidate in last), "")
