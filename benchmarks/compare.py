"""python -m benchmarks.compare --data=SHARDS --json=FILE [--cases=decoder_step,end_to_end] [--rounds=7]

Times ours and the usual alternative in turn in one process on the same work, so that other load falls on
both. The peers are diffusers' and transformers' networks in eager PyTorch on all cores; ours are converted
from them. Needs the extras `oracle` and `train`; run it from the repository's root, on an idle machine.

It makes the table of docs/performance.md: five rounds of each case, three of starts, seven of data, or
--rounds of all. The data cases read tar shards train-*.tar in the folder --data.

Memory is the peak of one run above the memory before it, weights included, in a process for each side; of a
start it is the peak of the process.

The two sides must agree: parameters within 2 %, FLOPs within 5 % (data and checkpoints have none), and the
same batch, steps, precision and guidance. The ratio is peer / ours of medians: above 1 ours is faster. The
spread is the larger of the two interquartile ranges over the median; above --max_spread there is no ratio.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import first_pictures
from benchmarks.first_pictures import BATCH, CAPTION, GUIDANCE, STEPS
from benchmarks.paired import HEADER, MAX_SPREAD, Case, Side, added_memory, measure
from dalle2_jax import benchmark
from dalle2_jax.models import flops, models
from dalle2_jax.runtime import checkpoint, files, machine, partition
from dalle2_jax.train.plan import Plan, cpu_products

EMBED, LENGTH, SIDE, LARGE = 128, 16, 32, 64


# Both models


class Models:
    """UnCLIPPipeline with random weights, and the model directory converted from it, in a folder."""

    def __init__(self, folder: Path):
        from dalle2_jax.convert import convert
        from tests.convert import unclip_pipeline

        self.folder, self.mesh = folder, partition.make_mesh()
        sizes = dict(embed=EMBED, length=LENGTH, side=SIDE, large=LARGE, heads=16, depth=4)
        self.theirs = unclip_pipeline.write(folder / "theirs", **sizes)
        convert.convert_weights("karlo", folder / "theirs", folder / "ours", dtype="float32")

    @functools.cached_property
    def texts(self):
        """(text_embed, text_states, token_mask) of BATCH captions, in torch."""
        import torch

        with torch.no_grad():
            return self.theirs._encode_prompt([CAPTION] * BATCH, "cpu", 1, False)

    def stage(self, role: str):
        """(stage, config, parameters) of ours."""
        return models.load_stage(self.folder / "ours", role)


def precision_of(*modules) -> str:
    """The type of the parameters of torch modules, in which they compute."""
    found = {str(p.dtype).removeprefix("torch.") for module in modules for p in module.parameters()}
    return ", ".join(sorted(found))


def parameters_of(*modules) -> int:
    """The number of parameters of torch modules."""
    return sum(p.numel() for module in modules for p in module.parameters())


def flops_of(run: Callable[[], object]) -> int:
    """FLOPs of torch's products and convolutions in `run`, counted as by `models.flops`."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run()
    return counter.get_total_flops()


