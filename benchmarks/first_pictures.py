"""python -m benchmarks.first_pictures ours|peer FOLDER

One side of `benchmarks.compare` draws BATCH pictures with its model in FOLDER. The last line is the peak
memory of the process in bytes, null if unknown. Each side imports its packages inside its function.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

CAPTION, BATCH = "a red star", 8
STEPS = dict(prior=10, decoder=5, upsampler=3)
GUIDANCE = dict(prior=4.0, decoder=8.0)


def ours(folder: Path) -> Callable[[], None]:
    """Loads the model directory FOLDER/ours. Returns a function that draws BATCH pictures."""
    from dalle2_jax import pipeline
    from dalle2_jax.runtime import partition

    partition.initialise()
    model = pipeline.UnCLIP.load(folder / "ours")
    settings = {f"{role}_steps": [n] if role == "upsampler" else n for role, n in STEPS.items()}
    settings |= dict(guidance_scale=GUIDANCE["decoder"], prior_guidance_scale=GUIDANCE["prior"])

    def run():
        model.text_to_image([CAPTION], n=BATCH, prior_candidates=1, **settings)

    return run


def peer(folder: Path) -> Callable[[], None]:
    """The same with diffusers' UnCLIPPipeline, from FOLDER/theirs."""
    import diffusers
    import transformers
    from diffusers.pipelines.deprecated.unclip import text_proj

    # Part by part: diffusers no longer finds the projections by the name in its folders.
    parts = json.loads((folder / "theirs" / "model_index.json").read_text())
    parts = {name: of for name, of in parts.items() if not name.startswith("_")}
    modules = dict(diffusers=diffusers, transformers=transformers)
    parts = {
        name: getattr(modules.get(module, text_proj), kind).from_pretrained(folder / "theirs" / name)
        for name, (module, kind) in parts.items()
    }
    model = diffusers.UnCLIPPipeline(**parts)
    model.set_progress_bar_config(disable=True)

    def run():
        model(
            CAPTION,
            num_images_per_prompt=BATCH,
            prior_num_inference_steps=STEPS["prior"],
            decoder_num_inference_steps=STEPS["decoder"],
            super_res_num_inference_steps=STEPS["upsampler"],
            prior_guidance_scale=GUIDANCE["prior"],
            decoder_guidance_scale=GUIDANCE["decoder"],
        )

    return run


def peak_memory() -> int | None:
    """Bytes of this process; None: not on Linux. (A child's `ru_maxrss` begins with its parent's.)"""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    dict(ours=ours, peer=peer)[sys.argv[1]](Path(sys.argv[2]))()
    print(json.dumps(peak_memory()))
