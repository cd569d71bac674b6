"""Training, from top to bottom: `train` puts a run together, `loop` takes its steps. All stages share both.

A step is a pure function, (state, batch, frozen) -> (state, scalars): see `step`. Its number determines its
randomness and its batch, so that an interrupted run goes on as if nothing had happened.
"""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Collection

import jax
from absl import logging
from etils import epath

from dalle2_jax.data import words
from dalle2_jax.models import frozen, models
from dalle2_jax.runtime import checkpoint, compiling, files, machine, metrics, modeldir, partition, processes
from dalle2_jax.train import bad_steps, inputs, profiling, resume, statistics, stopping, validation
from dalle2_jax.train.plan import Plan, make_plan
from dalle2_jax.train.run import Run, claimed, failing_together, first_state, frozen_parameters
from dalle2_jax.train.step import ZERO_AT_FIRST, TrainState


def train(config: dict, workdir: str, allow_changed: Collection[str] = ()) -> None:
    """Train `config` (plain JSON types) in `workdir` until config['num_steps'].

    allow_changed: names of settings in which a resumption may differ; see `resume`. A run that a signal stops
    saves first, unless it has taken no step yet. Raises SystemExit after SIGINT.
    """
    with stopping.Stopping() as stops:
        try:
            config = frozen.short(models.expand_paths(config))
            stopped_by = _train(config, epath.Path(files.expand(workdir)), allow_changed, stops)
        except stopping.Stopped as stopped:
            logging.warning("stopped before the first step; run the same command to go on")
            stopped_by = stopped.signal
    if stopped_by == signal.SIGINT:
        raise SystemExit(128 + stopped_by)


def _train(
    config: dict, workdir: epath.Path, allow_changed: Collection[str], stops: stopping.Stopping
) -> int:
    """Makes the run and its loop; returns the signal that stopped it, 0 for none."""
    # What is wrong with the settings is said before a file is written or data are read.
    plan = make_plan(resume.with_stored(config, workdir))
    config = plan.config
    resumption = resume.Resumption(workdir, config, allow_changed)
    loaded = frozen.load(config)
    plan = dataclasses.replace(plan, frozen_stages={name: found.stage for name, found in loaded.items()})
    fields = inputs.dataset_fields(config, plan)
    if config["init_from"]:
        models.load_start(config["init_from"], config)

    with claimed(workdir) as lock:
        logging.info("opening the data: %s %s", config["data"]["source"], config["data"]["path"])
        tokenizer = inputs.shared_tokenizer(config, workdir) if {"tokens", "token_mask"} & fields else None
        dataset, held_out = inputs.make_datasets(config, plan, fields, tokenizer)
        if dataset.fingerprint == held_out.fingerprint:
            logging.warning("validation reads the very records that training reads: see data.eval_split")
        if "label" in fields:  # names that the data have themselves are kept with the run and its model
            config = config | {"data": config["data"] | {"classes": list(dataset.classes)}}
        stops.check("data opened")

        check = lock.check if lock else None
        with checkpoint.Checkpointer(
            workdir, config["keep_checkpoints"], before_save=check, zero_at_first=ZERO_AT_FIRST
        ) as checkpointer:
            start, state, meta = 0, None, None
            if checkpointer.latest_step() is not None:
                start, state, meta = checkpointer.restore_newest(plan.abstract)
            frozen_params, sha256 = frozen_parameters(plan, loaded, workdir, meta)
            del loaded  # the devices have it
            about = resume.describe(dataset, dataset.encoder_sha256 | sha256)
            logging.info(
                "%s: %.2fM parameters, %d records, mesh %s, steps %d -> %d",
                config["stage"],
                sum(math.prod(x.shape) for x in jax.tree.leaves(plan.abstract.params)) / 1e6,
                dataset.num_records,
                dict(plan.mesh.shape),
                start,
                config["num_steps"],
            )
            if config["cpu_products"] == "bfloat16":
                slow = "" if machine.has_fast_bfloat16() else "; slower than float32 on this machine"
                logging.info("large products on CPUs have bfloat16 operands and float32 sums%s", slow)
            if start >= config["num_steps"]:
                logging.info("%s is finished at step %d; raise --config.num_steps to go on", workdir, start)
                return 0
            resumption.compare(meta, about)
            if state is None:
                checkpointer.warn_of_little_space(plan.abstract)
                state = first_state(plan, frozen_params, dataset)
            processes.sync("config compared")  # by every process, before it is written
            if jax.process_index() == 0:  # also on resume, where settings may have changed
                resumption.note(start)
                modeldir.write_json(workdir / "config.json", config)
            writer = metrics.Writer(workdir, wandb=config["wandb"] or None)
            read = plan, workdir, frozen_params, dataset, held_out, about
            run = Run(*read, checkpointer, writer, stops, words.read(workdir) if start else None)
            with contextlib.closing(writer), partition.use_mesh(plan.mesh), failing_together():
                return loop(run, state, start)