def normal(*shape, seed=0) -> np.ndarray:
    """Float32 noise."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def torch_step(modules, forward: Callable, inputs: dict) -> Side:
    """Training steps of torch modules with loss forward(**inputs), AdamW, clipping and averaged parameters.

    Moments and average exist before the first run, as ours do.
    """
    import torch

    weights = [p for module in modules for p in module.parameters()]
    average = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0, fused=True)
    for p in weights:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # creates the moments, changes nothing
    optimizer.zero_grad(set_to_none=True)
    for module in modules:
        module.train()

    def run(bfloat16=False):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = forward(**inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in weights], 1e-3)
        loss.item()

    arithmetic = flops.TRAINING_PASSES * flops_of(lambda: forward(**inputs))
    autocast = functools.partial(run, bfloat16=True) if machine.has_fast_bfloat16() else None
    precision = precision_of(*modules)
    return Side(run, BATCH, parameters_of(*modules), arithmetic, precision=precision, autocast=autocast)


def our_step(stage, stored: dict, mesh) -> Side:
    """The training step of `dalle2_jax.train` for a stage."""
    from configs import common

    settings = dict(stage=stored["stage"], model=stored["model"], batch_size=BATCH, num_steps=1000)
    config = models.to_plain(common.get_config()) | settings
    config["optim"]["warmup_steps"] = 0
    plan = Plan(config | {"cpu_products": cpu_products(config, mesh)}, stage, mesh)
    batch = benchmark.synthetic_batch(plan, BATCH)
    with partition.use_mesh(mesh):
        step, _, _, arithmetic = benchmark.training_step(plan, batch)

    def run():
        with partition.use_mesh(mesh):
            jax.block_until_ready(step())

    precision = config["model"].get("dtype", "float32")
    return Side(run, BATCH, count_of(plan.abstract.params), arithmetic, precision=precision)


def count_of(params) -> int:
    """The number of parameters of a tree, without statistics."""
    kept = {k: v for k, v in params.items() if k != "stats"} if isinstance(params, dict) else params
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(kept))


def our_sampling(m: Models, role: str, batch: dict, steps: int, guidance: float) -> Side:
    """Sampling with a stage of ours."""
    stage, stored, params = m.stage(role)
    keys = jax.random.split(jax.random.key(0), BATCH)
    settings = dict(num_steps=steps) | (dict(guidance_scale=guidance) if guidance != 1 else {})
    settings |= dict(num_candidates=1) if role == "prior" else {}

    def sample(params, keys, batch):
        return stage.sample(params, keys, batch, **settings)

    arithmetic = flops.count(sample, params, keys, batch)
    if role == "prior":
        arithmetic = of_whole_sequences(stage, params, arithmetic, steps, BATCH * (2 if guidance != 1 else 1))
    run = compiled(m, sample, params, keys, batch)
    precision = stored["model"].get("dtype", "float32")
    return Side(run, BATCH, count_of(params), arithmetic, steps, precision, guidance)


def compiled(m: Models, function: Callable, params: dict, *inputs) -> Callable[[], None]:
    """Runs function(params, *inputs), compiled, with the inputs split over the mesh, and waits for it."""
    split = partition.batch_sharding(m.mesh)
    arguments = jax.device_put(params, partition.replicated(m.mesh)), *jax.device_put(inputs, split)
    with partition.use_mesh(m.mesh):
        jitted = jax.jit(function, out_shardings=split, compiler_options=partition.compiler_options())
        program = jitted.lower(*arguments).compile()
    return lambda: jax.block_until_ready(program(*arguments))


def of_whole_sequences(stage, params: dict, counted: int, steps: int, rows: int) -> int:
    """FLOPs of `steps` passes of a prior's network over `rows` whole sequences, as the peer computes them.

    Ours computes the captions once and caches them: raises ValueError unless `counted`, the FLOPs of its
    program, are those of the captions and of `steps` steps.
    """
    net, batch = params["net"], stage.batch_spec(rows)
    text = batch["text_states" if stage.states_width else "tokens"]
    text = batch["text_embed"], text, batch["token_mask"], jax.ShapeDtypeStruct((rows,), bool)
    noised = batch["image_embed"], jax.ShapeDtypeStruct((rows,), jnp.int32)
    reading, cache = flops.count(stage.net.read, net, *text), jax.eval_shape(stage.net.read, net, *text)

    def step(net, cache, x_t, t):
        return stage.net.apply({"params": net} | cache, x_t, t)

    a_step = flops.count(step, net, cache, *noised)
    if counted != reading + steps * a_step:
        raise ValueError(
            f"the prior's program has {counted} FLOPs in the place of {reading + steps * a_step}: "
            f"captions read once, {reading}, and {steps} steps of {a_step}"
        )
    return steps * flops.of_step(stage, batch) // flops.TRAINING_PASSES


def torch_sampling(scheduler, network: Callable, modules, shape, steps: int, guidance: float) -> Side:
    """A loop of diffusers' scheduler over network(x_t, t)."""
    import torch

    def run():
        x, times = torch.from_numpy(normal(*shape)), scheduler.timesteps
        for t, before in itertools.zip_longest(times, times[1:]):
            x = scheduler.step(network(x, t), timestep=t, sample=x, prev_timestep=before).prev_sample

    def drawing():
        scheduler.set_timesteps(steps)
        with torch.no_grad():
            run()

    arithmetic, precision = flops_of(drawing), precision_of(*modules)
    return Side(drawing, BATCH, parameters_of(*modules), arithmetic, steps, precision, guidance)


