"""python -m dalle2_jax.train --config=configs/X.py[:preset] --workdir=DIR [--config.a.b=value ...]

Trains one stage; the loop is the same for all of them. Running the same command again goes on from the last
committed checkpoint with exactly the next batch. DIR gets config.json, tokenizer/, checkpoints/,
metrics.jsonl, TensorBoard events, samples/ and, on request, profile/.
"""

import functools
import json
import math
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from dalle2_jax import checkpoint, metrics, models, optim, partition, state

# Settings that may differ between a run and its resumption: none of them changes what a step computes.
FREE_ON_RESUME = (
    "num_steps",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "sample_every",
    "eval_every",
    "eval_batches",
    "num_samples",
    "profile_at",
    "profile_steps",
    "wandb",
    "mesh",
)
MAX_BAD_STEPS = 8
TOKENIZER_RECORDS = 10_000  # spread over the dataset; a vocabulary needs no more


class Interrupted:
    """Notes SIGTERM and SIGINT, so that the loop finishes its step and saves; a second signal ends the
    process at once."""

    def __init__(self):
        self.signal = None
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number, frame):
        if self.signal is not None:
            raise SystemExit(128 + number)
        self.signal = number
        logging.warning("%s: saving after this step (again to stop at once)", signal.Signals(number).name)

    def restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def check_resume(workdir: epath.Path, config: dict) -> None:
    """Raise ValueError listing the settings in which `config` differs from the one that the workdir was
    trained with."""
    stored_path = workdir / "config.json"
    if not stored_path.exists():
        return

    def flat(tree, prefix=""):
        if not isinstance(tree, dict) or not tree:
            return {prefix[:-1]: tree}
        return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}{key}.").items()}

    stored, now = flat(json.loads(stored_path.read_text())), flat(json.loads(json.dumps(config)))
    differing = [
        f"  {name}: {stored.get(name, '(absent)')!r} in the workdir, {now.get(name, '(absent)')!r} now"
        for name in sorted(stored.keys() | now.keys())
        if name.split(".")[0] not in FREE_ON_RESUME and stored.get(name) != now.get(name)
    ]
    if differing:
        raise ValueError(
            f"{workdir} was trained with another config; use another --workdir, or set these back:\n"
            + "\n".join(differing)
        )


def make_tokenizer(config: dict, workdir: epath.Path, clip_path: str):
    """The tokenizer of the workdir, of the frozen CLIP, or the one that the config describes (saved in the
    workdir)."""
    from dalle2_jax.data import pipeline, tokenizer

    settings = dict(config["tokenizer"])
    if (workdir / "tokenizer").exists():
        return tokenizer.load_tokenizer(workdir / "tokenizer", settings["context_length"])
    if clip_path:
        made = tokenizer.load_tokenizer(epath.Path(clip_path) / "tokenizer", settings["context_length"])
    elif settings["path"]:
        made = tokenizer.load_tokenizer(settings["path"], settings["context_length"])
    else:
        captions = pipeline.iterate_captions(
            **pipeline_source(config), split=config["data"]["split"], limit=TOKENIZER_RECORDS
        )
        made = tokenizer.train_bpe(captions, settings["vocab_size"], settings["context_length"])
    if jax.process_index() == 0:
        made.save(workdir / "tokenizer")
    return made


def pipeline_source(config: dict) -> dict:
    """The keywords of config.data that name the dataset itself."""
    return {
        k: v for k, v in config["data"].items() if k not in ("split", "eval_split", "flip", "low_res_blur")
    }


def make_datasets(config: dict, stage, clip, tokenizer):
    """(training, validation) datasets with the fields that the stage needs and no others."""
    from dalle2_jax.data import pipeline

    spec = stage.batch_spec(1)
    fields = set(spec) - set(models.CLIP_FIELDS)
    if clip is not None:
        fields |= clip.fields(set(spec) & set(models.CLIP_FIELDS))
    elif set(spec) & set(models.CLIP_FIELDS):
        if config["data"]["source"] != "embeddings":
            wanted = sorted(set(spec) & set(models.CLIP_FIELDS))
            raise ValueError(
                f"stage {config['stage']!r} needs {wanted}: give --config.clip=WORKDIR_OR_MODEL of a trained "
                "CLIP, or train "
                "from precomputed embeddings (--config.data.source=embeddings)"
            )
        fields = set(spec)
    options = {k: v for k, v in config["data"].items() if k not in ("split", "eval_split")}
    options |= dict(
        fields=tuple(sorted(fields)),
        image_size=getattr(stage, "image_size", None),
        clip_image_size=clip.stage.image_size if clip is not None else None,
        low_res_size=getattr(stage, "low_res_size", None),
        crop_size=getattr(stage, "crop_size", None),
        tokenizer=tokenizer,
        seed=config["seed"],
    )
    models.check_keywords(pipeline.make_dataset, dict(options, split=""), "data")
    train = pipeline.make_dataset(split=config["data"]["split"], **options)
    held_out = dict(options, flip=False)
    return train, pipeline.make_dataset(split=config["data"]["eval_split"], **held_out)