def loop(run: Run, state: TrainState, start: int) -> int:
    """Takes the steps after `start`, until the last one or a signal; reports, saves and evaluates on the way.

    Returns the signal that stopped it before the last step, 0 for none. A state is measured before samples
    are drawn and before it is saved, except for a save that a signal asks for: that one is to be quick.
    """
    plan, config = run.plan, run.plan.config
    evaluation = validation.Validation(plan, run.held_out)
    measure = statistics.make_measure(plan, run.dataset, run.frozen)
    bad, advise = bad_steps.BadSteps(run, state), _adviser(plan.stage)
    part = partition.host_slice(plan.mesh)  # the examples of a batch that this process reads
    batches = run.dataset.batches(config["batch_size"], start_step=start, **part)

    def read(step: int, waiting=None) -> dict[str, jax.Array]:
        """The batch of a step, on the devices."""
        with waiting or contextlib.nullcontext():
            batch = next(batches)
        bad.read(step, batch["index"])
        return partition.on_devices(batch, plan.mesh)

    run.stops.check("state made")
    batch = read(start + 1)
    train_step, flops = _compiled(plan, state, batch, run.frozen)
    run.stops.check("compiled")
    progress = metrics.Progress(
        config["num_steps"],
        start,
        batch_size=config["batch_size"],
        flops_per_step=flops,
        name=config["stage"],
    )
    with profiling.Profile(run.workdir, config) as profile:
        for step in range(start + 1, config["num_steps"] + 1):
            profile.begin(step)
            state, scalars = train_step(state, batch, run.frozen)
            profile.end(step, scalars)
            finished = step == config["num_steps"]
            stop = 0 if finished else run.stops.latest()
            if not finished and not stop:  # read the next batch while the devices compute
                batch = read(step + 1, progress.waiting())

            saving = finished or stop or step % config["checkpoint_every"] == 0
            sampling = finished or step % config["sample_every"] == 0
            if saving or step % config["log_every"] == 0:  # what a checkpoint counts was reported
                advise(_report(run, step, scalars, bad, progress))
            if not stop and (saving or sampling):
                with progress.paused():
                    state = measure(state)
            if saving:
                run.save(step, state)
            if stop:  # the rest is left to the resumption
                break
            with progress.paused():
                if finished or step % config["eval_every"] == 0:
                    run.writer.scalars(step, evaluation.losses(state.ema_params, run.frozen, step))
                if sampling:
                    if saving:  # committed, because a sampler that fails ends several processes at once
                        run.checkpointer.wait()
                    evaluation.samples(state.ema_params, run.frozen, run.writer, step)
        run.checkpointer.wait()
    if stop:
        logging.warning("stopped at step %d, saved; run the same command to go on", step)
    if run.dataset.bad_records():
        logging.warning("records skipped or mended by reason: %s", run.dataset.bad_records())
    return stop


def _compiled(plan: Plan, state: TrainState, batch: dict, frozen: dict) -> tuple[Callable, float]:
    """(the compiled training step, its FLOPs as the compiler counts them; 0: it does not say)."""
    began = time.monotonic()
    logging.info("tracing the train step")
    lowered = plan.jit_step().lower(state, batch, frozen)
    flops = (lowered.cost_analysis() or {}).get("flops", 0.0)
    traced = time.monotonic()
    with contextlib.closing(compiling.Watch(logging.info)) as watch:
        compiled = lowered.compile()
    work, seconds = watch.work, time.monotonic() - traced
    said = "compiled the train step: tracing %.1f s, %s %.1f s (%.1f GFLOP)"
    logging.info(said, traced - began, work, seconds, flops / 1e9)
    return compiled, flops


def _report(run: Run, step: int, scalars: dict, bad: bad_steps.BadSteps, progress: metrics.Progress) -> dict:
    """Logs a step; returns its scalars. Raises FloatingPointError after too many steps that are not finite,
    and the error of a save that has failed since."""
    found = {name: float(value) for name, value in jax.device_get(scalars).items()}
    values = {f"train/{name}": value for name, value in found.items()}
    bad.look(step, values)
    run.checkpointer.check()
    skipped = {f"data/bad_{reason}": count for reason, count in run.dataset.bad_records().items()}
    speed = progress.report(step, loss=values["train/loss"])
    run.writer.scalars(step, values | skipped | speed)
    return found


def _adviser(stage) -> Callable[[dict], None]:
    """Returns f(scalars), which warns where a stage's `advice` on them begins to apply."""
    before = ""

    def advise(scalars: dict) -> None:
        nonlocal before
        found = stage.advice(scalars) if hasattr(stage, "advice") else ""
        if found and not before:
            logging.warning("%s", found)
        before = found

    return advise