def guided(output, scale: float, channels: int):
    """Guidance of a doubled batch, null conditions first; channels after `channels` are the variance."""
    import torch

    null, conditional = output.chunk(2)
    mean = null[:, :channels] + scale * (conditional[:, :channels] - null[:, :channels])
    return torch.cat([mean, conditional[:, channels:]], dim=1)


# Cases


def decoder_step(m: Models) -> Case:
    """diffusers' UNet2DConditionModel with UnCLIP's projections; the loss is the squared error alone."""
    import torch

    decoder, project = m.theirs.decoder, m.theirs.text_proj
    embed, states, mask = m.texts
    mask = torch.nn.functional.pad(mask, (4, 0), value=True)
    x, z = torch.from_numpy(normal(BATCH, 3, SIDE, SIDE)), torch.from_numpy(normal(BATCH, EMBED))

    def loss(x, z):
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (BATCH,))
        x_t = m.theirs.decoder_scheduler.add_noise(x, noise, t)
        context, added = project(
            image_embeddings=z,
            prompt_embeds=embed,
            text_encoder_hidden_states=states,
            do_classifier_free_guidance=False,
        )
        out = decoder(x_t, t, context, class_labels=added, attention_mask=mask).sample
        return torch.nn.functional.mse_loss(out[:, :3], noise)

    peer = torch_step((decoder, project), loss, dict(x=x, z=z))
    stage, stored, _ = m.stage("decoder")
    return Case("decoder_step", our_step(stage, stored, m.mesh), peer)


def prior_step(m: Models) -> Case:
    """diffusers' PriorTransformer."""
    import torch

    prior, (embed, states, mask) = m.theirs.prior, m.texts
    z = torch.from_numpy(normal(BATCH, EMBED))

    def loss(z):
        noise, t = torch.randn_like(z), torch.randint(0, 1000, (BATCH,))
        z_t = m.theirs.prior_scheduler.add_noise(z, noise, t)
        return torch.nn.functional.mse_loss(prior(z_t, t, embed, states, mask).predicted_image_embedding, z)

    stage, stored, _ = m.stage("prior")
    return Case("prior_step", our_step(stage, stored, m.mesh), torch_step((prior,), loss, dict(z=z)))


def upsampler_step(m: Models) -> Case:
    """diffusers' UNet2DModel, as UnCLIP's first upsampler."""
    import torch

    net = m.theirs.super_res_first
    x, low = torch.from_numpy(normal(BATCH, 3, LARGE, LARGE)), torch.from_numpy(normal(BATCH, 3, SIDE, SIDE))

    def loss(x, low):
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (BATCH,))
        x_t = m.theirs.super_res_scheduler.add_noise(x, noise, t)
        up = torch.nn.functional.interpolate(low, size=[LARGE, LARGE], mode="bicubic", antialias=True)
        return torch.nn.functional.mse_loss(net(torch.cat([x_t, up], dim=1), t).sample, noise)

    _, stored, _ = m.stage(f"upsampler{LARGE}")
    stored["model"] |= dict(last_step=False, crop_size=LARGE)
    stage = models.build_stage(stored)
    return Case(
        "upsampler_step", our_step(stage, stored, m.mesh), torch_step((net,), loss, dict(x=x, low=low))
    )


