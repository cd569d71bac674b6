"""python -m dalle2_jax.embed --config=configs/X.py --clip=MODEL --out=DIR [--config.data.path=...]

Writes the CLIP embeddings of a data set in clip-retrieval's layout, to train stages from them:

    DIR/SPLIT/img_emb/img_emb_00000.npy      [n, E], one row a record, in the data set's order
    DIR/SPLIT/text_emb/text_emb_00000.npy    [n, E], of the record's first caption in data.language
    DIR/SPLIT/metadata/metadata_00000.parquet   key, that caption, and why a record has no embedding
    DIR/SPLIT/embed.json                     data set, CLIP, number of rows, records left out
    DIR/tokenizer                            CLIP's

`data` of the config names the data set, as in training. A record that cannot be read has a row of NaN, which
training counts and replaces, so row i is always record i. The same command again writes the missing shards.
Several processes (see `processes`), or machines started separately with --worker=I/N, share the shards.
"""

import concurrent.futures
import re
import time
from collections import Counter
from collections.abc import Iterator

import jax
import numpy as np
from absl import app, flags, logging
from etils import epath

from dalle2_jax.data import embeddings
from dalle2_jax.data.records import BadRecord
from dalle2_jax.models import models
from dalle2_jax.runtime import commandline, files, hub, metrics, modeldir, partition, processes
from dalle2_jax.runtime.batch import as_floats
from dalle2_jax.runtime.batched import Batched
from dalle2_jax.runtime.commandline import define_config
from dalle2_jax.train import checks

DTYPES = ("float16", "float32")


class Encoder:
    """A trained CLIP as a function of batches of one size, on this process's devices."""

    def __init__(self, path: str, batch_size: int):
        self.stage, _, params = models.load_stage(path, "clip")

        def encode(params, batch):
            tokens, mask = models.crop_tokens(batch["tokens"], batch["token_mask"], self.stage.context_length)
            text, _ = self.stage.encode_text(params, tokens, mask)
            return self.stage.encode_image(params, batch["clip.image"]), text

        options = partition.compiler_options()
        self._encode = Batched(encode, params, batch_size, prepare=as_floats, compiler_options=options)
        self.batch_size, self._params = self._encode.size, self._encode.params

    def __call__(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(image embeddings, text embeddings) float32 [n, E] of n <= batch_size examples.

        batch: clip.image uint8 [n, S, S, 3], tokens int32 [n, L], token_mask bool [n, L].
        """
        image, text = self._encode(batch)
        return np.asarray(image, np.float32), np.asarray(text, np.float32)


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
      dataset: of `data.pipeline.make_dataset` with clip.image, tokens and token_mask.
      plan: JSON values that must not differ between runs, rows_per_shard and dtype among them.
      worker: (I, N).
      threads: that read records while the devices compute.
      progress: called as progress(records done, records of this worker).

    Raises ValueError if the folder holds other embeddings.
    """
    parts = embeddings.Parts(folder, dataset.num_records, plan["rows_per_shard"])
    embeddings.keep_plan(folder, plan)
    mine = [part for part in range(worker[0], parts.count, worker[1]) if not parts.is_complete(part)]
    total, done = sum(len(parts.rows(part)) for part in mine), 0
    lost: Counter[str] = Counter()
    with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
        for part in mine:
            rows = parts.rows(part)
            shape = len(rows), encoder.stage.embed_dim
            image, text = (np.full(shape, np.nan, np.float32) for _ in range(2))
            keys, captions, reasons = ([""] * len(rows) for _ in range(3))
            for chunk, records in _read_ahead(pool, dataset, rows, encoder.batch_size):
                readable = []
                for row, (key, caption, reason, fields) in zip(chunk, records, strict=True):
                    place = row - rows[0]
                    keys[place], captions[place], reasons[place] = key, caption, reason
                    if fields is not None:
                        readable.append((place, fields))
                if readable:
                    places = [place for place, _ in readable]
                    names = readable[0][1]
                    image[places], text[places] = encoder(
                        {name: np.stack([fields[name] for _, fields in readable]) for name in names}
                    )
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
            lost.update(reason for reason in reasons if reason)
            image, text = image.astype(plan["dtype"]), text.astype(plan["dtype"])
            parts.write(part, image, text, keys, captions, reasons)
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
    """Embed `splits` of the data set of `config` (plain JSON types) with the CLIP at `clip` into `out`.

    Returns split -> unreadable records of this worker by reason. Raises ValueError for impossible settings,
    and if `out` holds the embeddings of another data set or CLIP.
    """
    from dalle2_jax.data import pipeline, tokenizer

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} must be one of {', '.join(DTYPES)}")
    if config["data"].get("sources"):
        raise ValueError("data.sources: embed each source by itself, and name its folder as its embeddings")
    config, place = models.expand_paths(config), epath.Path(files.expand(out))
    encoder = Encoder(clip, batch_size)
    folder = epath.Path(hub.local(clip)) / "tokenizer"
    words = tokenizer.load_tokenizer(folder, encoder.stage.context_length)
    sha256, lost = modeldir.sha256(encoder._params), {}
    if worker[0] == 0:
        words.save(place / "tokenizer")
    data = {name: value for name, value in config["data"].items() if name not in ("split", "eval_split")}
    data |= dict(flip=False, random_crop=False, low_res_blur=0.0, low_res_bsr="", embeddings="")
    for split in splits:
        dataset = pipeline.make_dataset(
            **data,
            split=split,
            fields=("clip.image", "tokens", "token_mask"),
            image_sizes={"clip.image": encoder.stage.image_size},
            tokenizer=words,
        )
        plan = dict(
            fingerprint=dataset.fingerprint,
            records=dataset.num_records,
            rows_per_shard=rows_per_shard,
            clip_sha256=sha256,
            embed_dim=encoder.stage.embed_dim,
            unit_norm=getattr(encoder.stage, "unit_embeds", True),
            dtype=dtype,
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
        data = config["data"]
        splits = tuple(FLAGS.splits or dict.fromkeys((data["split"], data["eval_split"])))
        processes.join()
        worker = parse_worker(FLAGS.worker) if FLAGS.worker else (jax.process_index(), jax.process_count())
        lost = embed(
            config,
            FLAGS.clip,
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
    commandline.DEFINE_path("clip", None, "Workdir or model directory of the trained CLIP.")
    commandline.DEFINE_path("out", None, "Folder for the embeddings; an interrupted pass resumes there.")
    flags.DEFINE_list("splits", None, "Splits to embed; default: data.split and data.eval_split.")
    flags.DEFINE_integer("rows_per_shard", 10_000, "Records a file.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Records that this process embeds at once.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float16", DTYPES, "Type of the stored numbers.")
    flags.DEFINE_string("worker", None, "I/N: embed every N-th shard from I, without other processes.")
    flags.DEFINE_bool("debug", False, "Show the full traceback of an error in the settings.")
    flags.mark_flags_as_required(["config", "clip", "out"])
    logging.set_verbosity(logging.INFO)
    app.run(main)
