"""python -m dalle2_jax.train --config=configs/X.py[:preset] --workdir=DIR [--config.a.b=value ...]

Trains one stage; the loop is the same for all of them. Running the same command again goes on from the last
committed checkpoint with exactly the next batch. DIR gets config.json, tokenizer/, checkpoints/,
metrics.jsonl, TensorBoard events, samples/ and, on request, profile/. Several processes, each started with
the same command on the same DIR, train as one: see `processes`.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
import signal
import time
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from etils import epath

from dalle2_jax.models import models
from dalle2_jax.runtime import checkpoint, files, hub, metrics, modeldir, partition, processes
from dalle2_jax.train import bad_steps, lock, optim, resume, state, stopping, validation

# What a config holds; `model`, `data`, `optim` and `mesh` are keywords of functions.
SETTINGS = (
    *(name for name in resume.FREE if "." not in name),
    "stage",
    "model",
    "data",
    "tokenizer",
    "optim",
    "batch_size",
    "grad_accum",
    "spike_sigma",
    "ema_decay",
    "seed",
    "clip",
    "init_from",
)
TOKENIZER_SETTINGS = ("path", "vocab_size", "context_length")
FAILED = 2  # exit status of a run whose settings, data or disk do not allow it
MEASURE_ROWS = 1024  # examples over which a trained stage measures itself
TOKENIZER_RECORDS = 10_000  # spread over the dataset; a vocabulary needs no more


def make_tokenizer(config: dict, workdir: epath.Path, clip_path: str):
    """The tokenizer of the workdir, of the frozen CLIP, or the one that the config describes (saved in the
    workdir)."""
    from dalle2_jax.data import pipeline, tokenizer

    settings = dict(config["tokenizer"])
    if (workdir / "tokenizer" / "tokenizer_config.json").exists():  # else a run was killed while saving it
        return tokenizer.load_tokenizer(workdir / "tokenizer", settings["context_length"])
    if clip_path:
        folder = epath.Path(hub.local(clip_path)) / "tokenizer"
        made = tokenizer.load_tokenizer(folder, settings["context_length"])
    elif settings["path"]:
        made = tokenizer.load_tokenizer(hub.local(settings["path"]), settings["context_length"])
    elif _precomputed(config) and (epath.Path(_precomputed(config)) / "tokenizer").exists():
        folder = epath.Path(_precomputed(config)) / "tokenizer"  # of the CLIP that embedded the captions
        made = tokenizer.load_tokenizer(folder, settings["context_length"])
    else:
        captions = pipeline.iterate_captions(
            **pipeline_source(config), split=config["data"]["split"], limit=TOKENIZER_RECORDS
        )
        made = tokenizer.train_bpe(captions, settings["vocab_size"], settings["context_length"])
    made.save(workdir / "tokenizer")
    return made


def pipeline_source(config: dict) -> dict:
    """The keywords of config.data that name the dataset itself."""
    return {
        k: v for k, v in config["data"].items() if k not in ("split", "eval_split", "flip", "low_res_blur")
    }


def dataset_fields(config: dict, stage, clip) -> set[str]:
    """What the dataset has to provide: the stage's fields, or what the frozen CLIP computes them from."""
    spec = set(stage.batch_spec(1))
    embeddings = spec & set(models.CLIP_FIELDS)
    if clip is not None:
        return spec - embeddings | clip.fields(embeddings)
    if embeddings and not _precomputed(config):
        raise ValueError(
            f"stage {config['stage']!r} needs {sorted(embeddings)}: give --config.clip=WORKDIR_OR_MODEL of a "
            "trained CLIP, or train from precomputed embeddings (--config.data.source=embeddings, or beside "
            "pictures --config.data.embeddings=FOLDER)"
        )
    if "text_states" in embeddings:
        raise ValueError(
            f"this {config['stage']} reads CLIP's text states, which are not precomputed: give --config.clip"
        )
    return spec


def _precomputed(config: dict) -> str:
    """The folder of embeddings that a run reads, '' for none."""
    data = config["data"]
    return data["path"] if data["source"] == "embeddings" else data.get("embeddings", "")


def make_datasets(config: dict, stage, clip, fields: set[str], tokenizer):
    """(training, validation) datasets with these fields."""
    from dalle2_jax.data import pipeline
    from dalle2_jax.data.settings import DataSettings

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
    models.check_keywords(DataSettings, dict(options, split=""), "data")
    train = pipeline.make_dataset(split=config["data"]["split"], **options)
    held_out = dict(options, flip=False)
    return train, pipeline.make_dataset(split=config["data"]["eval_split"], **held_out)