def to_uint8(images) -> np.ndarray:
    """[-1, 1] floats to 8-bit levels, rounded."""
    return np.asarray(jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5)).astype(np.uint8)


class Evaluation:
    """Validation loss at fixed timesteps with fixed noise, and samples for fixed captions, both from the
    average."""

    def __init__(self, config, stage, clip, dataset, mesh):
        self._stage, self._config = stage, config
        needed = set(stage.batch_spec(1))
        per_host = dict(process_index=jax.process_index(), process_count=jax.process_count())
        batches = dataset.batches(config["batch_size"], **per_host)
        self._raw = [next(batches) for _ in range(config["eval_batches"])]
        self._batches = [partition.to_global(partition.without_index(raw), mesh) for raw in self._raw]
        count = min(config["num_samples"], config["batch_size"])
        self._labels = dataset.examples(self._raw[0]["index"][:count])["captions"]
        fill = functools.partial(clip.fill, needed=needed) if clip else lambda params, batch: batch

        @jax.jit
        def evaluate(params, frozen, batch):
            _, scalars = stage.loss(params, jax.random.key(0), fill(frozen, batch), train=False)
            return scalars

        @jax.jit
        def sample(params, frozen, batch):
            filled = fill(frozen, {name: value[:count] for name, value in batch.items()})
            keys = jax.random.split(jax.random.key(config["seed"]), count)
            return stage.sample(params, keys, filled), filled

        self._evaluate, self._sample = evaluate, sample

    def losses(self, params, frozen) -> dict:
        """Mean of the stage's scalars over the fixed validation batches."""
        results = [jax.device_get(self._evaluate(params, frozen, batch)) for batch in self._batches]
        return {f"eval/{name}": float(np.mean([r[name] for r in results])) for name in results[0]}

    def samples(self, params, frozen, writer, step) -> None:
        """A labelled grid for a stage that draws, the cosine to the true embedding for a prior, nothing for
        CLIP."""
        if not hasattr(self._stage, "sample"):
            return
        drawn, filled = self._sample(params, frozen, self._batches[0])
        if drawn.ndim == 4:
            writer.images(step, "samples", to_uint8(drawn), self._labels)
        else:
            true = filled["image_embed"]
            cosine = (drawn * true).sum(-1) / jnp.linalg.norm(drawn, axis=-1) / jnp.linalg.norm(true, axis=-1)
            writer.scalars(step, {"eval/sample_cosine": float(cosine.mean())})


