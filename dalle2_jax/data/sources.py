"""Datasets by name: each function opens one kind of source as random-access records (`records.RecordSource`).

To add a dataset, write one function here and name it in `open_source`. What a caption's language is
follows from the name of its field: `caption`, `text` and `.txt` are 'en', `caption_zh` is 'zh',
`caption_xx` is 'xx'.
"""

import collections
import contextlib
import difflib
import fcntl
import glob
import json
import os
import re

import numpy as np
from absl import logging

from dalle2_jax.data import records
from dalle2_jax.data.records import BadRecord, Record

SOURCES = ("scenes", "tfds", "tar", "tfrecord", "embeddings")
_CAPTION_FIELD = re.compile(r"(?:caption|captions|text|txt)(?:_([a-z]{2,3}))?(?:/text|/raw)?")


def did_you_mean(word: str, known) -> str:
    """'; did you mean X?' where one of `known` is near `word`, and then the known ones."""
    known = sorted(map(str, known))
    near = difflib.get_close_matches(word, known, n=1)
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return (f"; did you mean {near[0]!r}?" if near else ";") + f" There is: {shown or 'nothing'}"


def cache_dir() -> str:
    """Where prepared data lies: $DALLE2_JAX_CACHE, or dalle2_jax under the user's cache directory."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dalle2_jax")
    return os.environ.get("DALLE2_JAX_CACHE") or default


@contextlib.contextmanager
def locked(path: str):
    """Hold an exclusive lock on the file `path`; a process that dies lets go of it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.info("waiting for another process to finish with %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def language_of(field: str) -> str | None:
    """The language of a caption field by its name, or None where the name is not a caption's."""
    match = _CAPTION_FIELD.fullmatch(field)
    return (match.group(1) or "en") if match else None


def decode_caption(data: bytes) -> str:
    """The text of a stored caption. Raises BadRecord('invalid_utf8')."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord("invalid_utf8", str(error)) from None


def _add(captions: dict[str, list[str]], language: str, text: str) -> None:
    text = text.strip()
    if text and text not in captions.setdefault(language, []):
        captions[language].append(text)


def _frozen(captions: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    return {language: tuple(texts) for language, texts in captions.items() if texts}


def find_files(path: str, split: str, suffix: str) -> list[str]:
    """The sorted files of a dataset: `path` is a folder, a file or a glob.

    In a folder, `split` picks FOLDER/SPLIT/*suffix or FOLDER/SPLIT-*suffix; '' takes all files of the folder.

    Raises:
        ValueError: nothing is found; the message names what exists.
    """
    path = os.path.expanduser(os.fspath(path))
    if "://" in path:
        raise ValueError(
            f"{path}: records are read with pread from mounted file systems; mount the bucket (gcsfuse)"
        )
    if not path:
        raise ValueError("data.path is empty: give the folder, or a glob, of the shards")
    if os.path.isfile(path):
        return [path]
    if glob.has_magic(path):
        found = sorted(file for file in glob.glob(path) if os.path.isfile(file))
        if not found:
            folder = os.path.dirname(path)
            folder = folder if os.path.isdir(folder) else "."
            raise ValueError(
                f"no file matches {path}" + did_you_mean(os.path.basename(path), os.listdir(folder))
            )
        return found
    if not os.path.isdir(path):
        parent = os.path.dirname(os.path.abspath(path))
        listing = os.listdir(parent) if os.path.isdir(parent) else []
        raise ValueError(f"{path} does not exist" + did_you_mean(os.path.basename(path), listing))
    if split and os.path.isdir(os.path.join(path, split)):
        path, split = os.path.join(path, split), ""
    names = sorted(name for name in os.listdir(path) if name.endswith(suffix))
    if not names:
        raise ValueError(f"{path} holds no *{suffix}" + did_you_mean(suffix, os.listdir(path)))
    if split:
        chosen = [name for name in names if re.match(re.escape(split) + r"[-_.]", name)]
        if not chosen:
            prefixes = {re.split(r"[-_.]", name)[0] for name in names}
            raise ValueError(
                f"{path} holds no shards of split {split!r} ({split}-*{suffix} or {split}/*{suffix}; split '' takes all)"
                + did_you_mean(split, prefixes)
            )
        names = chosen
    return [os.path.join(path, name) for name in names]


def _missing_by_manifest(path: str, count: int) -> int:
    """How many samples the `_stats.json` that img2dataset writes beside a shard counts beyond `count`."""
    stats = os.path.splitext(path)[0] + "_stats.json"
    try:
        with open(stats, encoding="utf-8") as file:
            expected = int(json.load(file)["successes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return max(0, expected - count)


class _Indexed:
    """The part common to tar and TFRecord: all rows of all files, and which file each comes from."""

    has_images = True

    def __init__(self, paths: list[str], indexes: list[records.Index]):
        self._files = records.Files(paths)
        self._rows = np.concatenate([index.rows for index in indexes])
        self._file_of = np.repeat(
            np.arange(len(paths), dtype=np.int32), [len(index.rows) for index in indexes]
        )
        self._first = np.concatenate([[0], np.cumsum([len(index.rows) for index in indexes])])
        self.refused, self.embed_dims = collections.Counter(), {}
        root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        entries = []
        for path, index in zip(paths, indexes, strict=True):
            self.refused.update(index.refused)
            missing = _missing_by_manifest(path, len(index.rows))
            if missing:
                self.refused["missing_from_shard"] += missing
            for reason, count in index.refused.items():
                logging.warning("%s: %s x %d", path, reason, count)
            if missing:
                logging.warning("%s: %d samples fewer than its _stats.json counts", path, missing)
            entries.append(
                (os.path.relpath(os.path.abspath(path), root), os.path.getsize(path), len(index.rows))
            )
        self.fingerprint = records.fingerprint(entries)
        if not len(self._rows):
            raise ValueError(
                f"no usable record in {len(paths)} files under {root}: refused {dict(self.refused)}"
            )

    def __len__(self):
        return len(self._rows)

    def _key(self, index: int) -> str:
        file = int(self._file_of[index])
        return f"{os.path.basename(self._files.paths[file])}:{index - int(self._first[file])}"


class TarSource(_Indexed):
    """img2dataset's tar shards: KEY.jpg|png|webp with KEY.txt and KEY.json."""

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        file, row = int(self._file_of[index]), self._rows[index].tolist()
        # The 512 bytes before the image are its header, which holds the name.
        offset, size = (row[0] - 512, row[1] + 512) if image else (row[0] - 512, 512)
        data = self._files.read(file, offset, size)
        name = data[:100].split(b"\0")[0].decode("ascii", "replace").rpartition("/")[2].partition(".")[0]
        texts: dict[str, list[str]] = {}
        if captions:
            if row[3] >= 0:
                _add(texts, "en", decode_caption(self._files.read(file, row[2], row[3])))
            if row[5] >= 0:
                _json_captions(self._files.read(file, row[4], row[5]), texts)
        key = f"{os.path.basename(self._files.paths[file])}:{name}"
        return Record(key, data[512:] if image else None, _frozen(texts))


def _json_captions(data: bytes, captions: dict[str, list[str]]) -> None:
    """Add the captions of a JSON object to `captions`. Raises BadRecord for what is no JSON object."""
    try:
        fields = json.loads(decode_caption(data))
    except (ValueError, RecursionError) as error:
        raise BadRecord("invalid_json", str(error)) from None
    if not isinstance(fields, dict):
        raise BadRecord("invalid_json", "not an object")
    for field, value in fields.items():
        language = language_of(field)
        if language:
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    _add(captions, language, text)


def open_tar(path: str, split: str) -> TarSource:
    """Tar shards as img2dataset writes them; see `find_files` for path and split."""
    paths = find_files(path, split, ".tar")
    return TarSource(paths, [records.index_tar(file) for file in paths])


class ExampleSource(_Indexed):
    """TFRecord files of tf.train.Example protos with an encoded image and captions."""

    def __init__(self, paths, indexes, image_field: str, caption_fields: dict[str, str]):
        super().__init__(paths, indexes)
        from tensorflow.core.example import example_pb2

        self._parse = example_pb2.Example.FromString
        self._image_field, self._caption_fields = image_field, caption_fields

    def fields(self, index: int):
        """{name: tf.train.Feature} of one record. Raises BadRecord."""
        from google.protobuf.message import DecodeError

        data = self._files.read(int(self._file_of[index]), *self._rows[index].tolist())
        try:
            return self._parse(data).features.feature
        except DecodeError as error:
            raise BadRecord("invalid_proto", str(error)) from None

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        fields, texts, encoded = self.fields(index), {}, None
        if image:
            values = fields[self._image_field].bytes_list.value
            if not values:
                raise BadRecord("no_image", f"feature {self._image_field!r} is empty")
            encoded = values[0]
        if captions:
            for field, language in self._caption_fields.items():
                for value in fields[field].bytes_list.value:
                    _add(texts, language, decode_caption(value))
        key = fields["key"].bytes_list.value if "key" in fields else ()
        return Record(key[0].decode("utf-8", "replace") if key else self._key(index), encoded, _frozen(texts))


def _example_fields(names, path: str) -> tuple[str, dict[str, str]]:
    """(image field, {caption field: language}) among img2dataset's columns. Raises ValueError without an image."""
    image = next((name for name in ("jpg", "png", "webp", "jpeg", "image") if name in names), None)
    if image is None:
        raise ValueError(f"{path}: no image column (jpg, png, webp, image) among {sorted(names)}")
    return image, {name: language_of(name) for name in sorted(names) if language_of(name)}


def open_tfrecord(path: str, split: str) -> ExampleSource:
    """TFRecord files as img2dataset writes them: key, jpg|png|webp, txt or caption, and the metadata's columns."""
    paths = find_files(path, split, ".tfrecord")
    indexes = [records.index_tfrecord(file) for file in paths]
    source = ExampleSource(paths, indexes, "", {})
    for index in range(min(len(source), 16)):
        try:
            names = list(source.fields(index))
        except BadRecord:
            continue
        source._image_field, source._caption_fields = _example_fields(names, paths[0])
        return source
    raise ValueError(f"{paths[0]}: the first records are no tf.train.Example protos")


def _tfds_fields(features, image_field: str, caption_field: str, name: str) -> tuple[str, dict[str, str]]:
    """(image field, {caption field: language}) of a tfds dataset, given or detected by type and name."""
    import tensorflow_datasets as tfds

    flat = {}

    def walk(feature, path):
        if isinstance(feature, tfds.features.FeaturesDict):
            for key, value in feature.items():
                walk(value, f"{path}/{key}" if path else key)
        elif isinstance(feature, tfds.features.Sequence):
            walk(feature.feature, path)
        else:
            flat[path] = feature

    walk(features, "")
    images = [path for path, feature in flat.items() if isinstance(feature, tfds.features.Image)]
    texts = [path for path, feature in flat.items() if isinstance(feature, tfds.features.Text)]
    if image_field and image_field not in images:
        raise ValueError(
            f"tfds {name} has no image field {image_field!r}" + did_you_mean(image_field, images)
        )
    if caption_field and caption_field not in texts:
        raise ValueError(
            f"tfds {name} has no text field {caption_field!r}" + did_you_mean(caption_field, texts)
        )
    if not image_field and len(images) != 1:
        raise ValueError(f"tfds {name}: give data.image_field, one of its image fields {images}")
    captions = {path: language_of(path) for path in texts if language_of(path)}
    if caption_field:
        captions = {caption_field: language_of(caption_field) or "en"}
    if not captions:
        raise ValueError(f"tfds {name}: give data.caption_field, one of its text fields {texts}")
    return image_field or images[0], captions


def _open_builder(builder, split: str, image_field: str, caption_field: str, name: str) -> ExampleSource:
    """The records of one split of a prepared tfds builder whose files are TFRecords."""
    info = builder.info
    base = re.split(r"[\[+]", split)[0]
    if base not in info.splits:
        raise ValueError(f"{name} has no split {split!r}" + did_you_mean(base, info.splits))
    if info.file_format.value != "tfrecord":
        raise ValueError(
            f"{name} in {builder.data_dir} is stored as {info.file_format.value}; prepare it as TFRecord: "
            "`tfds build --file_format=tfrecord`"
        )
    paths, indexes = [], []
    for part in info.splits[split].file_instructions:
        index = records.index_tfrecord(part.filename)
        if len(index.rows) != part.examples_in_shard:
            raise ValueError(
                f"{part.filename} holds {len(index.rows)} records, its manifest says {part.examples_in_shard} "
                f"({index.refused or 'cut between two records'}): delete {builder.data_dir} and prepare it again"
            )
        rows = index.rows[part.skip : part.skip + part.take if part.take >= 0 else None]
        paths.append(part.filename)
        indexes.append(records.Index(rows, index.refused))
    image, captions = _tfds_fields(info.features, image_field, caption_field, name)
    return ExampleSource(paths, indexes, image, captions)


def _prepare(make_builder, data_dir: str, name: str):
    """Prepare a tfds dataset once, whatever number of processes start together. Returns the builder."""
    with locked(os.path.join(data_dir, f".{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.lock")):
        builder = make_builder()
        if not builder.is_prepared():
            logging.info("preparing %s in %s (once)", name, builder.data_dir)
            builder.download_and_prepare(file_format="tfrecord")
        return builder


def open_scenes(path: str, split: str, data_dir: str = "") -> ExampleSource:
    """Our own scenes: `path` is a config of the tfds builder, such as 'quickstart_64'; drawn into data_dir at first use."""
    from dalle2_jax.data import scenes_builder

    configs = {config.name: config for config in scenes_builder.Scenes.BUILDER_CONFIGS}
    if path not in configs:
        raise ValueError(f"scenes have no config {path!r}" + did_you_mean(path, configs))
    data_dir = os.path.expanduser(data_dir or os.path.join(cache_dir(), "tfds"))

    def make_builder():
        return scenes_builder.Scenes(config=path, data_dir=data_dir, file_format="tfrecord")

    return _open_builder(
        _prepare(make_builder, data_dir, f"scenes-{path}"), split, "image", "", f"scenes/{path}"
    )


def open_tfds(
    path: str, split: str, data_dir: str = "", image_field: str = "", caption_field: str = ""
) -> ExampleSource:
    """Any tfds dataset with an image and a caption, e.g. path='coco_captions'; prepared as TFRecord where it is not yet.

    Args:
        path: name, name/config or name:version.
        split: 'train', 'validation', or a slice such as 'train[:10%]'.
        data_dir: the tfds folder; '' for tfds's own default.
        image_field: which image feature; '' where there is only one.
        caption_field: which text feature, 'captions/text' for a sequence; '' finds those named caption,
        text, caption_zh.
    """
    import tensorflow_datasets as tfds

    folder = os.path.expanduser(data_dir) or str(tfds.core.constants.DATA_DIR)

    def make_builder():
        return tfds.builder(path, data_dir=folder)

    try:
        builder = _prepare(make_builder, folder, path)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise ValueError(f"tfds knows no dataset {path!r}: {error}") from None
    return _open_builder(builder, split, image_field, caption_field, path)


def _embedding_shards(folder: str) -> list[np.ndarray]:
    """The arrays of a folder of .npy files, in numeric order, mapped and never unpickled. Raises ValueError."""
    names = [name for name in os.listdir(folder) if name.endswith(".npy")] if os.path.isdir(folder) else []
    names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    shards = []
    for name in names:
        try:
            shard = np.load(os.path.join(folder, name), mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{os.path.join(folder, name)} is no plain array of numbers: {error}") from None
        if shard.ndim != 2 or shard.dtype.kind != "f":
            raise ValueError(
                f"{os.path.join(folder, name)}: expected floats [N, E], found {shard.dtype} {shard.shape}"
            )
        if shards and shard.shape[1] != shards[0].shape[1]:
            raise ValueError(
                f"{folder}: {name} has {shard.shape[1]} columns, {names[0]} has {shards[0].shape[1]}"
            )
        shards.append(shard)
    return shards


class Embeddings:
    """Rows of img_emb/*.npy and text_emb/*.npy as one table: `row(i)` -> {'image_embed': [E], 'text_embed': [E]}."""

    def __init__(self, path: str):
        path = os.path.expanduser(os.fspath(path))
        if not os.path.isdir(path):
            parent = os.path.dirname(os.path.abspath(path))
            listing = os.listdir(parent) if os.path.isdir(parent) else []
            raise ValueError(f"{path} does not exist" + did_you_mean(os.path.basename(path), listing))
        folders = {"image_embed": "img_emb", "text_embed": "text_emb"}
        self._shards = {
            name: _embedding_shards(os.path.join(path, folder)) for name, folder in folders.items()
        }
        self._shards = {name: shards for name, shards in self._shards.items() if shards}
        if not self._shards:
            raise ValueError(
                f"{path} holds neither img_emb/*.npy nor text_emb/*.npy"
                + did_you_mean("img_emb", os.listdir(path))
            )
        counts = {name: [len(shard) for shard in shards] for name, shards in self._shards.items()}
        if len({tuple(count) for count in counts.values()}) > 1:
            raise ValueError(f"{path}: the shards of img_emb and text_emb differ in rows: {counts}")
        self._first = np.concatenate([[0], np.cumsum(next(iter(counts.values())))])
        self.dims = {name: shards[0].shape[1] for name, shards in self._shards.items()}
        self.entries = [
            (f"{folders[name]}/{i}", shard.nbytes, len(shard))
            for name, shards in self._shards.items()
            for i, shard in enumerate(shards)
        ]

    def __len__(self):
        return int(self._first[-1])

    def row(self, index: int) -> dict[str, np.ndarray]:
        """The embeddings of one record, float32. Raises BadRecord where one is not finite."""
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        found = {}
        for name, shards in self._shards.items():
            found[name] = np.asarray(shards[shard][index - self._first[shard]], np.float32)
            if not np.isfinite(found[name]).all():
                raise BadRecord("embedding_not_finite", name)
        return found


class EmbeddingSource:
    """Precomputed CLIP embeddings with their captions, as clip-retrieval writes them; there are no images."""

    has_images = False

    def __init__(self, path: str):
        self._table = Embeddings(path)
        self._captions = _metadata_captions(os.path.join(os.path.expanduser(path), "metadata"))
        counts = {language: len(texts) for language, texts in self._captions.items()}
        if any(count != len(self._table) for count in counts.values()):
            raise ValueError(f"{path}: {len(self._table)} embeddings but captions {counts} in metadata")
        self.refused, self.embed_dims = {}, self._table.dims
        self.fingerprint = records.fingerprint(self._table.entries)

    def __len__(self):
        return len(self._table)

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        if image:
            raise ValueError("source 'embeddings' holds no images")
        texts: dict[str, list[str]] = {}
        if captions:
            for language, column in self._captions.items():
                _add(texts, language, column[index] or "")
        return Record(f"row:{index}", None, _frozen(texts), self._table.row(index))


def _metadata_captions(folder: str) -> dict[str, list]:
    """{language: captions in order} from metadata_N.parquet or .jsonl; empty without metadata."""
    names = (
        [name for name in os.listdir(folder) if name.endswith((".parquet", ".jsonl"))]
        if os.path.isdir(folder)
        else []
    )
    names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    captions: dict[str, list] = {}
    for name in names:
        path = os.path.join(folder, name)
        if name.endswith(".parquet"):
            import pyarrow.parquet

            wanted = [field for field in pyarrow.parquet.read_schema(path).names if language_of(field)]
            table = pyarrow.parquet.read_table(path, columns=wanted)
            columns = {field: table.column(field).to_pylist() for field in wanted}
        else:
            with open(path, encoding="utf-8") as file:
                rows = [json.loads(line) for line in file]
            wanted = [field for field in (rows[0] if rows else {}) if language_of(field)]
            columns = {field: [row.get(field) for row in rows] for field in wanted}
        for field, values in columns.items():
            captions.setdefault(language_of(field), []).extend(values)
    return captions


class Paired:
    """Records of a source with the rows of an embedding folder beside them, in the same order."""

    def __init__(self, source, path: str):
        self._source, self._table = source, Embeddings(path)
        if len(source) != len(self._table):
            raise ValueError(
                f"{path} holds {len(self._table)} embeddings, the dataset {len(source)} records: embed this dataset again"
            )
        self.refused, self.has_images, self.embed_dims = source.refused, source.has_images, self._table.dims
        self.fingerprint = records.fingerprint([(source.fingerprint, 0, len(source)), *self._table.entries])

    def __len__(self):
        return len(self._source)

    def read(self, index: int, image: bool = True, captions: bool = True) -> Record:
        record = self._source.read(index, image, captions)
        return Record(record.key, record.image, record.captions, self._table.row(index))


def open_source(
    source: str,
    path: str,
    split: str,
    *,
    data_dir: str = "",
    image_field: str = "",
    caption_field: str = "",
    embeddings: str = "",
) -> records.RecordSource:
    """Open a dataset as random-access records.

    Args:
        source: 'scenes' | 'tfds' | 'tar' | 'tfrecord' | 'embeddings'.
        path: config of scenes, name of a tfds dataset, or folder, file or glob of shards.
        split: which part; for folders see `find_files`, for embeddings FOLDER/SPLIT where that exists.
        data_dir: where 'scenes' and 'tfds' prepare their files.
        image_field, caption_field: of 'tfds', where they cannot be detected.
        embeddings: a folder of embeddings whose rows match the records, to be read beside them.

    Raises:
        ValueError: no such source, path or split; the message names what exists.
    """
    if source not in SOURCES:
        raise ValueError(f"data.source {source!r} is unknown" + did_you_mean(source, SOURCES))
    if source == "scenes":
        opened = open_scenes(path, split, data_dir)
    elif source == "tfds":
        opened = open_tfds(path, split, data_dir, image_field, caption_field)
    elif source == "tar":
        opened = open_tar(path, split)
    elif source == "tfrecord":
        opened = open_tfrecord(path, split)
    else:
        folder = os.path.join(os.path.expanduser(path), split)
        opened = EmbeddingSource(folder if split and os.path.isdir(folder) else path)
    return Paired(opened, embeddings) if embeddings else opened
