"""An open model directory: its stages, their weights on the devices, functions compiled for micro-batches.

Examples (captions, pictures) are split over the processes and run in micro-batches of one size, which are
split over a process's devices. The engine keeps a compiled function for every (stage, settings, shapes).
"""

import concurrent.futures
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from dalle2_jax import systems
from dalle2_jax.data.tokenizer import Tokenizer, load_tokenizer
from dalle2_jax.models import models
from dalle2_jax.models.nets import layers
from dalle2_jax.runtime import batched, files, hub, modeldir, partition, processes, programs

BUNDLED = "scenes"  # the model of the package that is drawn with where none is named
BATCH_SIZE = 8
# progress(step, examples done, number of examples, seconds in this step without compiling)
Progress = Callable[[str, int, int, float], None]
OnImages = Callable[[str, np.ndarray], None]  # on_images(step, uint8 [N, h, w, 3]), when a step has finished
MAX_PROGRAMS = 64  # of an engine; the least recently used are dropped


@dataclasses.dataclass(frozen=True)
class Task:
    """A function to compile, and its inputs.

    Attributes:
      name: the stage whose parameters `function` gets.
      function: (params, batch, scalars) -> a tree of arrays [B, ...].
      settings: hashable, everything that `function` closes over. Name, settings, specs and names of scalars
        identify the program.
      specs: field -> shape and type of one example.
      scalars: numpy numbers that are traced: another value needs no new program.
      steps: network steps an example. label: the name for timing and progress; the stage's name if empty.
      others: further stages whose parameters `function` needs; it then gets {stage name: parameters}.
      keep: keep the program on disk (`runtime.programs`): the key, the system and the configs of the stages
        identify it in every process.
    """

    name: str
    function: Callable
    settings: tuple
    specs: dict[str, jax.ShapeDtypeStruct]
    scalars: Mapping[str, np.generic] = dataclasses.field(default_factory=dict)
    steps: int = 1
    label: str = ""
    others: tuple[str, ...] = ()
    keep: bool = False

    @property
    def key(self) -> tuple:
        """Identifies the program."""
        specs = tuple((name, spec.shape, str(spec.dtype)) for name, spec in sorted(self.specs.items()))
        return self.name, self.others, self.settings, specs, tuple(sorted(self.scalars))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of `examples`, `steps` network steps each, without the seconds of waiting for the compiler."""

    examples: int
    steps: int
    seconds: float
    compile_seconds: float


def _read_stages(directory: epath.Path, index: dict, dtype: str | None) -> tuple[dict, dict]:
    """(configs, stages) by stage name, in the index's order."""
    configs, stages = {}, {}
    for name, entry in index["stages"].items():
        path = directory / entry["folder"] / modeldir.CONFIG_FILE
        try:
            config = json.loads(files.read_text(path))
            if dtype is not None:
                config["model"]["dtype"] = dtype
            stages[name] = models.build_stage(config)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error!r}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        configs[name] = config
    return configs, stages


