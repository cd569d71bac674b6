"""dalle2-jax embed --config=configs/X.py --clip=MODEL --out=DIR [--config.data.path=...]
dalle2-jax embed --config=configs/X.py --config.frozen.t5=MODEL --out=DIR [--config.data.path=...]
dalle2-jax embed --kind=codes --config=configs/X.py --config.frozen.tokenizer=MODEL --out=DIR [...]

Writes the CLIP embeddings of a data set in clip-retrieval's layout, to train stages from them:

    DIR/SPLIT/img_emb/img_emb_00000.npy      [n, E], one row a record, in the data set's order
    DIR/SPLIT/text_emb/text_emb_00000.npy    [n, E], of the record's first caption in data.language
    DIR/SPLIT/metadata/metadata_00000.parquet   key, that caption, and why a record has no embedding
    DIR/SPLIT/embed.json                     data set, encoder, number of rows, records left out
    DIR/tokenizer                            CLIP's

Without --clip it writes the states of the frozen text encoder of the config, as many as a caption has tokens:

    DIR/SPLIT/text_states/text_states_00000.npy    the bits of bfloat16 [tokens, D], caption after caption
    DIR/SPLIT/token_counts/token_counts_00000.npy  [n], the tokens of each record's first caption

With --kind=codes it writes the codes of the config's frozen tokenizer:

    DIR/SPLIT/codes/codes_00000.npy    [n, L] integers, all levels of a picture in one row, the coarsest first

`data` of the config names the data set, as in training. A record that cannot be read has a row of NaN, or no
states, which training counts and replaces, so row i is always record i. The same command again writes the
missing shards. Several processes (see `processes`), or machines started separately with --worker=I/N, share
the shards.
"""

from dalle2_jax.runtime import start

start.begin(__name__, "embed: loading JAX")


import concurrent.futures
import re
import time
from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from etils import epath

from dalle2_jax.data import embeddings, text_states
from dalle2_jax.data.records import BadRecord
from dalle2_jax.models import frozen, models
from dalle2_jax.runtime import commandline, files, hub, metrics, modeldir, partition, processes
from dalle2_jax.runtime.batch import as_floats
from dalle2_jax.runtime.batched import Batched
from dalle2_jax.runtime.commandline import define_config
from dalle2_jax.train import checks

DTYPES = ("float16", "float32")


