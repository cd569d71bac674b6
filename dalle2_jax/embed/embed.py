"""The pass over a data set: records read, encoded and written, shard by shard."""

import concurrent.futures
import re
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
from absl import logging
from etils import epath

from dalle2_jax.data import embeddings
from dalle2_jax.data.records import BadRecord
from dalle2_jax.embed.encoders import Encoder, make_encoder
from dalle2_jax.models import models
from dalle2_jax.runtime import files, metrics


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
    data |= dict(flip=False, random_crop=False, low_res_blur=0.0, low_res_bsr="", embeddings="", leave_out="")
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