class Engine:
    """The stages of a model directory.

    Attributes:
      name: the model's name. system: the module of `systems` with the actions of its stages.
      entries: stage name -> its entry in the index: folder, uses, tokenizer.
      configs, stages: stage name -> stored config, built stage, in the index's order.
      dtype: the compute type that was asked for; None: as trained.
      mesh: the devices that share a batch.
      low_memory: weights keep their stored type, and the devices hold those of one stage at a time.
    """

    def __init__(self, model_dir: str | os.PathLike | None, dtype: str | None, mesh, low_memory: bool):
        """Open a model directory; see `Pipeline.load`."""
        if model_dir is None and not hub.packaged(BUNDLED):
            raise FileNotFoundError(
                "this installation came without the bundled model (the package's folder 'bundled'): give "
                "a model directory, such as `python -m dalle2_jax.convert workdirs` writes"
            )
        self.directory = epath.Path(hub.local(BUNDLED if model_dir is None else model_dir))
        index = modeldir.read_index(self.directory)
        self.name = index.get("name") or self.directory.name
        self.system, self.entries = systems.load(index["system"]), index["stages"]
        self.configs, self.stages = _read_stages(self.directory, index, dtype)
        self.dtype = dtype
        self.mesh, self.low_memory = partition.local_mesh() if mesh is None else mesh, low_memory
        self._params: dict = {}
        self._programs: dict = {}
        self._tokenizers: dict = {}
        self._lock, self._param_locks = threading.Lock(), {name: threading.Lock() for name in self.stages}
        self._workers = concurrent.futures.ThreadPoolExecutor(2, "compile")
        entries = self.entries.items()
        vocab_sizes = {n: self.tokenizer(n, 3).vocab_size for n, entry in entries if entry["tokenizer"]}
        uses = {name: entry["uses"] for name, entry in entries}
        self.system.check(self.configs, self.stages, vocab_sizes, uses)

    def stage(self, name: str) -> Any:
        """The stage called `name`; ValueError if the model lacks it."""
        if name not in self.stages:
            raise ValueError(f"model {self.name!r} has no {name}: it has {', '.join(self.stages)}")
        return self.stages[name]

    def _folder(self, name: str) -> epath.Path:
        self.stage(name)
        return self.directory / self.entries[name]["folder"]

    def params(self, name: str) -> dict:
        """A stage's parameters, replicated on every device; the first use reads them."""
        path, replicated = self._folder(name), partition.replicated(self.mesh)
        with self._param_locks[name]:
            if name not in self._params:
                _, params = modeldir.load_stage(
                    path, keep_dtype=self.low_memory, place=lambda leaf: jax.device_put(leaf, replicated)
                )
                stage = self.stages[name]
                abstract = programs.shapes(self._file_of([name]), lambda: models.abstract_params(stage))
                modeldir.check_params(params, abstract, os.fspath(path))
                self._params[name] = params
        return self._params[name]

    def weights_file(self, name: str) -> epath.Path:
        """A stage's file of weights."""
        return self._folder(name) / modeldir.WEIGHTS_FILE

    def weights_sha256(self, name: str) -> str:
        """The checksum of a stage's file of weights, in hexadecimal."""
        return files.sha256(self.weights_file(name))

    def _task_params(self, task: Task) -> dict:
        if self.low_memory:
            for name in set(self._params) - {task.name, *task.others}:
                self._params.pop(name, None)
        if not task.others:
            return self.params(task.name)
        return {name: self.params(name) for name in (task.name, *task.others)}

    def tokenizer(self, name: str, context_length: int | None = None) -> Tokenizer:
        """The tokenizer of a stage, at its context length or another."""
        length = context_length or self.stage(name).context_length
        key = self.entries[name]["tokenizer"], length
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(self.directory / key[0], length)
        return self._tokenizers[key]

    def _micro_batch(self, count: int, batch_size: int | None) -> int:
        """Size of the micro-batches of `count` examples: a multiple of the mesh's batch shards."""
        shards = partition.batch_shards(self.mesh)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be 1 or more")
        wanted = min(batch_size or max(BATCH_SIZE, shards), count)
        return -(-wanted // shards) * shards

    def _compile(self, task: Task, size: int):
        """The compiled function of a task for micro-batches of `size` examples."""
        split, replicated = partition.batch_sharding(self.mesh), partition.replicated(self.mesh)
        struct = jax.ShapeDtypeStruct
        batch = {n: struct((size, *x.shape), x.dtype, sharding=split) for n, x in task.specs.items()}
        scalars = {n: struct((), x.dtype, sharding=replicated) for n, x in task.scalars.items()}
        arguments, options = (self._task_params(task), batch, scalars), partition.compiler_options()

        def compiled():
            with partition.use_mesh(self.mesh), layers.shapes_only(True):
                jitted = jax.jit(task.function, out_shardings=split, compiler_options=options)
                return jitted.lower(*arguments).compile()

        inputs = {name: (x.shape, str(x.dtype)) for name, x in modeldir.flatten(arguments).items()}
        path = self._file_of((task.name, *task.others), task.key, inputs, options) if task.keep else None
        return programs.compiled(path, compiled, arguments, self.mesh)

    def _file_of(self, names: Sequence[str], *parts) -> Path | None:
        """Where to keep on disk what follows from these stages and `parts`; None: nowhere."""
        system = getattr(self.system, "__name__", "")  # '': an object of a test, no module
        modules = [system, *(type(self.stages[name]).__module__ for name in names)]
        configs = [(name, self.configs[name]["stage"], self.configs[name]["model"]) for name in names]
        return programs.file_of(modules, self.mesh, system, configs, *parts)

    def prepare(self, task: Task, count: int, batch_size: int | None = None) -> None:
        """Begin, in the background, to read a stage's weights and to compile a task for `count` examples.

        Does nothing with `low_memory`: `run` then reads and compiles.
        """
        if not self.low_memory:
            self._submit(task, count, batch_size)

    def _submit(self, task: Task, count: int, batch_size: int | None) -> concurrent.futures.Future:
        key = task.key, self._micro_batch(count, batch_size)
        with self._lock:
            program = self._programs.pop(key, None)
            if program is None:
                program = self._workers.submit(self._compile, task, key[1])
            self._programs[key] = program  # moves it to the end: the order is that of use
            for old in [old for old, made in self._programs.items() if made.done()]:
                if len(self._programs) > MAX_PROGRAMS and old != key:
                    del self._programs[old]
        return program

    @property
    def compiling(self) -> bool:
        """Whether a program waits for the compiler."""
        with self._lock:
            return any(not program.done() for program in self._programs.values())

    def run(
        self,
        task: Task,
        examples: Mapping[str, np.ndarray],
        *,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> tuple[Any, Timing]:
        """(task.function of all examples as numpy, Timing).

        Args:
          task: the function.
          examples: arrays [N, ...] as in task.specs. Copies of the last example fill the last micro-batch.
          batch_size: examples at a time, rounded up to a multiple of the devices; None: 8, or one a device.
          progress: called after every micro-batch.

        Each of several processes runs its share of the examples and gets all results. Its timing and progress
        count its share alone.
        """
        timings = []

        def share(numbers: np.ndarray):
            count, size = len(numbers), self._micro_batch(len(numbers), batch_size)
            program, compile_seconds = self._program(task, count, batch_size)
            params = self._task_params(task)
            scalars = jax.device_put(dict(task.scalars), partition.replicated(self.mesh))
            outputs, seconds = [], 0.0
            for chosen in batched.micro_batches(count, size):
                began, rows = time.monotonic(), numbers[chosen]
                batch = {name: x[rows].astype(task.specs[name].dtype) for name, x in examples.items()}
                made = program(params, partition.to_global(batch, self.mesh), scalars)
                outputs.append(partition.to_host(made))
                seconds += time.monotonic() - began
                if progress is not None:
                    done = min(size * len(outputs), count)
                    progress(task.label or task.name, done, count, seconds)
            timings.append(Timing(count, task.steps, seconds, compile_seconds))
            return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *outputs)

        return processes.split_over_processes(share, len(next(iter(examples.values())))), timings[0]

    def _program(self, task: Task, count: int, batch_size: int | None) -> tuple[Callable, float]:
        """(the compiled function, seconds of waiting for it)."""
        began, submitted = time.monotonic(), self._submit(task, count, batch_size)
        try:
            return submitted.result(), time.monotonic() - began
        except BaseException:  # programs that wait for the compiler would delay the end of this process
            with self._lock:
                kept = {key: made for key, made in self._programs.items() if not made.cancel()}
                self._programs = {key: made for key, made in kept.items() if made is not submitted}
            raise