def train(config: dict, workdir: str) -> None:
    """Train `config` in `workdir` until config['num_steps']; `config` is plain JSON types."""
    workdir = epath.Path(workdir)
    check_resume(workdir, config)
    mesh = partition.make_mesh(**config["mesh"])
    if config["batch_size"] % config["grad_accum"]:
        raise ValueError(
            f"batch_size {config['batch_size']} is not a multiple of grad_accum {config['grad_accum']}"
        )
    partition.check_batch_size(config["batch_size"] // config["grad_accum"], mesh, "batch_size / grad_accum")
    stage = models.build_stage(config)
    clip, frozen = None, {}
    if config["clip"]:
        clip_stage, _, frozen = models.load_stage(config["clip"], "clip")
        clip = models.FrozenClip(clip_stage)
    models.check_keywords(optim.make_optimizer, dict(config["optim"], num_steps=1), "optim")
    optimizer = optim.make_optimizer(**config["optim"], num_steps=config["num_steps"])

    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(config, workdir, config["clip"])
    dataset, eval_dataset = make_datasets(config, stage, clip, tokenizer)
    vocab_size = config["model"].get("text", {}) and config["model"]["text"].get("vocab_size")
    if vocab_size and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, model.text.vocab_size is "
            f"{vocab_size}: raise it to "
            f"{tokenizer.vocab_size}"
        )

    # Parameters are born sharded: shapes, then shardings, then a jitted init that writes straight into them.
    init = functools.partial(
        state.init_state, stage, optimizer, jax.random.key(config["seed"]), models.zeros(stage.batch_spec(1))
    )
    abstract = jax.eval_shape(init)
    shardings = partition.shardings(abstract, mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    checkpointer = checkpoint.Checkpointer(workdir, config["keep_checkpoints"])
    start = checkpointer.latest_step()
    if start is None:
        train_state = jax.jit(init, out_shardings=shardings)()
        if config["init_from"]:
            _, _, loaded = models.load_stage(config["init_from"], config["stage"])
            loaded = jax.device_put(loaded, shardings.params)
            train_state = train_state.replace(params=loaded, ema_params=jax.tree.map(jnp.copy, loaded))
        start = 0
        if jax.process_index() == 0:
            (workdir / "config.json").write_text(json.dumps(config, indent=1))
    else:
        train_state, meta = checkpointer.restore(abstract)
        if meta["fingerprint"] != dataset.fingerprint:
            raise ValueError(
                f"the dataset has changed since step {start} of {workdir}: fingerprint "
                f"{meta['fingerprint'][:12]} then, "
                f"{dataset.fingerprint[:12]} now; restore the data or use another --workdir"
            )
    frozen = jax.device_put(frozen, partition.replicated(mesh))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract.params))
    logging.info(
        "%s: %.2fM parameters, %d records, mesh %s, steps %d -> %d",
        config["stage"],
        count / 1e6,
        dataset.num_records,
        dict(mesh.shape),
        start,
        config["num_steps"],
    )
    if start >= config["num_steps"]:
        logging.info("%s is finished at step %d; raise --config.num_steps to go on", workdir, start)
        return

    needed = set(stage.batch_spec(1))
    fill = functools.partial(clip.fill, needed=needed) if clip else lambda params, batch: batch
    step_function = state.make_train_step(
        stage,
        optimizer,
        seed=config["seed"],
        ema_decay=config["ema_decay"],
        grad_accum=config["grad_accum"],
        fill=fill,
    )
    jitted = jax.jit(step_function, donate_argnums=0, out_shardings=(shardings, partition.replicated(mesh)))
    per_host = dict(process_index=jax.process_index(), process_count=jax.process_count())
    batches = dataset.batches(config["batch_size"], start_step=start, **per_host)
    writer = metrics.Writer(workdir, wandb=config["wandb"] or None)
    interrupted = Interrupted()
    try:
        with partition.use_mesh(mesh):
            evaluation = Evaluation(config, stage, clip, eval_dataset, mesh)
            batch = partition.to_global(partition.without_index(next(batches)), mesh)
            began = time.monotonic()
            lowered = jitted.lower(train_state, batch, frozen)
            flops = (lowered.cost_analysis() or {}).get("flops", 0.0)
            step_compiled = lowered.compile()
            logging.info(
                "compiled the train step in %.1f s (%.1f GFLOP)", time.monotonic() - began, flops / 1e9
            )
            progress = metrics.Progress(
                config["num_steps"],
                start,
                batch_size=config["batch_size"],
                flops_per_step=flops,
                name=config["stage"],
            )
            for step in range(start + 1, config["num_steps"] + 1):
                if config["profile_at"] and step == config["profile_at"]:
                    jax.profiler.start_trace(str(workdir / "profile"))
                train_state, scalars = step_compiled(train_state, batch, frozen)
                if config["profile_at"] and step == config["profile_at"] + config["profile_steps"] - 1:
                    jax.block_until_ready(scalars)
                    jax.profiler.stop_trace()
                last = step == config["num_steps"] or interrupted.signal is not None
                if not last:
                    with progress.waiting():
                        raw = next(batches)
                    batch = partition.to_global(partition.without_index(raw), mesh)
                if last or step % config["log_every"] == 0:
                    host = {f"train/{k}": float(v) for k, v in jax.device_get(scalars).items()}
                    if host["train/bad_steps"] >= MAX_BAD_STEPS:
                        raise FloatingPointError(
                            f"{MAX_BAD_STEPS} steps in a row had a loss or gradient that is not finite "
                            f"(step {step}); the "
                            f"last good state is checkpoint {checkpointer.latest_step()}. Lower "
                            "optim.learning_rate or set "
                            "optim.grad_clip"
                        )
                    bad = {f"data/bad_{reason}": n for reason, n in dataset.bad_records().items()}
                    writer.scalars(step, host | bad | progress.report(step, loss=host["train/loss"]))
                if (last and not interrupted.signal) or step % config["eval_every"] == 0:
                    with progress.paused():
                        writer.scalars(step, evaluation.losses(train_state.ema_params, frozen))
                if (last and not interrupted.signal) or step % config["sample_every"] == 0:
                    with progress.paused():
                        evaluation.samples(train_state.ema_params, frozen, writer, step)
                if last or step % config["checkpoint_every"] == 0:
                    meta = dict(step=step, fingerprint=dataset.fingerprint, bad_records=dataset.bad_records())
                    checkpointer.save(step, train_state, meta)
                if interrupted.signal is not None:
                    break
        checkpointer.wait()
        if interrupted.signal is not None:
            logging.warning("stopped at step %d, saved; run the same command to go on", step)
        if dataset.bad_records():
            logging.warning("records skipped by reason: %s", dataset.bad_records())
    finally:
        interrupted.restore()
        checkpointer.close()
        writer.close()
    if interrupted.signal == signal.SIGINT:
        raise SystemExit(130)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    partition.initialise()
    config = models.to_plain(FLAGS.config)
    try:
        train(config, FLAGS.workdir)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        logging.error("%s", error)
        raise SystemExit(3 if isinstance(error, FloatingPointError) else 2) from (
            error if FLAGS.debug else None
        )


FLAGS = flags.FLAGS

if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "Config file, FILE.py[:preset]; override with --config.a.b=value."
    )
    flags.DEFINE_string(
        "workdir", None, "Where checkpoints, logs and samples go; an existing one is resumed."
    )
    flags.DEFINE_bool("debug", False, "Show the whole traceback of an error in the settings.")
    flags.mark_flags_as_required(["config", "workdir"])
    logging.set_verbosity(logging.INFO)
    app.run(main)