def clip_step(m: Models) -> Case:
    """transformers' CLIPModel."""
    import torch
    import transformers

    from dalle2_jax.convert import convert
    from tests.convert import clip_tokenizer

    folder = m.folder / "clip"
    vocab = clip_tokenizer.write(folder / "theirs")
    common = dict(num_hidden_layers=4, hidden_act="quick_gelu")
    text = dict(hidden_size=128, intermediate_size=512, num_attention_heads=2, vocab_size=vocab)
    text |= dict(
        max_position_embeddings=LENGTH, bos_token_id=vocab - 2, eos_token_id=vocab - 1, pad_token_id=0
    )
    vision = dict(hidden_size=256, intermediate_size=1024, num_attention_heads=4, image_size=32, patch_size=4)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=common | text, vision_config=common | vision, projection_dim=EMBED
        )
    )
    model.save_pretrained(folder / "theirs")
    convert.convert_weights("hf-clip", folder / "theirs", folder / "ours", dtype="float32")
    stage, stored, _ = models.load_stage(folder / "ours", "clip")
    tokens = np.random.default_rng(0).integers(1, vocab - 2, (BATCH, LENGTH))
    tokens[:, 0], tokens[:, -1] = vocab - 2, vocab - 1
    inputs = dict(pixel_values=torch.from_numpy(normal(BATCH, 3, 32, 32)), input_ids=torch.from_numpy(tokens))

    def loss(**inputs):
        return model(**inputs, return_loss=True).loss

    return Case("clip_step", our_step(stage, stored, m.mesh), torch_step((model,), loss, inputs))


def transformer_step(m: Models) -> Case:
    """The transformer on patches, written out in torch."""
    import torch

    from benchmarks.torch_vit import PixelViT

    size = dict(width=192, depth=6, num_heads=6)
    net = PixelViT(SIDE, 2, *size.values())
    x = torch.from_numpy(normal(BATCH, 3, SIDE, SIDE))

    def loss(x):
        u, noise = torch.rand(BATCH), torch.randn_like(x)
        at = u[:, None, None, None]
        return torch.nn.functional.mse_loss(net((1 - at) * x + at * noise, 1000 * u), x)

    settings = dict(kind="vit", patch_size=2, bottleneck=0, **size)
    model = dict(image_size=SIDE, embed_dim=0, objective="x0", schedule="flow", learned_variance=False)
    stored = dict(stage="decoder", model=model | dict(dropout=0.0, net=settings))
    ours = our_step(models.build_stage(stored), stored, m.mesh)
    return Case("transformer_step", ours, torch_step((net,), loss, dict(x=x)))


def _text_batch(m: Models) -> dict:
    names = ("text_embed", "text_states", "token_mask")
    return {name: value.numpy() for name, value in zip(names, m.texts, strict=True)}


def _both_texts(m: Models):
    """(embeds, states, mask) of null captions and then captions."""
    import torch

    with torch.no_grad():
        return m.theirs._encode_prompt([CAPTION] * BATCH, "cpu", 1, True)


def prior_sampling(m: Models) -> Case:
    """diffusers' PriorTransformer with UnCLIPScheduler, as UnCLIPPipeline has them."""
    prior, (embed, states, mask) = m.theirs.prior, _both_texts(m)
    scale, steps = GUIDANCE["prior"], STEPS["prior"]

    def network(x, t):
        out = prior(x.repeat(2, 1), t, embed, states, mask).predicted_image_embedding
        return guided(out, scale, EMBED)

    prior.eval()
    peer = torch_sampling(m.theirs.prior_scheduler, network, (prior,), (BATCH, EMBED), steps, scale)
    return Case("prior_sampling", our_sampling(m, "prior", _text_batch(m), steps, scale), peer)


def decoder_sampling(m: Models) -> Case:
    """diffusers' UNet2DConditionModel with UnCLIPScheduler, as UnCLIPPipeline has them."""
    import torch

    decoder, project, (embed, states, mask) = m.theirs.decoder, m.theirs.text_proj, _both_texts(m)
    scale, steps, z = GUIDANCE["decoder"], STEPS["decoder"], normal(BATCH, EMBED)
    mask = torch.nn.functional.pad(mask, (4, 0), value=True)
    with torch.no_grad():
        context, added = project(
            image_embeddings=torch.from_numpy(z),
            prompt_embeds=embed,
            text_encoder_hidden_states=states,
            do_classifier_free_guidance=True,
        )

    def network(x, t):
        both = x.repeat(2, 1, 1, 1)
        out = decoder(both, t, context, class_labels=added, attention_mask=mask).sample
        return guided(out, scale, 3)

    decoder.eval()
    shape = (BATCH, 3, SIDE, SIDE)
    peer = torch_sampling(m.theirs.decoder_scheduler, network, (decoder, project), shape, steps, scale)
    batch = _text_batch(m) | {"image_embed": z}
    return Case("decoder_sampling", our_sampling(m, "decoder", batch, steps, scale), peer)