def check_names(config: dict) -> None:
    """Raise ValueError for a setting that there is not; those of `model` are looked at where it is built."""
    from dalle2_jax.data.settings import DataSettings

    models.check_names(config, SETTINGS, "config")
    of_data = [*inspect.signature(DataSettings).parameters, "eval_split"]
    models.check_names(config["data"], of_data, "data")
    models.check_names(config["tokenizer"], TOKENIZER_SETTINGS, "tokenizer")
    models.check_keywords(partition.make_mesh, config["mesh"], "mesh")
    models.check_keywords(optim.make_optimizer, dict(config["optim"], num_steps=1), "optim")


def check_settings(config: dict, stage, mesh) -> None:
    """Raise ValueError for settings that cannot go together, before anything is read or compiled."""
    if config["batch_size"] % config["grad_accum"]:
        raise ValueError(
            f"batch_size {config['batch_size']} is not a multiple of grad_accum {config['grad_accum']}"
        )
    partition.check_batch_size(config["batch_size"] // config["grad_accum"], mesh, "batch_size / grad_accum")
    if config["spike_sigma"] < 0:
        raise ValueError(f"spike_sigma {config['spike_sigma']} must be 0 (none) or above; 6 is usual")
    optim.make_optimizer(**config["optim"], num_steps=config["num_steps"])  # refuses what it cannot be
    classes = config["data"].get("classes", ())
    if getattr(stage, "num_classes", 0) not in (0, len(classes)):
        raise ValueError(
            f"data.classes has {len(classes)} names, model.num_classes is {stage.num_classes}: make them one"
        )
    if config["grad_accum"] > 1 and getattr(stage, "whole_batch", False):
        raise ValueError(
            f"the loss of stage {config['stage']!r} compares all examples of a batch, which cannot be cut: "
            "set grad_accum=1 (model.remat='all' saves memory)"
        )
    tower = config["model"].get("vision") or {}
    if getattr(stage, "sam_rho", 0) and tower.get("kind") == "resnet" and mesh.shape["tensor"] > 1:
        # XLA's partitioner would abort, and the process with it
        raise ValueError(
            "XLA cannot split the convolutions of SAM's replicas over mesh.tensor="
            f"{mesh.shape['tensor']}: set mesh.tensor=1, or model.sam_rho=0, or model.vision.kind='vit'"
        )


def check_vocabulary(config: dict, tokenizer) -> None:
    """Raise ValueError for a tokenizer with more tokens than the stage's text network has embeddings."""
    vocab_size = (config["model"].get("text") or {}).get("vocab_size")
    if vocab_size and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, model.text.vocab_size is {vocab_size}: "
            f"raise it to {tokenizer.vocab_size}"
        )


