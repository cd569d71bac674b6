"""Training is the same on every mesh, and really split: every kind of stage, by the step of the loop."""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.modern import common as modern
from dalle2_jax.models import models
from dalle2_jax.runtime import modeldir, partition
from dalle2_jax.train import checks
from dalle2_jax.train.plan import Plan
from tests import tiny_model

BATCH = 16
MESHES = {"8x1": (8, 1, 1), "1x8": (1, 8, 1), "2x4": (2, 4, 1), "2x2x2": (2, 2, 2)}
# What of the preset `debug` is other here. A replica of SAM has to fit a device's part of the batch; a loop
# over blocks has more than one.
VIT = dict(kind="vit", patch_size=8, width=32, depth=2, num_heads=2)
CHANGES = {"clip": dict(sam_batch_size=2, vision=VIT)}
CHANGES["clip scanned"] = CHANGES["clip"] | dict(scan_blocks=True)
CHANGES["pixels"] = dict(
    net=dict(modern.DEBUG, kind="vit"),
    text=dict(vocab_size=512, context_length=32, width=32, depth=2, num_heads=2),
)
CHANGES["pixels scanned"] = {name: dict(part, scan_blocks=True) for name, part in CHANGES["pixels"].items()}
CHANGES["decoder64 resampled"] = dict(net=dict(resample="conv"))
CHANGES["upsampler efficient"] = dict(scale_shift=False, net=dict(efficient=True))
TOKENIZER = dict(
    image_size=16,
    net=dict(kind="vqvae", channels=16, residual_channels=8, num_res_blocks=1, strides=(4, 2)),
    quantizer=dict(kind="vq", num_codes=16, width=8, restart=0.1),
)
# A ReLU whose input is near zero would turn rounding into a step of the gradient: here none is.
CHANGES["tokenizer dvae"] = dict(
    net=dict(kind="dvae", channels=16, num_groups=3, num_blocks=1),
    quantizer=dict(kind="gumbel", num_codes=16, width=12, beta=(1.0, 1.0, 1)),
)
CHANGES["tokenizer vqgan"] = dict(
    net=dict(kind="vqgan", channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(8,)),
    quantizer=dict(kind="vq", num_codes=16, width=8, decay=0.0),
    likelihood="l1",
    adversarial=dict(start=0, features="discriminator", widths=(8, 16)),
)
_NET = dict(width=16, hidden=16, num_blocks=1, num_res_blocks=1, num_heads=2, kernel=3, out_blocks=1)
PIXELSNAIL = dict(
    grids=((2, 2), (4, 4)), num_codes=(16, 16), nets=(_NET, _NET | dict(upper_blocks=1)), num_classes=3
)
DALLE_MINI = dict(
    text=dict(vocab_size=512, context_length=32),
    net=dict(width=16, depth=2, num_heads=2, hidden=24),
    grids=((4, 4),),
    num_codes=(16,),
    num_ids=18,  # eight devices do not divide it: the table is split over the width
    start_code=16,
)
STAGES = {"tokenizer": TOKENIZER, "pixelsnail": PIXELSNAIL, "dalle_mini": DALLE_MINI}
KINDS = ("clip", "prior", "ar_prior", "decoder64", "upsampler", "classifier")
KINDS += ("token_model", *STAGES)
QUICK = {("classifier", "2x2x2")}  # transformers on a mesh in every run: tests/models/stages/test_clip.py
# Devices add in another order, which float32 rounds by some 1e-7 of the largest number that is added; a
# gradient goes through tens of such sums one after the other. Measured: up to 4e-6.
ROUNDING = 1e-5


def settings(kind: str) -> dict:
    """The preset `debug` of a kind of stage, in float32, for two steps.

    Adam divides by the gradient's size, which turns the rounding of a gradient near zero into a step of full
    length: an `eps` that is not far below the gradients keeps the parameters comparable.
    """
    recipes = {"upsampler": "upsampler256", "pixels": "modern.decoder64"}
    recipes |= dict.fromkeys(("classifier", *STAGES), "decoder64")
    recipes["token_model"] = "dalle1.token_model"
    recipe = recipes.get(kind.split()[0], kind.split()[0])
    config = models.to_plain(importlib.import_module(f"configs.{recipe}").get_config("debug"))
    if kind == "classifier":
        config |= dict(
            stage="classifier", model=tiny_model.CLASSIFIER | dict(image_size=16, attention_resolutions=[])
        )
        config["data"]["classes"] = ["circle", "square", "star"]
    name = kind.split()[0]
    if name in STAGES:
        config |= dict(stage=name, model=STAGES[name])
    config["batch_size"] = BATCH
    config["model"] |= CHANGES.get(kind, {}) | dict(dtype="float32")
    config["optim"] |= dict(learning_rate=1e-2, beta1=0.9, eps=1e-2, grad_clip=0.0)
    if kind in ("pixelsnail", "tokenizer dvae"):  # gradients of its attention, its blocks are much smaller
        config["optim"]["eps"] = 1e-4
    return config


