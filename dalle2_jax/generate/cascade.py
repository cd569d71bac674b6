"""A model directory, opened: its stages, their weights on the devices, functions compiled for micro-batches.

Rows (captions, pictures) are shared by the processes there are, and run in micro-batches of a fixed size
that are split over a process's devices. A compiled function is kept for every (stage, settings, shapes).
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from etils import epath

from dalle2_jax.data.tokenizer import Tokenizer, load_tokenizer
from dalle2_jax.models import models
from dalle2_jax.models.nets import layers
from dalle2_jax.runtime import files, hub, modeldir, partition, processes

BUNDLED = Path(__file__).parents[1] / "bundled"
BATCH_SIZE = 8
BASE_STAGES = ("clip", "prior", "decoder")
GUIDES = ("noisy_clip", "classifier")  # that a model may have, to steer its decoder
# progress(stage, rows done, rows in all, seconds in this stage without compiling)
Progress = Callable[[str, int, int, float], None]
# seen(stage, uint8 [N, h, w, 3]): the pictures of a stage that has finished
Seen = Callable[[str, np.ndarray], None]
MAX_PROGRAMS = 64  # kept by a cascade; of more, those that were used least lately are compiled anew


@dataclasses.dataclass(frozen=True)
class Task:
    """What to do with rows.

    Attributes:
      name: the stage whose parameters `function` gets.
      function: (params, batch, scalars) -> arrays of one row for each row of the batch.
      settings: hashable, all that `function` closes over: with name, rows and scalars it names the program.
      rows: name -> shape of one row, and type.
      scalars: numpy numbers that are traced, so that no value needs a new program.
      steps: network steps a row. label: what to call it; the stage's name if empty.
      others: further stages whose parameters `function` needs; it then gets {stage name: parameters}.
    """

    name: str
    function: Callable
    settings: tuple
    rows: dict[str, jax.ShapeDtypeStruct]
    scalars: dict[str, np.generic] = dataclasses.field(default_factory=dict)
    steps: int = 1
    label: str = ""
    others: tuple[str, ...] = ()

    @property
    def key(self) -> tuple:
        """The name of the program."""
        rows = tuple((name, spec.shape, str(spec.dtype)) for name, spec in sorted(self.rows.items()))
        return self.name, self.others, self.settings, rows, tuple(sorted(self.scalars))


@dataclasses.dataclass(frozen=True)
class Timing:
    """What `rows` rows of `steps` network steps each took, in seconds, without and for compiling.

    Compiling counts as long as it was waited for.
    """

    rows: int
    steps: int
    seconds: float
    compile_seconds: float


def check_cascade(configs: dict[str, dict], stages: dict, vocab_size: int) -> None:
    """Raise ValueError unless the stages of a model fit together.

    Args:
      configs: name -> stored config; the names are clip, prior, decoder, and the upsamplers' in their order.
      stages: the same names -> what `models.build_stage` makes of them.
      vocab_size: of the model's tokenizer.
    """
    clip = stages.get("clip")
    for name in ("prior", "decoder"):
        embed_dim = stages[name].embed_dim if name in stages else 0
        if clip is not None and embed_dim and embed_dim != clip.embed_dim:
            raise ValueError(
                f"the {name} has embeddings of {embed_dim} entries, CLIP of {clip.embed_dim}: "
                f"use the CLIP that the {name} was trained with"
            )
    for name in ("prior", "decoder"):
        stage = stages.get(name)
        if clip is not None and stage is not None and stage.states_width:
            if stage.context_length != clip.context_length:
                raise ValueError(
                    f"the {name} reads CLIP's states at {stage.context_length} positions, CLIP has "
                    f"{clip.context_length}: train them with one context_length"
                )
    for name in GUIDES:
        if name in stages and "decoder" in stages:
            _check_guide(name, stages[name], stages["decoder"])
    for name, config in configs.items():
        known = (config["model"].get("text") or {}).get("vocab_size")
        if known and vocab_size > known:
            raise ValueError(
                f"the tokenizer has {vocab_size} tokens, the {name} knows {known}: "
                "use the tokenizer that it was trained with"
            )
    side, previous = getattr(stages.get("decoder"), "image_size", None), "decoder"
    for name, stage in stages.items():
        if name in BASE_STAGES + GUIDES:
            continue
        if side is not None and stage.low_res_size != side:
            raise ValueError(
                f"{name} enlarges pictures of side {stage.low_res_size}, the {previous} draws side {side}: "
                "give the upsamplers in order, each starting where the one before ends"
            )
        side, previous = stage.image_size, name


def _check_guide(name: str, guide, decoder) -> None:
    """Raise ValueError unless a guide reads the very pictures that the decoder noises."""
    if guide.schedule is None:
        raise ValueError(f"{name} was not trained on noised pictures: train one with model.noise")
    if guide.image_size != decoder.image_size or guide.schedule != decoder.diffusion.schedule:
        raise ValueError(
            f"{name} reads pictures of side {guide.image_size} with the noise of its own schedule, the "
            f"decoder draws side {decoder.image_size}: train both with one image_size, schedule and "
            "num_timesteps"
        )


def _read_stages(directory: epath.Path, index: dict, dtype: str | None) -> tuple[dict, dict, dict]:
    """(folders, configs, stages) by stage name, in the order in which they run."""
    named = index["stages"]
    folders = {name: named[name] for name in BASE_STAGES + GUIDES if name in named}
    folders |= {folder: folder for folder in named.get("upsamplers", [])}
    configs, stages = {}, {}
    for name, folder in folders.items():
        path = directory / folder / modeldir.CONFIG_FILE
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
    return folders, configs, stages


class Cascade:
    """The stages of a model directory. Make one with `Cascade.open`.

    Attributes:
      name: the model's name.
      configs, stages: stage name -> stored config, built stage. Upsamplers are named as their folders and
        come last, in the order in which they run.
      has_tokenizer: whether any stage reads tokens, as those of classes and of pictures alone do not.
      mesh: the devices that share a batch.
      low_memory: whether weights keep the type that they are stored in, and only those of the stage at work
        are on the devices.
    """

    def __init__(
        self,
        directory: epath.Path,
        index: dict,
        folders: dict,
        configs: dict,
        stages: dict,
        mesh,
        low_memory: bool = False,
    ):
        self.low_memory = low_memory
        self.directory, self.name = directory, index.get("name") or directory.name
        self.configs, self.stages, self.mesh = configs, stages, mesh
        tokenizer = index.get("tokenizer", "tokenizer") or ""
        self.has_tokenizer, self._tokenizer_path = bool(tokenizer), directory / tokenizer
        self._folders = folders
        self._params: dict = {}
        self._programs: dict = {}
        self._tokenizers: dict = {}
        self._lock, self._param_locks = threading.Lock(), {name: threading.Lock() for name in stages}
        self._workers = concurrent.futures.ThreadPoolExecutor(2, "compile")

    @staticmethod
    def open(
        model_dir: str | os.PathLike | None, dtype: str | None = None, mesh=None, low_memory: bool = False
    ) -> "Cascade":
        """Open a model directory; see `UnCLIP.load`."""
        if model_dir is None:
            if not (BUNDLED / modeldir.INDEX_FILE).exists():
                raise FileNotFoundError(
                    "this installation came without the bundled model (the package's folder 'bundled'): give "
                    "a model directory, such as `python -m dalle2_jax.convert workdirs` writes"
                )
            model_dir = BUNDLED
        directory = epath.Path(hub.local(model_dir))
        index = modeldir.read_index(directory)
        folders, configs, stages = _read_stages(directory, index, dtype)
        mesh = partition.local_mesh() if mesh is None else mesh
        cascade = Cascade(directory, index, folders, configs, stages, mesh, low_memory)
        check_cascade(configs, stages, cascade.tokenizer(3).vocab_size if cascade.has_tokenizer else 0)
        return cascade

    @property
    def reads_embeds(self) -> bool:
        """Whether the decoder draws image embeddings, for which there has to be a prior."""
        return self.stage("decoder").embed_dim > 0

    @property
    def upsamplers(self) -> tuple[str, ...]:
        """Names of the upsamplers, in the order in which they run."""
        return tuple(name for name in self.stages if name not in BASE_STAGES + GUIDES)

    def stage(self, name: str):
        """The stage called `name`; ValueError if the model lacks it."""
        if name not in self.stages:
            raise ValueError(f"model {self.name!r} has no {name}: it has {', '.join(self.stages)}")
        return self.stages[name]

    def params(self, name: str) -> dict:
        """A stage's parameters, whole on every device; read at first use."""
        stage = self.stage(name)
        with self._param_locks[name]:
            if name not in self._params:
                path = self.directory / self._folders[name]
                whole = partition.replicated(self.mesh)
                _, params = modeldir.load_stage(
                    path, keep_dtype=self.low_memory, place=lambda leaf: jax.device_put(leaf, whole)
                )
                modeldir.check_params(params, models.abstract_params(stage), os.fspath(path))
                self._params[name] = params
        return self._params[name]

    def weights_sha256(self, name: str) -> str:
        """The checksum of a stage's file of weights, in hexadecimal."""
        self.stage(name)
        return hashlib.sha256(
            (self.directory / self._folders[name] / modeldir.WEIGHTS_FILE).read_bytes()
        ).hexdigest()

    def _task_params(self, task: Task) -> dict:
        if self.low_memory:
            for name in set(self._params) - {task.name, *task.others}:
                self._params.pop(name, None)
        if not task.others:
            return self.params(task.name)
        return {name: self.params(name) for name in (task.name, *task.others)}

    def tokenizer(self, context_length: int) -> Tokenizer:
        """The model's tokenizer with this context length."""
        if context_length not in self._tokenizers:
            self._tokenizers[context_length] = load_tokenizer(self._tokenizer_path, context_length)
        return self._tokenizers[context_length]

    def _micro_batch(self, count: int, batch_size: int | None) -> int:
        """Rows of a micro-batch: a multiple of the mesh's batch shards, no more than `count` needs."""
        shards = partition.batch_shards(self.mesh)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be 1 or more")
        wanted = min(batch_size or max(BATCH_SIZE, shards), count)
        return -(-wanted // shards) * shards

    def _compile(self, task: Task, size: int):
        """The compiled function of a task for micro-batches of `size` rows."""
        rows, whole = partition.batch_sharding(self.mesh), partition.replicated(self.mesh)
        batch = {
            name: jax.ShapeDtypeStruct((size, *spec.shape), spec.dtype, sharding=rows)
            for name, spec in task.rows.items()
        }
        scalars = {
            name: jax.ShapeDtypeStruct((), value.dtype, sharding=whole)
            for name, value in task.scalars.items()
        }
        params = self._task_params(task)
        with partition.use_mesh(self.mesh), layers.shapes_only(True):
            jitted = jax.jit(task.function, out_shardings=rows, compiler_options=partition.compiler_options())
            return jitted.lower(params, batch, scalars).compile()

    def prepare(self, task: Task, count: int, batch_size: int | None = None) -> None:
        """Start reading a stage's weights and compiling a task for `count` rows, beside what runs meanwhile.

        With little memory nothing is started: `run` does it when the stage's turn has come.
        """
        if not self.low_memory:
            self._submit(task, count, batch_size)

    def _submit(self, task: Task, count: int, batch_size: int | None) -> concurrent.futures.Future:
        key = task.key, self._micro_batch(count, batch_size)
        with self._lock:
            program = self._programs.pop(key, None)
            if program is None:
                program = self._workers.submit(self._compile, task, key[1])
            self._programs[key] = program  # the last is the one used last
            for old in [old for old, made in self._programs.items() if made.done()]:
                if len(self._programs) > MAX_PROGRAMS and old != key:
                    del self._programs[old]
        return program

    def run(
        self,
        task: Task,
        rows: dict[str, np.ndarray],
        *,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ):
        """(task.function of all rows as numpy, Timing).

        Args:
          task: what to do.
          rows: arrays [N, ...] as task.rows says. The last micro-batch is filled up with copies of the last
          row. batch_size: rows at a time, rounded up to a multiple of the devices; None: 8, or one a device.
          progress: called after every micro-batch.

        Of several processes each runs its share of the rows, and every one gets what all of them made; timing
        and progress are of its own.
        """
        timings = []

        def own(mine: np.ndarray):
            made, timing = self._run(task, rows, mine, batch_size, progress)
            timings.append(timing)
            return made

        return processes.in_shares(own, len(next(iter(rows.values())))), timings[0]

    def _run(self, task: Task, rows: dict, mine: np.ndarray, batch_size, progress):
        """`run` of the rows with the numbers `mine` alone."""
        count = len(mine)
        size = self._micro_batch(count, batch_size)
        began = time.monotonic()
        submitted = self._submit(task, count, batch_size)
        try:
            program = submitted.result()
        except BaseException:  # what waits to be compiled would hold up the end of the program
            with self._lock:
                self._programs = {key: made for key, made in self._programs.items() if not made.cancel()}
                self._programs.pop((task.key, size), None)
            raise
        compile_seconds = time.monotonic() - began
        params = self._task_params(task)
        scalars = jax.device_put(task.scalars, partition.replicated(self.mesh))
        outputs, seconds = [], 0.0
        for start in range(0, count, size):
            began = time.monotonic()
            chosen = mine[np.minimum(np.arange(start, start + size), count - 1)]
            batch = {name: value[chosen].astype(task.rows[name].dtype) for name, value in rows.items()}
            outputs.append(partition.to_host(program(params, partition.to_global(batch, self.mesh), scalars)))
            seconds += time.monotonic() - began
            if progress is not None:
                progress(task.label or task.name, min(start + size, count), count, seconds)
        joined = jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *outputs)
        return joined, Timing(count, task.steps, seconds, compile_seconds)
