"""The traps that implementations of DALL-E 2 fall into, and the tests that catch them.

Each is planted by replacing a piece of the code in a copy of the repository; the test named beside it must
then fail:

    python tests/traps.py [NUMBER ...]

tests/test_traps.py checks with every run that the pieces are still there, and plants two of them.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("dalle2_jax", "configs", "tests", "pyproject.toml", "setup.py")


@dataclasses.dataclass(frozen=True)
class Trap:
    """What goes wrong, the test that notices, and the replacement of `right` by `wrong` that plants it."""

    number: int
    what: str
    test: str
    file: str
    right: str
    wrong: str


TRAPS = (
    Trap(
        1,
        "the prior's null branch drops the noised embedding with the text",
        "tests/models/nets/test_transformer.py::test_the_null_branch_sees_the_noised_embedding_and_no_text",
        "dalle2_jax/models/nets/transformer.py",
        'dense(self.width, "image_embed_proj")(x_t)',
        'dense(self.width, "image_embed_proj")(jnp.where(drop, 0.0, x_t))',
    ),
    Trap(
        2,
        "rows of tokens without start and end",
        "tests/data/test_tokenizer.py::test_rows_are_well_formed_and_cut_rows_keep_eot",
        "dalle2_jax/data/tokenizer.py",
        "tokens[row, : len(ids) + self._ends] = (*ends[0], *ids, *ends[1])",
        "tokens[row, : len(ids)] = ids",
    ),
    Trap(
        3,
        "guidance extrapolates the variance too",
        "tests/models/diffusion/test_sampling.py::test_guidance_takes_the_variance_from_the_condition_bit_for_bit",
        "dalle2_jax/models/diffusion/guidance.py",
        "return Prediction(x0, eps, cond.var_frac)",
        "return Prediction(x0, eps, cond.var_frac + (scale - 1.0) * (cond.var_frac - uncond.var_frac))",
    ),
    Trap(
        4,
        "the last posterior variance is log 1e-20 and not that of the step before",
        "tests/models/diffusion/test_schedules.py::test_last_log_variance_is_that_of_the_step_before",
        "dalle2_jax/models/diffusion/schedules.py",
        "np.append(inner, inner[-1] if inner.size else log_beta[-1])",
        "np.append(inner, np.log(1e-20))",
    ),
    Trap(
        5,
        "the network is told the index of a step in the place of its time",
        "tests/models/diffusion/test_sampling.py::test_the_denoiser_sees_original_times",
        "dalle2_jax/models/diffusion/sampling.py",
        'return {"t": jnp.asarray(steps.t)} | floats',
        'return {"t": jnp.asarray(np.arange(len(steps.t), dtype=np.int32)[::-1])} | floats',
    ),
    Trap(
        6,
        "a walk ends at the first noisy time and not at the clean end",
        "tests/models/diffusion/test_sampling.py::test_an_oracle_gives_back_the_data_exactly",
        "dalle2_jax/models/diffusion/schedules.py",
        "alpha_bar_s = np.append(alpha_bar_t[1:], 1.0)",
        "alpha_bar_s = np.append(alpha_bar_t[1:], schedule.alpha_bar[0] ** 0.5)",
    ),
    Trap(
        7,
        "17.2 is used for embeddings of every size",
        "tests/models/stages/test_prior.py::test_scaled_embeddings_have_the_standard_deviation_of_their_mode",
        "dalle2_jax/models/stages/prior.py",
        "return std * math.sqrt(self.embed_dim) or 1.0",
        "return (17.2 if self.mode == 'paper' else std * math.sqrt(self.embed_dim)) or 1.0",
    ),
    Trap(
        8,
        "the prior's samples stay in the scale of the noise",
        "tests/models/stages/test_prior.py::test_eight_embeddings_are_learned",
        "dalle2_jax/models/stages/prior.py",
        "z = self.embed_scale.inverse(params, z)",
        "z = z * 1",
    ),
    Trap(
        9,
        "a dropped image embedding is still added to the time embedding",
        "tests/models/stages/test_decoder.py::test_a_dropped_image_embedding_is_dropped_from_both_paths",
        "dalle2_jax/models/nets/denoiser.py",
        "emb = self.image_emb_proj(z)",
        "emb = self.image_emb_proj(image_embed * self.embed_dim**0.5)",
    ),
    Trap(
        10,
        "the ids of padding reach the decoder",
        "tests/models/stages/test_decoder.py::test_ids_of_padding_do_not_matter",
        "dalle2_jax/models/nets/denoiser.py",
        "states = self.text_net(text, token_mask & ~drop_text[:, None])",
        "states = self.text_net(text, jnp.ones_like(token_mask) & ~drop_text[:, None])",
    ),
    Trap(
        11,
        "q, k and v are interleaved by head and not in blocks (noticed where torch is installed)",
        "tests/models/nets/test_transformer.py::test_blocks_equal_torch_encoder_layers",
        "dalle2_jax/models/nets/causal.py",
        "q, k, v = (layers.split_heads(y, width // self.num_heads) for y in jnp.split(qkv, 3, axis=-1))",
        "q, k, v = jnp.split(layers.split_heads(qkv, 3 * width // self.num_heads), 3, axis=-1)",
    ),
    Trap(
        12,
        "additive blocks have the projection of scale-and-shift ones",
        "tests/models/nets/test_unet.py::test_additive_blocks_have_half_the_projection",
        "dalle2_jax/models/nets/unet.py",
        "width = 2 * self.channels if self.scale_shift else self.channels",
        "width = 2 * self.channels",
    ),
    Trap(
        13,
        "the angle between two vectors is taken entry by entry",
        "tests/test_editing.py::test_slerp_walks_the_great_circle_at_even_angles",
        "dalle2_jax/edit/latents.py",
        "cosine = np.vdot(a, b) / max(",
        "cosine = (a * b) / max(",
    ),
    Trap(
        14,
        "DDIM inversion stops short of pure noise",
        "tests/models/diffusion/test_sampling.py::test_inversion_of_known_noise_finds_it",
        "dalle2_jax/models/diffusion/sampling.py",
        "alpha_bar_next = np.append(alpha_bar[1:], 0.0)",
        "alpha_bar_next = np.append(alpha_bar[1:], 0.5)",
    ),
    Trap(
        15,
        "what the mask keeps is drawn anew, and what it marks is kept",
        "tests/models/diffusion/test_sampling.py::test_what_is_known_comes_back_and_the_rest_is_drawn",
        "dalle2_jax/models/diffusion/guidance.py",
        "return kept\n",
        "mask = 1 - mask\n    return kept\n",
    ),
    Trap(
        16,
        "sampling shows the network noisier inputs than training did (nothing here conditions on itself)",
        "tests/models/diffusion/test_sampling.py::test_sampling_shows_the_network_what_training_showed_it",
        "dalle2_jax/models/diffusion/sampling.py",
        "np.maximum(1.0 - steps.alpha_bar_s - sigma**2, 0.0)",
        "np.maximum(1.0 - steps.alpha_bar_s, 0.0)",
    ),
    Trap(
        17,
        "the window of the small picture lies beside that of the target",
        "tests/models/stages/test_upsampler.py::test_the_input_is_the_targets_window_of_the_enlarged_picture",
        "dalle2_jax/models/stages/conditions.py",
        'windows = self.enlarged_windows(low_res, batch["crop_yx"],',
        'windows = self.enlarged_windows(low_res, batch["crop_yx"][:, ::-1],',
    ),
    Trap(
        18,
        "the average is kept in bfloat16, where it never moves",
        "tests/test_state.py::test_the_average_has_its_closed_form",
        "dalle2_jax/train/step.py",
        "else e + (1 - decay) * (p - e),",
        "else (e + (1 - decay) * (p - e)).astype(jnp.bfloat16).astype(e.dtype),",
    ),
    Trap(
        19,
        "CLIP's temperature grows without bound",
        "tests/models/stages/test_clip.py::test_temperature_starts_at_0_07_and_never_exceeds_100",
        "dalle2_jax/models/stages/clip.py",
        'jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)',
        'params["logit_scale"]',
    ),
    Trap(
        20,
        "features are pooled as though their mean were zero",
        "tests/evaluate/test_distances.py::test_frechet_distance_is_right",
        "dalle2_jax/evaluate/distances.py",
        "return Moments(mean, (x - mean).T @ (x - mean) / (len(x) - 1))",
        "return Moments(mean, x.T @ x / (len(x) - 1))",
    ),
)


def missing() -> list[str]:
    """The traps that could not be planted, as the code that they replace is not there exactly once."""
    lines = []
    for trap in TRAPS:
        count = (ROOT / trap.file).read_text("utf-8").count(trap.right)
        if count != 1:
            lines.append(f"trap {trap.number}: {trap.file} holds {trap.right!r} {count} times")
    return lines


def run(trap: Trap) -> subprocess.CompletedProcess:
    """The trap's test, run by pytest in a copy of the repository in which the trap is planted."""
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder) / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
                shutil.copytree(source, target, ignore=ignored)
            elif source.exists():
                shutil.copy(source, target)
        path = Path(folder) / trap.file
        path.write_text(path.read_text("utf-8").replace(trap.right, trap.wrong), "utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", trap.test]
        environment = os.environ | {"PYTHONPATH": folder}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def caught(trap: Trap) -> bool:
    """Whether a test failed; a collection that broke, or found nothing, counts as nothing."""
    result = run(trap)
    return result.returncode == 1 and " failed" in result.stdout


def main() -> int:
    chosen = {int(number) for number in sys.argv[1:]}
    problems = missing()
    for trap in TRAPS:
        if chosen and trap.number not in chosen:
            continue
        found = caught(trap)
        print(
            f"{trap.number:2d} {'caught' if found else 'NOT CAUGHT':10s} {trap.what}: {trap.test}", flush=True
        )
        if not found:
            problems.append(f"trap {trap.number}")
    print("\n".join(problems))
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