def upsampler_sampling(m: Models) -> Case:
    """diffusers' two UNet2DModels, the second for the last step, as UnCLIPPipeline has them."""
    import torch

    nets, steps = (m.theirs.super_res_first, m.theirs.super_res_last), STEPS["upsampler"]
    low = normal(BATCH, SIDE, SIDE, 3).clip(-1, 1)
    up = torch.nn.functional.interpolate(
        torch.from_numpy(np.moveaxis(low, -1, 1).copy()), size=[LARGE, LARGE], mode="bicubic", antialias=True
    )
    scheduler = m.theirs.super_res_scheduler

    def network(x, t):
        net = nets[int(t) == int(scheduler.timesteps[-1])]
        return net(torch.cat([x, up], dim=1), t).sample

    for net in nets:
        net.eval()
    peer = torch_sampling(scheduler, network, nets, (BATCH, 3, LARGE, LARGE), steps, 1.0)
    return Case(
        "upsampler_sampling", our_sampling(m, f"upsampler{LARGE}", {"low_res": low}, steps, 1.0), peer
    )


@functools.cache
def end_to_end(m: Models) -> Case:
    """A caption to BATCH pictures by diffusers' UnCLIPPipeline, both loaded and warm.

    The peer's FLOPs are counted in its run; ours are those of the three sampling cases.
    """
    import torch

    parts, (_, _, clip_params) = [make(m).ours for make in SAMPLING_CASES], m.stage("clip")
    ours, peer = first_pictures.ours(m.folder), first_pictures.peer(m.folder)
    modules = [part for part in m.theirs.components.values() if isinstance(part, torch.nn.Module)]
    steps, guidance = sum(STEPS.values()), GUIDANCE["decoder"]
    parameters = count_of(clip_params) + sum(part.parameters for part in parts)
    precision = ", ".join(sorted({part.precision for part in parts}))
    our_flops = sum(part.flops for part in parts)
    return Case(
        "end_to_end",
        Side(ours, BATCH, parameters, our_flops, steps, precision, guidance),
        Side(peer, BATCH, parameters_of(*modules), flops_of(peer), steps, precision_of(*modules), guidance),
        "pictures",
    )