class ClipEncoder:
    """A trained CLIP as a function of batches of one size, on this process's devices."""

    def __init__(self, path: str, batch_size: int, dtype: str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} must be one of {', '.join(DTYPES)}")
        self.stage, _, params = models.load_stage(path, "clip")
        self.folder, self._dtype = epath.Path(hub.local(path)), dtype
        self.data = dict(
            fields=("clip.image", "tokens", "token_mask"), image_sizes={"clip.image": self.stage.image_size}
        )

        def encode(params, batch):
            tokens, mask = models.crop_tokens(batch["tokens"], batch["token_mask"], self.stage.context_length)
            text, _ = self.stage.encode_text(params, tokens, mask)
            return self.stage.encode_image(params, batch["clip.image"]), text

        options = partition.compiler_options()
        self._encode = Batched(encode, params, batch_size, prepare=as_floats, compiler_options=options)
        self.batch_size = self._encode.size
        self.plan = dict(
            clip_sha256=modeldir.sha256(self._encode.params),
            embed_dim=self.stage.embed_dim,
            unit_norm=getattr(self.stage, "unit_embeds", True),
            dtype=dtype,
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The embeddings of image and text, floats [2, E], of each of n <= batch_size examples.

        batch: clip.image uint8 [n, S, S, 3], tokens int32 [n, L], token_mask bool [n, L].
        """
        image, text = self._encode(batch)
        return list(np.stack([image, text], axis=1).astype(np.float32))

    def pack(self, rows: list[np.ndarray | None]) -> dict[str, np.ndarray]:
        """{kind: array to write} of the records of a shard, NaN for None."""
        lost = np.full((2, self.stage.embed_dim), np.nan, np.float32)
        table = np.stack([lost if row is None else row for row in rows]).astype(self._dtype)
        return dict(zip(embeddings.OF_CLIP, table.swapaxes(0, 1), strict=True))


class StatesEncoder:
    """A frozen text encoder, such as a T5, as a function of batches of one size."""

    def __init__(self, name: str, path: str, batch_size: int):
        found = frozen.load({"frozen": {name: path}})[name]
        self.stage, self.folder = found.stage, epath.Path(hub.local(path))
        self.data = dict(fields=("tokens", "token_mask"))

        def encode(params, batch):
            tokens, mask = models.crop_tokens(batch["tokens"], batch["token_mask"], self.stage.context_length)
            reads = {"tokens": tokens, "token_mask": mask}
            states = frozen.call(self.stage, "encode_text", params, reads)["text_states"]
            return states.astype(jnp.bfloat16), mask.sum(axis=1)

        options = partition.compiler_options()
        self._encode = Batched(encode, found.params, batch_size, compiler_options=options)
        self.batch_size = self._encode.size
        self._width = models.encoded_specs(self.stage)["text_states"].shape[-1]
        self.plan = dict(
            frozen={name: found.sha256},
            width=self._width,
            context_length=self.stage.context_length,
            dtype="bfloat16",
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The states bfloat16 [tokens, D] of each of n <= batch_size captions: as many as it has tokens.

        batch: tokens int32 [n, L], token_mask bool [n, L].
        """
        states, counts = self._encode(batch)
        return [one[:count] for one, count in zip(states, counts, strict=True)]

    def pack(self, rows: list[np.ndarray | None]) -> dict[str, np.ndarray]:
        """{kind: array to write} of the records of a shard."""
        return text_states.packed(rows, self._width)


class CodesEncoder:
    """A frozen tokenizer of pictures as a function of batches of one size."""

    def __init__(self, name: str, path: str, batch_size: int):
        found = frozen.load({"frozen": {name: path}})[name]
        self.stage, self.folder, self._field = found.stage, None, f"{name}.image"
        self.data = dict(fields=(self._field,), image_sizes={self._field: self.stage.image_size})
        ((do, _),) = frozen.ops(self.stage, "encode").items()

        def encode(params, batch):
            return frozen.call(self.stage, do, params, {"image": batch[self._field]})["codes"]

        options = partition.compiler_options()
        self._encode = Batched(encode, found.params, batch_size, prepare=as_floats, compiler_options=options)
        self.batch_size = self._encode.size
        self._length = sum(height * width for height, width in self.stage.grids)
        self.plan = dict(frozen={name: found.sha256}, codes=dict(grids=self.stage.grids))

    def __call__(self, batch: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The codes [L] of each of n <= batch_size pictures; batch: NAME.image uint8 [n, S, S, 3]."""
        return list(self._encode(batch))

    def pack(self, rows: list[np.ndarray | None]) -> dict[str, np.ndarray]:
        """{kind: array to write} of the records of a shard."""
        return embeddings.packed_codes(rows, self._length, max(self.stage.num_codes))


Encoder = ClipEncoder | StatesEncoder | CodesEncoder


def make_encoder(config: dict, clip: str, batch_size: int, dtype: str) -> Encoder:
    """The CLIP at `clip`, or the one text encoder or tokenizer of `config.frozen`. ValueError without any."""
    if clip:
        return ClipEncoder(clip, batch_size, dtype)
    paths = frozen.paths({"frozen": config.get("frozen")})
    stages = {name: models.open_stage(path, name)[0] for name, path in paths.items()}
    if len(stages) == 1 and hasattr([*stages.values()][0], "num_codes"):
        return CodesEncoder(*paths.popitem(), batch_size)
    texts = [name for name, stage in stages.items() if frozen.ops(stage, "encode_text")]
    if len(texts) != 1 or texts == ["clip"]:
        raise ValueError(
            "give --clip=MODEL for CLIP's embeddings, or --config.frozen.t5=MODEL for the states of one text "
            f"encoder; config.frozen has {', '.join(texts) or 'none'}"
        )
    return StatesEncoder(texts[0], paths[texts[0]], batch_size)


def embed_split(
    dataset,
    encoder: Encoder,
    folder: epath.Path,
    plan: dict,
    *,
    worker: tuple[int, int] = (0, 1),
    threads: int = 2,
    progress=None,
) -> Counter:
    """Write the missing shards of a split, every N-th of them; returns the unreadable records by reason.

    Args:
      dataset: of `data.pipeline.make_dataset` with the encoder's fields.
      plan: JSON values that must not differ between runs, as `embed` makes them.
      worker: (I, N).
      threads: that read records while the devices compute.
      progress: called as progress(records done, records of this worker).

    Raises ValueError if the folder holds other embeddings.
    """
    parts = embeddings.Parts(folder, plan)
    embeddings.keep_plan(folder, plan)
    mine = [part for part in range(worker[0], parts.count, worker[1]) if not parts.is_complete(part)]
    total, done = sum(len(parts.rows(part)) for part in mine), 0
    lost: Counter[str] = Counter()
    with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
        for part in mine:
            rows = parts.rows(part)
            made: list[np.ndarray | None] = [None] * len(rows)
            keys, captions, reasons = ([""] * len(rows) for _ in range(3))
            for chunk, records in _read_ahead(pool, dataset, rows, encoder.batch_size):
                readable = []
                for row, (key, caption, reason, fields) in zip(chunk, records, strict=True):
                    place = row - rows[0]
                    keys[place], captions[place], reasons[place] = key, caption, reason
                    if fields is not None:
                        readable.append((place, fields))
                if readable:
                    names = readable[0][1]
                    batch = {name: np.stack([fields[name] for _, fields in readable]) for name in names}
                    for (place, _), encoded in zip(readable, encoder(batch), strict=True):
                        made[place] = encoded
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
            lost.update(reason for reason in reasons if reason)
            parts.write(part, encoder.pack(made), keys, captions, reasons)
    return lost


def _read_ahead(pool, dataset, rows: range, size: int) -> Iterator[tuple[range, list]]:
    """Yields (`size` rows or fewer, their `_read`) while the pool reads the rows after them."""
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    waiting = [pool.submit(_read, dataset, row) for row in chunks[0]]
    for chunk, following in zip(chunks, [*chunks[1:], ()], strict=True):
        records = [future.result() for future in waiting]
        waiting = [pool.submit(_read, dataset, row) for row in following]
        yield chunk, records


def _read(dataset, row: int) -> tuple[str, str, str, dict | None]:
    """(key, caption, reason, fields) of a record; fields are None for an unreadable one, with a reason."""
    try:
        key, caption, fields = dataset.record_fields(row)
        return key, caption, "", fields
    except BadRecord as error:
        return dataset.key(row), "", error.reason, None


class Lines:
    """Logs progress and the time left, every few seconds."""

    def __init__(self, what: str, every: float = 10.0):
        self._what, self._every, self._began = what, every, time.monotonic()
        self._last = self._began

    def __call__(self, done: int, total: int) -> None:
        """Log progress, at most once in `every` seconds and at the end."""
        now = time.monotonic()
        if now - self._last < self._every and done < total:
            return
        self._last, rate = now, done / max(now - self._began, 1e-9)
        left = metrics.show_duration((total - done) / rate)
        logging.info("%s: %d of %d records, %.1f a second, %s left", self._what, done, total, rate, left)


def embed(
    config: dict,
    clip: str,
    out: str,
    *,
    splits: tuple[str, ...],
    rows_per_shard: int = 10_000,
    batch_size: int = 64,
    dtype: str = "float16",
    worker: tuple[int, int] = (0, 1),
) -> dict[str, Counter]:
    """Embed `splits` of the data set of `config` (plain JSON types) into `out`, by `make_encoder`'s encoder.

    Returns split -> unreadable records of this worker by reason. Raises ValueError for impossible settings,
    and if `out` holds the embeddings of another data set or encoder.
    """
    from dalle2_jax.data import pipeline, tokenizer

    if config["data"].get("sources"):
        raise ValueError("data.sources: embed each source by itself, and name its folder as its embeddings")
    config, place = models.expand_paths(config), epath.Path(files.expand(out))
    encoder, lost, words = make_encoder(config, clip, batch_size, dtype), {}, None
    if encoder.folder is not None:
        words = tokenizer.load_tokenizer(encoder.folder / "tokenizer", encoder.stage.context_length)
        if worker[0] == 0:
            words.save(place / "tokenizer")
    data = {k: v for k, v in config["data"].items() if k not in ("split", "eval_split", "bpe_dropout")}
    data |= dict(flip=False, random_crop=False, low_res_blur=0.0, low_res_bsr="", embeddings="")
    for split in splits:
        dataset = pipeline.make_dataset(
            **data,
            split=split,
            tokenizer=words,
            **encoder.data,
        )
        plan = dict(
            fingerprint=dataset.fingerprint,
            records=dataset.num_records,
            rows_per_shard=rows_per_shard,
            **encoder.plan,
            data={n: data[n] for n in ("source", "path", "language")} | {"split": split},
        )
        lost[split] = embed_split(
            dataset,
            encoder,
            place / split,
            plan,
            worker=worker,
            threads=data.get("num_workers", 2),
            progress=Lines(split),
        )
    return lost


def parse_worker(text: str) -> tuple[int, int]:
    """'I/N' -> (I, N), I from 0. Raises ValueError."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise ValueError(f"--worker={text!r} must be I/N with I from 0 to N - 1, such as 0/8")
    return int(found[1]), int(found[2])


def _tokenizer_alone(config: dict, clip: str) -> dict[str, str]:
    """{name: path} of the one tokenizer of pictures among `config.frozen`; ValueError without."""
    paths = frozen.paths({"frozen": config.get("frozen")})
    found = {n: path for n, path in paths.items() if hasattr(models.open_stage(path, n)[0], "num_codes")}
    if len(found) != 1 or clip:
        raise ValueError("--kind=codes needs one tokenizer, --config.frozen.tokenizer=MODEL, and no --clip")
    return found


FLAGS = flags.FLAGS


def main(argv):
    """Run the command; `argv` without the flags."""
    from dalle2_jax.data import bad_records

    refused = (ValueError, OSError, bad_records.TooManyBadRecords)
    with processes.fail_together(refused, status=checks.FAILED, say=logging.error, debug=FLAGS.debug):
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments {argv[1:]}")
        partition.initialise()
        config = models.to_plain(FLAGS.config)
        checks.check_names(config)
        if FLAGS.kind == "codes":
            config["frozen"] = _tokenizer_alone(config, FLAGS.clip)
        data = config["data"]
        splits = tuple(FLAGS.splits or dict.fromkeys((data["split"], data["eval_split"])))
        processes.join()
        worker = parse_worker(FLAGS.worker) if FLAGS.worker else (jax.process_index(), jax.process_count())
        lost = embed(
            config,
            FLAGS.clip or "",
            FLAGS.out,
            splits=splits,
            rows_per_shard=FLAGS.rows_per_shard,
            batch_size=FLAGS.batch_size,
            dtype=FLAGS.dtype,
            worker=worker,
        )
        processes.sync("embedded")
        for split in splits:
            missing = embeddings.missing_parts(epath.Path(FLAGS.out) / split)
            if missing:
                logging.warning(
                    "%s: %d shards are still missing (other workers', or interrupted)", split, missing
                )
            elif jax.process_index() == 0:
                counted = embeddings.finish(epath.Path(FLAGS.out) / split)
                logging.info("%s is complete; records left out by reason: %s", split, counted or "none")
        logging.info("left out by this process: %s", {name: dict(found) for name, found in lost.items()})


if __name__ == "__main__":
    define_config("Config file with the data to embed; override with --config.data.path=... and the like.")
    commandline.DEFINE_path(
        "clip", None, "Workdir or model directory of a trained CLIP; without, states are written."
    )
    commandline.DEFINE_path("out", None, "Folder for the embeddings; an interrupted pass resumes there.")
    flags.DEFINE_list("splits", None, "Splits to embed; default: data.split and data.eval_split.")
    flags.DEFINE_integer("rows_per_shard", 10_000, "Records a file.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Records that this process embeds at once.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float16", DTYPES, "Type of stored embeddings; states are bfloat16.")
    flags.DEFINE_enum("kind", None, ("codes",), "Write codes; default: by --clip and config.frozen.")
    flags.DEFINE_string("worker", None, "I/N: embed every N-th shard from I, without other processes.")
    flags.DEFINE_bool("debug", False, "Show the full traceback of an error in the settings.")
    flags.mark_flags_as_required(["config", "out"])
    logging.set_verbosity(logging.INFO)
    start.run(main, settings=checks.settings_of_flag)