def with_stats(config: dict, stage, params: dict, frozen: dict, fill, dataset, mesh) -> dict:
    """`params` with the statistics that the stage fits to the embeddings of the first training batches."""
    filled = jax.jit(fill)

    def batches():
        stream = dataset.batches(config["batch_size"], **partition.host_slice(mesh))
        for _ in range(-(-stage.fit_rows // config["batch_size"])):
            batch = filled(frozen, partition.on_devices(next(stream), mesh))
            yield {n: partition.to_host(x) for n, x in batch.items() if n in ("image_embed", "text_embed")}

    params, scalars = stage.fit(params, batches)
    logging.info(
        "fitted to the data: %s", ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())
    )
    return params


def started_from(path: str, loaded: dict, fresh: dict) -> dict:
    """`fresh` parameters with those that were `loaded` from `path` in their place.

    What the loaded network had not is left as it begins, and named. Raises ValueError for parameters that
    this network has not, or not in that shape.
    """
    found, wanted = modeldir.flatten(loaded), modeldir.flatten(fresh)
    shared = {name: leaf for name, leaf in wanted.items() if name in found}
    modeldir.check_params(loaded, modeldir.unflatten(shared), path)
    new = sorted(wanted.keys() - found.keys())
    if new:
        logging.warning("%s has no %s: training begins with them fresh", path, ", ".join(new))
    return modeldir.unflatten(wanted | found)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run's state is made and where it lies, before any of it exists.

    init: () -> TrainState. abstract: its ShapeDtypeStructs with shardings. shardings: these alone.
    """

    optimizer: optax.GradientTransformation
    init: Callable[[], state.TrainState]
    abstract: state.TrainState
    shardings: state.TrainState


def make_plan(config: dict, stage, mesh) -> Plan:
    """The plan of a run; parameters are born sharded: shapes, then shardings, then a jitted init."""
    optimizer = optim.make_optimizer(**config["optim"], num_steps=config["num_steps"])
    init = functools.partial(
        state.init_state,
        stage,
        optimizer,
        jax.random.key(config["seed"]),
        models.zeros(stage.batch_spec(1)),
        config["spike_sigma"],
    )
    abstract = jax.eval_shape(init)
    shardings = partition.shardings(abstract, mesh)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    return Plan(optimizer, init, placed, shardings)


def jit_step(config: dict, stage, plan: Plan, fill, mesh):
    """The training step, (state, batch, frozen) -> (state, scalars), jitted; the state is donated."""
    step = state.make_train_step(
        stage,
        plan.optimizer,
        seed=config["seed"],
        ema_decay=config["ema_decay"],
        spike_sigma=config["spike_sigma"],
        grad_accum=config["grad_accum"],
        fill=fill,
    )
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(plan.shardings, partition.replicated(mesh)),
        compiler_options=partition.compiler_options(mesh=mesh),
    )


def first_state(config: dict, stage, plan: Plan, frozen: dict, fill, dataset, mesh) -> state.TrainState:
    """The state before the first step: fresh, or with the parameters of `init_from`."""
    options = partition.compiler_options(once=True)
    train_state = jax.jit(plan.init, out_shardings=plan.shardings, compiler_options=options)()
    params = train_state.params
    if config["init_from"]:
        _, _, loaded = models.load_start(config["init_from"], config)
        params = started_from(config["init_from"], loaded, params)
    elif getattr(stage, "fit_rows", 0):
        params = with_stats(config, stage, params, frozen, fill, dataset, mesh)
    else:
        return train_state
    if "stats" in params:  # fitted on this process, the same on all
        params = params | {"stats": partition.to_host(params["stats"])}
    params = jax.device_put(params, plan.shardings.params)
    return train_state.replace(params=params, ema_params=jax.tree.map(jnp.copy, params))


def make_measure(
    config: dict, stage, fill, dataset, frozen: dict, mesh
) -> Callable[[state.TrainState], state.TrainState]:
    """A function that returns a state with what its averaged network is measured to be on training data.

    The first MEASURE_ROWS examples of the run are what is measured over, always the same.
    """
    example = models.zeros(stage.batch_spec(1))
    abstract = models.abstract_params(stage)
    if not hasattr(stage, "measure") or not jax.eval_shape(
        stage.measure, abstract, jax.random.key(0), example
    ):
        return lambda train_state: train_state
    compiled = jax.jit(lambda params, frozen, key, batch: stage.measure(params, key, fill(frozen, batch)))

    def measure(train_state: state.TrainState) -> state.TrainState:
        batches = dataset.batches(config["batch_size"], **partition.host_slice(mesh))
        parts = []
        for i in range(-(-MEASURE_ROWS // config["batch_size"])):
            key = jax.random.fold_in(jax.random.key(config["seed"]), i)
            batch = partition.on_devices(next(batches), mesh)
            parts.append(partition.to_host(compiled(train_state.ema_params, frozen, key, batch)))
        values = jax.tree.map(lambda *x: np.mean(x, axis=0, dtype=np.float64).astype(np.float32), *parts)
        values = jax.device_put(values, partition.replicated(mesh))

        def updated(params):
            return params | {"stats": params["stats"] | jax.tree.map(jnp.copy, values)}

        return train_state.replace(
            params=updated(train_state.params), ema_params=updated(train_state.ema_params)
        )

    return measure


def train(config: dict, workdir: str, allow_changed: Collection[str] = ()) -> None:
    """Train `config` in `workdir` until config['num_steps']; `config` is plain JSON types.

    allow_changed: names of settings in which a resumption may differ; see `resume`. A run that is told to
    stop before its first step has nothing to save: it ends as one that was told later.
    """
    with stopping.Stopping() as stops:
        try:
            config, folder = models.expand_paths(config), epath.Path(files.expand(workdir))
            _train(config, folder, allow_changed, stops)
        except stopping.Stopped as stopped:
            logging.warning("stopped before the first step; run the same command to go on")
            if stopped.signal == signal.SIGINT:
                raise SystemExit(128 + stopped.signal) from None


def _train(
    config: dict, workdir: epath.Path, allow_changed: Collection[str], stops: stopping.Stopping
) -> None:
    """`train` where signals are listened to: all that can be looked at before a file is written."""
    check_names(config)
    resumption = resume.Resumption(workdir, config, allow_changed)
    mesh = partition.make_mesh(**config["mesh"])
    stage = models.build_stage(config)
    check_settings(config, stage, mesh)
    clip, frozen, fill = None, {}, lambda params, batch: batch
    if config["clip"]:
        clip_stage, _, frozen = models.load_stage(config["clip"], "clip")
        clip = models.FrozenClip(clip_stage)
        fill = functools.partial(clip.fill, needed=set(stage.batch_spec(1)))
    fields = dataset_fields(config, stage, clip)
    if config["init_from"]:  # looked at now, so that a wrong path stops before data is read
        models.load_start(config["init_from"], config)

    try:
        workdir.mkdir(parents=True, exist_ok=True)
        held = lock.Lock(workdir) if jax.process_index() == 0 else contextlib.nullcontext()
    except OSError as error:
        raise ValueError(
            f"the workdir {workdir} cannot be written: {error}. Make it writable and see that the disk has "
            "space, or use another --workdir"
        ) from error
    with held as lock_held:
        _train_locked(config, workdir, mesh, stage, clip, frozen, fill, fields, lock_held, resumption, stops)


def _train_locked(
    config: dict,
    workdir: epath.Path,
    mesh,
    stage,
    clip: models.FrozenClip | None,
    frozen: dict,
    fill,
    fields: set[str],
    held: lock.Lock | None,
    resumption: resume.Resumption,
    stops: stopping.Stopping,
) -> None:
    """`_train` from where the first file is written; `held` is the workdir's lock, of process 0."""
    tokenizer = None
    if "tokens" in fields:
        make = functools.partial(make_tokenizer, config, workdir, config["clip"])
        tokenizer = processes.one_then_others("tokenizer", make)
        check_vocabulary(config, tokenizer)
    dataset, eval_dataset = make_datasets(config, stage, clip, fields, tokenizer)
    if dataset.fingerprint == eval_dataset.fingerprint:
        logging.warning("validation reads the very records that training reads: see data.eval_split")
    about = resume.describe(dataset, modeldir.sha256(frozen) if frozen else dataset.clip_sha256)
    frozen = jax.device_put(frozen, partition.replicated(mesh))
    stops.check("data opened")

    plan = make_plan(config, stage, mesh)
    with checkpoint.Checkpointer(
        workdir,
        config["keep_checkpoints"],
        before_save=held.check if held else None,
        zero_at_first=state.ZERO_AT_FIRST,
    ) as checkpointer:
        start, meta = 0, None
        if checkpointer.latest_step() is not None:  # a finished run's is looked at, too
            start, train_state, meta = checkpointer.restore_newest(plan.abstract)
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(plan.abstract.params))
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
        resumption.compare(meta, about)
        if start == 0:
            checkpointer.warn_of_little_space(plan.abstract)
            train_state = first_state(config, stage, plan, frozen, fill, dataset, mesh)

        processes.sync("config compared")  # by every process, before it is written
        if jax.process_index() == 0:  # also on resume, where settings may have changed
            resumption.note(start)
            modeldir.write_json(workdir / "config.json", config)
        jitted = jit_step(config, stage, plan, fill, mesh)
        with partition.use_mesh(mesh):
            evaluation = validation.Validation(config, stage, fill, eval_dataset, mesh)
            measure = make_measure(config, stage, fill, dataset, frozen, mesh)
            run_steps(
                config,
                workdir,
                dataset,
                jitted,
                train_state,
                frozen,
                start,
                checkpointer,
                evaluation,
                mesh,
                measure,
                about,
                stops,
            )