def examples(stage) -> dict[str, np.ndarray]:
    """A batch of random pictures, captions, embeddings and labels."""
    draw, batch = np.random.default_rng(0), {}
    for name, x in stage.batch_spec(BATCH).items():
        if x.dtype == jnp.float32:
            batch[name] = draw.normal(size=x.shape).astype(np.float32)
        elif x.dtype == bool:
            batch[name] = np.arange(x.shape[1]) < draw.integers(4, x.shape[1], (BATCH, 1))
        else:
            most = {"label": 3, "codes": 16}.get(name, 500)
            batch[name] = draw.integers(0, most, x.shape).astype(np.int32)
    return batch


@functools.cache
def beginning(kind: str) -> tuple:
    """(config, stage, batch, parameters) of a kind of stage, the same for every mesh, scanned or not.

    None of the parameters are zero: a fresh network's last layer is, and passes no gradient on.
    """
    config = settings(kind)
    stage = models.build_stage(config)
    batch = examples(stage)
    params = jax.jit(stage.init, compiler_options=partition.compiler_options(once=True))(
        jax.random.key(0), models.zeros(stage.batch_spec(1))
    )
    if getattr(stage, "fit_rows", 0):
        params, _ = stage.fit(params, lambda: iter([batch]))
    draw = np.random.default_rng(1)
    moved = {
        name: np.asarray(leaf)
        + np.float32(0 if name.startswith("stats/") else 0.05)
        * draw.normal(size=leaf.shape).astype(np.float32)
        for name, leaf in modeldir.flatten(params).items()
    }
    return config, stage, batch, modeldir.unflatten(moved)


@functools.cache
def two_steps(kind: str, sizes: tuple[int, int, int]) -> dict:
    """What two steps on a mesh come to: losses, gradients of the first, parameters before and after; and the
    largest share of a leaf that a device holds."""
    config, stage, batch, params = beginning(kind)
    mesh = partition.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    checks.check_settings(config, stage, mesh)
    with partition.use_mesh(mesh):
        plan = Plan(config, stage, mesh)
        step = plan.jit_step()
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), plan.abstract)  # as Adam begins
        state = state.replace(params=params, ema_params=jax.tree.map(np.copy, params))
        state = jax.device_put(state, plan.shardings)
        shares = {
            name: math.prod(leaf.sharding.shard_shape(leaf.shape)) / leaf.size
            for name, leaf in modeldir.flatten(state.params).items()
        }
        placed = partition.to_global(batch, mesh)
        found = {"before": modeldir.flatten(params), "shares": shares, "losses": []}
        for _ in range(2):
            state, scalars = step(state, placed, {})
            found["losses"].append(float(scalars["loss"]))
            if "gradients" not in found:  # of which Adam's first moment is, after one step, a tenth
                mu = partition.to_host(optax.tree_utils.tree_get(state.opt_state, "mu"))
                found["gradients"] = {name: 10 * x for name, x in modeldir.flatten(mu).items()}
        assert int(state.bad_steps) == 0
        found["after"] = modeldir.flatten(partition.to_host(state.params))
    return found


def farthest(got: dict, expected: dict) -> dict[str, float]:
    """The largest difference of each leaf, by its largest entry.

    The bias of keys is left out: a softmax does not depend on it, so that its gradient is rounding alone.
    """
    return {
        name: float(np.abs(got[name] - x).max() / max(np.abs(x).max(), 1e-30))
        for name, x in expected.items()
        if not name.endswith("/k/bias")
    }


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        pytest.param(kind, mesh, marks=() if (kind, mesh) in QUICK else pytest.mark.slow)
        for kind in KINDS
        for mesh in MESHES
    ]
    + [
        pytest.param(kind, "2x2x2", marks=pytest.mark.slow)
        for kind in (
            *("clip scanned", "pixels", "pixels scanned", "decoder64 resampled", "upsampler efficient"),
            *("tokenizer dvae", "tokenizer vqgan"),
        )
    ],
)
def test_two_steps_on_a_mesh_are_those_of_one_device(kind, mesh):
    alone, here = two_steps(kind.removesuffix(" scanned"), (1, 1, 1)), two_steps(kind, MESHES[mesh])
    np.testing.assert_allclose(here["losses"], alone["losses"], rtol=ROUNDING)
    for what in ("gradients", "after"):
        far = farthest(here[what], alone[what])
        assert max(far.values()) < ROUNDING, (what, sorted(far.items(), key=lambda item: -item[1])[:5])
    for name, far in farthest(alone["after"], alone["before"]).items():  # every leaf has a gradient and moves
        assert name.startswith("stats/") or (far > 10 * ROUNDING and alone["gradients"][name].any()), name
    split = [share for share in here["shares"].values() if share < 1]
    assert bool(split) == (MESHES[mesh][1:] != (1, 1))
    if split:
        assert min(split) == 1 / math.prod(MESHES[mesh][1:])


def test_the_convolutions_of_sams_replicas_are_not_split_over_tensor():
    """XLA's partitioner would end the process."""
    config = settings("clip")
    config["model"] |= dict(vision=dict(kind="resnet", width=8, depths=[1], num_heads=2))

    def check(mesh, **changes):
        changed = config | {"model": config["model"] | changes}
        checks.check_settings(changed, models.build_stage(changed), partition.make_mesh(*MESHES[mesh]))

    with pytest.raises(ValueError, match="over mesh.tensor=2: set mesh.tensor=1, or model.sam_rho=0"):
        check("2x2x2")
    check("2x4")
    check("2x2x2", sam_rho=0.0)
