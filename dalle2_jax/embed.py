"""python -m dalle2_jax.embed --config=configs/X.py --clip=MODEL --out=DIR [--config.data.path=...]

Writes the CLIP embeddings of a data set, as clip-retrieval lays them out, for stages that train from them:

    DIR/SPLIT/img_emb/img_emb_00000.npy      [n, E], one row a record, in the data set's order
    DIR/SPLIT/text_emb/text_emb_00000.npy    [n, E], of the record's first caption in data.language
    DIR/SPLIT/metadata/metadata_00000.parquet   key, that caption, and the reason where there is no embedding
    DIR/SPLIT/embed.json                     of which data set and CLIP, how many rows, what was left out
    DIR/tokenizer                            CLIP's

`data` of the config says which data set, as in training. A record that cannot be read has a row of NaN,
which training counts and replaces; so rows and records stay side by side. Run again, it goes on with the
shards that are missing. Several processes (see `processes`), or several machines started by hand with
--worker=I/N, share the shards.
"""

import concurrent.futures
import re
import time
from collections import Counter

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
            return self.stage.encode_image(params, batch["clip_image"]), text

        options = partition.compiler_options()
        self._encode = Batched(encode, params, batch_size, prepare=as_floats, compiler_options=options)
        self.batch_size, self._params = self._encode.size, self._encode.params

    def __call__(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(image embeddings, text embeddings) float32 [n, E] of n <= batch_size rows.

        batch: clip_image uint8 [n, S, S, 3], tokens int32 [n, L], token_mask bool [n, L].
        """
        return tuple(np.asarray(value, np.float32) for value in self._encode(batch))


def embed_split(
    dataset,
    encoder: Encoder,
    folder: epath.Path,
    *,
    plan: dict,
    rows_per_shard: int,
    dtype: str,
    worker: tuple[int, int] = (0, 1),
    threads: int = 2,
    show=None,
) -> Counter:
    """Write the shards of one split that are missing, every N-th of them; what could not be read, by reason.

    Args:
      dataset: of `data.pipeline.make_dataset` with clip_image, tokens and token_mask.
      plan: JSON values that must not differ between runs; written first, compared afterwards.
      worker: (I, N). show(rows done, rows of this worker): progress.

    Raises ValueError where the folder holds the embeddings of something else.
    """
    parts = embeddings.Parts(folder, dataset.num_records, rows_per_shard)
    embeddings.keep_plan(folder, plan)
    mine = [part for part in range(worker[0], parts.count, worker[1]) if not parts.is_complete(part)]
    total, done, lost = sum(len(parts.rows(part)) for part in mine), 0, Counter()
    width = encoder.stage.embed_dim
    with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
        for part in mine:
            rows = parts.rows(part)
            image, text = (np.full((len(rows), width), np.nan, np.float32) for _ in range(2))
            keys, captions, reasons = ([""] * len(rows) for _ in range(3))
            chunks = [rows[i : i + encoder.batch_size] for i in range(0, len(rows), encoder.batch_size)]
            waiting = [pool.submit(_read, dataset, row) for row in chunks[0]]
            for number, chunk in enumerate(chunks):
                found = [future.result() for future in waiting]
                following = chunks[number + 1] if number + 1 < len(chunks) else ()
                waiting = [pool.submit(_read, dataset, row) for row in following]  # while the devices compute
                good = []
                for row, (key, caption, reason, fields) in zip(chunk, found, strict=True):
                    place = row - rows[0]
                    keys[place], captions[place], reasons[place] = key, caption, reason
                    if fields is not None:
                        good.append((place, fields))
                if good:
                    places = [place for place, _ in good]
                    batch = {name: np.stack([fields[name] for _, fields in good]) for name in good[0][1]}
                    image[places], text[places] = encoder(batch)
                done += len(chunk)
                if show is not None:
                    show(done, total)
            lost.update(reason for reason in reasons if reason)
            parts.write(part, image.astype(dtype), text.astype(dtype), keys, captions, reasons)
    return lost


def _read(dataset, row: int) -> tuple[str, str, str, dict | None]:
    """(key, caption, reason, fields) of a record; fields None where the reason says why."""
    try:
        key, caption, fields = dataset.record_fields(row)
        return key, caption, "", fields
    except BadRecord as error:
        return dataset.key(row), "", error.reason, None


class Lines:
    """A line with progress and the time left, every few seconds."""

    def __init__(self, what: str, every: float = 10.0):
        self._what, self._every, self._began = what, every, time.monotonic()
        self._last = self._began

    def __call__(self, done: int, total: int) -> None:
        """Print progress, at most once in `every` seconds and at the end."""
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

    Returns what this worker could not read, by split and reason. Raises ValueError for settings that cannot
    be, and where `out` holds the embeddings of another data set or CLIP.
    """
    from dalle2_jax.data import pipeline, tokenizer

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} must be one of {', '.join(DTYPES)}")
    config, out = models.expand_paths(config), epath.Path(files.expand(out))
    encoder = Encoder(clip, batch_size)
    folder = epath.Path(hub.local(clip)) / "tokenizer"
    words = tokenizer.load_tokenizer(folder, encoder.stage.context_length)
    sha256, lost = modeldir.sha256(encoder._params), {}
    if worker[0] == 0:
        words.save(out / "tokenizer")
    data = {name: value for name, value in config["data"].items() if name not in ("split", "eval_split")}
    data |= dict(flip=False, random_crop=False, low_res_blur=0.0, low_res_bsr="", embeddings="")
    for split in splits:
        dataset = pipeline.make_dataset(
            **data,
            split=split,
            fields=("clip_image", "tokens", "token_mask"),
            clip_image_size=encoder.stage.image_size,
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
            out / split,
            plan=plan,
            rows_per_shard=rows_per_shard,
            dtype=dtype,
            worker=worker,
            threads=data.get("num_workers", 2),
            show=Lines(split),
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
    from dalle2_jax.data import budget

    refused = (ValueError, OSError, budget.TooManyBadRecords)
    with processes.together(refused, status=checks.FAILED, say=logging.error, debug=FLAGS.debug):
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
    define_config("Config file whose data is embedded; override with --config.data.path=... and the like.")
    commandline.DEFINE_path("clip", None, "Workdir or model directory of the trained CLIP.")
    commandline.DEFINE_path("out", None, "Where the embeddings go; an interrupted pass goes on there.")
    flags.DEFINE_list("splits", None, "Splits to embed; default: data.split and data.eval_split.")
    flags.DEFINE_integer("rows_per_shard", 10_000, "Records a file.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Records that this process embeds at once.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float16", DTYPES, "Type of the stored numbers.")
    flags.DEFINE_string("worker", None, "I/N: embed every N-th shard from I, without other processes.")
    flags.DEFINE_bool("debug", False, "Show the whole traceback of an error in the settings.")
    flags.mark_flags_as_required(["config", "clip", "out"])
    logging.set_verbosity(logging.INFO)
    app.run(main)