def run_steps(
    config: dict,
    workdir: epath.Path,
    dataset,
    jitted,
    train_state: state.TrainState,
    frozen: dict,
    start: int,
    checkpointer: checkpoint.Checkpointer,
    evaluation: validation.Validation,
    mesh,
    measure,
    about: dict,
    stops: stopping.Stopping,
) -> None:
    """The loop from step `start` to the last or to a signal; it reports, saves, evaluates and draws.

    A state that is drawn from or saved, but for one that a signal asks for, is measure(state). about: what
    checkpoints say of the data, `resume.describe`.
    """
    batches = dataset.batches(config["batch_size"], start_step=start, **partition.host_slice(mesh))
    writer = metrics.Writer(workdir, wandb=config["wandb"] or None)
    bad, stop = bad_steps.BadSteps(workdir, checkpointer, train_state, config["log_every"], mesh), 0
    profiling = False
    try:
        stops.check("state made")
        raw = next(batches)
        bad.read(start + 1, raw["index"])
        batch = partition.on_devices(raw, mesh)
        began = time.monotonic()
        lowered = jitted.lower(train_state, batch, frozen)
        flops = (lowered.cost_analysis() or {}).get("flops", 0.0)
        compiled = lowered.compile()
        stops.check("compiled")
        logging.info("compiled the train step in %.1f s (%.1f GFLOP)", time.monotonic() - began, flops / 1e9)
        progress = metrics.Progress(
            config["num_steps"],
            start,
            batch_size=config["batch_size"],
            flops_per_step=flops,
            name=config["stage"],
        )
        for step in range(start + 1, config["num_steps"] + 1):
            if step == config["profile_at"]:
                jax.profiler.start_trace(str(workdir / "profile"))
                profiling = True
            train_state, scalars = compiled(train_state, batch, frozen)
            finished = step == config["num_steps"]
            if profiling and (finished or step >= config["profile_at"] + config["profile_steps"] - 1):
                jax.block_until_ready(scalars)
                jax.profiler.stop_trace()
                profiling = False
            stop = stops.latest()
            last = finished or stop != 0
            if not last:
                with progress.waiting():
                    raw = next(batches)
                bad.read(step + 1, raw["index"])
                batch = partition.on_devices(raw, mesh)
            drawing = finished or step % config["sample_every"] == 0
            saving = last or step % config["checkpoint_every"] == 0
            if saving or step % config["log_every"] == 0:  # what a checkpoint counts was told
                host = {f"train/{k}": float(v) for k, v in jax.device_get(scalars).items()}
                bad.look(step, host)
                checkpointer.check()
                unusable = {f"data/bad_{reason}": n for reason, n in dataset.bad_records().items()}
                writer.scalars(step, host | unusable | progress.report(step, loss=host["train/loss"]))
            # A run that was interrupted saves, and leaves the rest to its resumption.
            looking = not last or finished
            if looking and (drawing or saving):
                with progress.paused():
                    train_state = measure(train_state)
            if saving:
                meta = about | dict(step=step, bad_records=dataset.bad_records())
                checkpointer.save(step, train_state, meta)
            if looking:
                with progress.paused():
                    if finished or step % config["eval_every"] == 0:
                        writer.scalars(step, evaluation.losses(train_state.ema_params, frozen, step))
                    if drawing:
                        if saving:  # committed, for a sampler that fails ends several processes at once
                            checkpointer.wait()
                        evaluation.samples(train_state.ema_params, frozen, writer, step)
            if last:
                break
        checkpointer.wait()
        if stop:
            logging.warning("stopped at step %d, saved; run the same command to go on", step)
        if dataset.bad_records():
            logging.warning("records skipped or mended by reason: %s", dataset.bad_records())
    except Exception as error:
        if not isinstance(error, FloatingPointError | stopping.Stopped):  # all processes have these together
            processes.end_together(error, FAILED)
        raise
    finally:
        writer.close()
        if profiling:  # a signal or an error came within the profile, and what could be saved is
            jax.profiler.stop_trace()
    if stop == signal.SIGINT and step < config["num_steps"]:
        raise SystemExit(128 + stop)


def main(argv):
    """Run the command; `argv` without the flags."""
    from dalle2_jax.data import budget

    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    partition.initialise()
    config = models.to_plain(FLAGS.config)
    refused = (ValueError, OSError, budget.TooManyBadRecords)
    with processes.together(refused, status=FAILED, say=logging.error, debug=FLAGS.debug):
        processes.join()
        try:
            train(config, FLAGS.workdir, FLAGS.allow_changed)
        except FloatingPointError as error:  # which all processes see at the same step
            logging.error("%s", error)
            raise SystemExit(3) from (error if FLAGS.debug else None)


FLAGS = flags.FLAGS
