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

--duplicates=THRESHOLD also lists the pairs of pictures whose embeddings have that cosine or more, in
DIR/SPLIT/duplicates.tsv, and the later record of each pair in DIR/SPLIT/leave_out.txt, a file for
--config.data.leave_out.
"""

from dalle2_jax.runtime import start

start.begin(__name__, "embed: loading JAX")


import jax
from absl import flags, logging
from etils import epath

from dalle2_jax.data import duplicates, embeddings
from dalle2_jax.embed import embed
from dalle2_jax.embed.encoders import DTYPES, tokenizer_alone
from dalle2_jax.models import models
from dalle2_jax.runtime import commandline, partition, processes
from dalle2_jax.runtime.commandline import define_config
from dalle2_jax.train import checks

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
            config["frozen"] = tokenizer_alone(config, FLAGS.clip)
        data = config["data"]
        if FLAGS.duplicates is not None and not FLAGS.clip:
            raise ValueError("--duplicates compares CLIP's embeddings: give --clip=MODEL")
        splits = tuple(FLAGS.splits or dict.fromkeys((data["split"], data["eval_split"])))
        processes.join()
        worker = (
            embed.parse_worker(FLAGS.worker) if FLAGS.worker else (jax.process_index(), jax.process_count())
        )
        lost = embed.embed(
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
                if FLAGS.duplicates is not None:
                    folder = epath.Path(FLAGS.out) / split
                    near, left = duplicates.write(folder, FLAGS.duplicates)
                    logging.info("%s: %d near-duplicate pairs, %d records to leave out", folder, near, left)
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
    of_pairs = "List pairs of pictures with this cosine of their embeddings or more, such as 0.95."
    flags.DEFINE_float("duplicates", None, of_pairs, lower_bound=-1.0, upper_bound=1.0)
    flags.DEFINE_bool("debug", False, "Show the full traceback of an error in the settings.")
    flags.mark_flags_as_required(["config", "out"])
    logging.set_verbosity(logging.INFO)
    start.run(main, settings=checks.settings_of_flag)