def _start(m: Models, who: str, cache: str) -> tuple[float, int | None]:
    """(seconds from the start of a process to its first pictures, its peak memory in bytes)."""
    environment = os.environ | {"DALLE2_JAX_CACHE": cache}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    began = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.first_pictures", who, str(m.folder)]
    output = subprocess.check_output(command, env=environment, text=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began, json.loads(output.splitlines()[-1])


def _starts(m: Models, name: str, ours: Callable[[], tuple]) -> Case:
    """The pictures of `end_to_end` by new processes."""

    def of(side: Side, start) -> Side:
        return dataclasses.replace(side, run=lambda: start()[0], memory=lambda: start()[1])

    warm = end_to_end(m)
    return Case(name, of(warm.ours, ours), of(warm.peer, lambda: _start(m, "peer", "")), "pictures")


def cold_start(m: Models) -> Case:
    """From the start of a process to its first pictures, with an empty cache of programs."""

    def ours():
        with tempfile.TemporaryDirectory() as empty:
            return _start(m, "ours", empty)

    return _starts(m, "cold_start", ours)


def warm_start(m: Models) -> Case:
    """From the start of a process to its first pictures, with a cache that the first round fills."""
    return _starts(m, "warm_start", lambda: _start(m, "ours", str(m.folder / "cache")))


DATA = dict(count=512, side=64)


def _shards(data: str) -> list[Path]:
    found = sorted(Path(data or "").glob("train-*.tar")) if data else []
    if not found:
        raise ValueError("the cases of the data pipeline need --data=FOLDER of shards train-*.tar")
    return found


def until_idle() -> float:
    """CPU seconds of all threads of this process, once they have been idle for 50 ms."""
    used = time.process_time()
    while True:
        for _ in range(2):  # one may be over at once in a process that was stopped
            time.sleep(0.025)
        before, used = used, time.process_time()
        if used - before < 0.001:
            return used


def _our_images(data: str) -> Callable[[], float]:
    """Reads DATA['count'] pictures with our pipeline; returns CPU seconds of all threads.

    The threads read ahead: between two times at which they are idle they read as many pictures as were taken.
    """
    from dalle2_jax.data import pipeline

    _shards(data)
    dataset = pipeline.make_dataset(
        source="tar", path=data, split="train", fields=("image",), image_size=DATA["side"]
    )

    def run():
        batches = dataset.batches(32)
        next(batches)
        began = until_idle()
        for _ in range(DATA["count"] // 32):
            next(batches)
        return until_idle() - began

    return run


def data_against_torch(m: Models, data: str) -> Case:
    """A torch DataLoader over the same shards: PIL, bicubic, in CPU seconds."""
    import torch
    from PIL import Image

    shards, side = _shards(data), DATA["side"]

    class Shards(torch.utils.data.IterableDataset):
        def __iter__(self):
            for shard in itertools.cycle(shards):
                with tarfile.open(shard) as archive:
                    for member in archive:
                        if member.name.endswith((".png", ".jpg")):
                            picture = Image.open(io.BytesIO(archive.extractfile(member).read()))
                            picture = picture.convert("RGB").resize((side, side), Image.BICUBIC)
                            pixels = torch.from_numpy(np.asarray(picture).copy())
                            yield pixels

    def theirs():
        began = time.process_time()
        loader = iter(torch.utils.data.DataLoader(Shards(), batch_size=32))
        for _ in range(DATA["count"] // 32):
            next(loader)
        return time.process_time() - began

    count = DATA["count"]
    return Case("data_against_torch", Side(_our_images(data), count), Side(theirs, count), "pictures")


def data_against_decoding(m: Models, data: str) -> Case:
    """The same pictures only decoded to RGB, at full size: at 1.00 the rest of the pipeline is free."""
    from dalle2_jax.data import transforms

    ours, decode, decoded = _our_images(data), transforms.decode, []

    def noted(content, **how):
        picture = decode(content, **how)
        decoded.append(content)
        return picture

    with mock.patch.object(transforms, "decode", noted):
        ours()
    chosen = decoded[-DATA["count"] :]  # the others were read before the measurement

    def decoding():
        began = time.process_time()
        for content in chosen:
            transforms.decode(content)
        return time.process_time() - began

    count = DATA["count"]
    return Case("data_against_decoding", Side(ours, count), Side(decoding, count), "pictures")


def checkpoint_blocking(m: Models) -> Case:
    """The time that training waits for a checkpoint of the decoder's state; torch.save of as many numbers."""
    import torch

    _, _, params = m.stage("decoder")
    state = jax.device_put({f"copy{i}": params for i in range(4)}, partition.replicated(m.mesh))
    state = jax.tree.map(jnp.copy, state)
    tensors = [torch.from_numpy(np.array(x)) for x in jax.tree.leaves(state)]
    saver = checkpoint.Checkpointer(m.folder / "workdir", max_to_keep=1)
    steps = itertools.count(1)

    def ours():
        began = time.perf_counter()
        saver.save(next(steps), state, {})
        took = time.perf_counter() - began
        saver.wait()
        return took

    def theirs():
        torch.save(tensors, m.folder / "state.pt")

    count = count_of(params)
    return Case("checkpoint_blocking", Side(ours, 1, 4 * count), Side(theirs, 1, 4 * count), "checkpoints")


def inception_features(m: Models) -> Case:
    """The same network in torch with random weights."""
    import torch

    from dalle2_jax.convert import convert, inception_weights
    from dalle2_jax.evaluate import inception
    from tests.evaluate.torch_inception import random_inception

    theirs, old, out = random_inception(), m.folder / "old.pth", m.folder / "inception.safetensors"
    torch.save(theirs.state_dict(), old, _use_new_zipfile_serialization=False)
    convert.main(["inception", str(old), str(out), "--any_checksum"])
    params = inception_weights.load(out).params
    pictures = normal(BATCH, 299, 299, 3)
    arithmetic = flops.count(inception.features, params, pictures)
    ours = compiled(m, inception.features, params, pictures)
    tensors = torch.from_numpy(np.moveaxis(pictures, -1, 1).copy())

    def run():
        with torch.no_grad():
            theirs(tensors)

    return Case(
        "inception_features",
        Side(ours, BATCH, count_of(params), arithmetic),
        Side(run, BATCH, parameters_of(theirs), flops_of(run)),
        "pictures",
    )


STEP_CASES = (clip_step, prior_step, decoder_step, upsampler_step, transformer_step)
SAMPLING_CASES = (prior_sampling, decoder_sampling, upsampler_sampling)
PICTURE_CASES = (end_to_end, cold_start, warm_start)
OTHER_CASES = (data_against_torch, data_against_decoding, checkpoint_blocking, inception_features)
CASES = {made.__name__: made for made in STEP_CASES + SAMPLING_CASES + PICTURE_CASES + OTHER_CASES}
STARTS = ("cold_start", "warm_start")
OF_DATA = ("data_against_torch", "data_against_decoding")
ROUNDS = dict.fromkeys(CASES, 5) | dict.fromkeys(STARTS, 3) | dict.fromkeys(OF_DATA, 7)


def versions() -> dict[str, str]:
    """The versions of the packages, and the machine."""
    import diffusers
    import torch
    import transformers

    found = {module.__name__: module.__version__ for module in (jax, torch, diffusers, transformers)}
    about = dict(python=platform.python_version(), machine=platform.machine(), cores=str(os.cpu_count()))
    return found | about


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command's options; ends the process for wrong ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("--cases", default=",".join(CASES), help="separated by commas")
    parser.add_argument("--rounds", type=int, help="of every case; by default 5, of starts 3, of data 7")
    parser.add_argument("--max_spread", type=float, default=MAX_SPREAD)
    parser.add_argument("--data", type=files.expand, default="", help="folder of tar shards, for data cases")
    parser.add_argument("--json", type=files.expand, help="also write the results there")
    parser.add_argument("--memory_of", choices=("ours", "peer"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = set(options.cases.split(",")) - CASES.keys()
    if unknown:
        parser.error(f"--cases: {', '.join(sorted(unknown))} unknown; there are {', '.join(CASES)}")
    if options.rounds is not None and options.rounds < 3:
        parser.error("--rounds must be 3 or more: fewer have no spread")
    return options


def memory_of(name: str, who: str, data: str) -> int | None:
    """Bytes that a run of a side of a case takes, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks.compare", f"--cases={name}", f"--memory_of={who}"]
    return json.loads(subprocess.check_output([*command, f"--data={data}"], text=True).splitlines()[-1])


def main(arguments: Sequence[str]) -> int:
    """Measures and prints; the status is 1 if a case could not be measured."""
    options = parse(arguments)
    partition.initialise()
    results, failed = [], 0
    if not options.memory_of:
        print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):
            made = Models(Path(folder))
        for name in options.cases.split(","):
            more = (options.data,) if name in OF_DATA else ()
            try:
                with contextlib.redirect_stdout(sys.stderr):  # the table is on stdout
                    case = CASES[name](made, *more)
                if options.memory_of:
                    print(json.dumps(added_memory(getattr(case, options.memory_of).run)))
                    continue
                result = measure(case, options.rounds or ROUNDS[name], options.max_spread)
                memory = {
                    f"{who}_memory": (side.memory or functools.partial(memory_of, name, who, options.data))()
                    for who, side in (("ours", case.ours), ("peer", case.peer))
                }
            except Exception as error:  # the other cases can still be measured
                failed = 1
                if not isinstance(error, ValueError):
                    traceback.print_exc()
                print(f"error: {name}: {error}", file=sys.stderr, flush=True)
                continue
            results.append(dataclasses.replace(result, **memory))
            print(results[-1].line(), flush=True)
    if options.json and not options.memory_of:
        report = dict(versions=versions(), results=[dataclasses.asdict(result) for result in results])
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    return failed


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
