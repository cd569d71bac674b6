"""Datasets in the files of tensorflow-datasets: our scenes, and any with an image, a caption or a label.

A prepared folder, NAME/CONFIG/VERSION, has TFRecord files, `dataset_info.json` (the splits, and the number of
records of each file) and `features.json` (the types of the fields). It is read by `records`, without
tensorflow-datasets, which only prepares missing datasets.
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator

from absl import logging

from dalle2_jax.data import records, scenes_builder
from dalle2_jax.data.find import did_you_mean
from dalle2_jax.data.shards import ExampleSource, language_of
from dalle2_jax.runtime import files

_NAME = re.compile(r"(?P<name>[A-Za-z]\w*)(?:/(?P<config>[\w+.-]+))?(?::(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_SPLIT = re.compile(r"(?P<split>[\w-]+)(?:\[(?P<first>[^:\]]*)(?P<colon>:?)(?P<last>[^:\]]*)\])?")
_BOUND = re.compile(r"(?P<value>-?\d+(?:\.\d+)?)(?P<unit>%|shard)?")
_SHARD_NAME = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@contextlib.contextmanager
def _locked(data_dir: str, name: str) -> Iterator[None]:
    """Hold an exclusive lock on a name in `data_dir`, which ends with the process."""
    os.makedirs(data_dir, exist_ok=True)
    path = os.path.join(data_dir, f".{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.lock")
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.info("waiting for another process to finish with %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_prepared(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "dataset_info.json"))


def _read_json(folder: str, name: str) -> dict:
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete {folder} and prepare it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object: delete {folder} and prepare it again")
    return content


def _kind(feature: dict) -> str:
    """The name of a feature's class, such as 'Image'."""
    return (feature.get("pythonClassName") or feature.get("type") or "").rpartition(".")[2]


def _flat_features(feature: dict, path: str = "") -> dict[str, str]:
    """{path of a field: name of its class} of `features.json`."""
    kind = _kind(feature)
    old = feature.get("content") or {}  # as tensorflow-datasets wrote it before version 4.5
    if "featuresDict" in feature or (kind == "FeaturesDict" and old):
        flat: dict[str, str] = {}
        for key, value in feature.get("featuresDict", {}).get("features", old).items():
            flat |= _flat_features(value, f"{path}/{key}" if path else key)
        return flat
    inner = feature.get("sequence", old).get("feature") if kind == "Sequence" else None
    return _flat_features(inner, path) if inner else {path: kind}


def _fields(features: dict, image_field: str, caption_field: str, name: str) -> tuple[str, dict[str, str]]:
    """(image field, {caption field: language}) by the settings, else by type and name in `features.json`."""
    flat = _flat_features(features)
    images = [path for path, kind in flat.items() if kind in ("Image", "LabeledImage")]
    texts = [path for path, kind in flat.items() if kind == "Text"]
    for kind, field, found in (("image", image_field, images), ("text", caption_field, texts)):
        if field and field not in found:
            raise ValueError(f"tfds {name} has no {kind} field {field!r}" + did_you_mean(field, found))
    if not image_field and len(images) != 1:
        raise ValueError(f"tfds {name}: give data.image_field, one of its image fields {images}")
    captions = {path: language for path in texts if (language := language_of(path))}
    if caption_field:
        captions = {caption_field: language_of(caption_field) or "en"}
    return image_field or images[0], captions


def _labels(features: dict, folder: str, label_field: str, name: str) -> tuple[str, tuple[str, ...]]:
    """(label field, names of its classes) by the setting, else 'label', or the only one; '': none.

    Classes without names have their numbers.
    """
    own = features.get("featuresDict", {}).get("features") or features.get("content") or {}
    found = {field: feature for field, feature in own.items() if _kind(feature) == "ClassLabel"}
    if label_field and label_field not in found:
        raise ValueError(f"tfds {name} has no label field {label_field!r}" + did_you_mean(label_field, found))
    field = label_field or ("label" if "label" in found else next(iter(found), "") * (len(found) == 1))
    path = os.path.join(folder, field.replace("/", ".") + ".labels.txt")
    if field and os.path.isfile(path):
        return field, tuple(filter(None, map(str.strip, files.read_text(path).splitlines())))
    count = int(found[field].get("classLabel", {}).get("numClasses", 0)) if field else 0
    return field, tuple(map(str, range(count)))


def _bound(text: str, unit: str, lengths: list[int], default: int, split: str) -> int:
    """The first or last record of a slice from '10', '-5', '90%', '2shard' or ''."""
    if not text:
        return default
    match, count = _BOUND.fullmatch(text), sum(lengths)
    if not match or ("." in match["value"] and unit != "%"):
        raise ValueError(f"the slice of split {split!r} is not understood: give for example train[:90%]")
    if unit == "%":
        bound = round(float(match["value"]) * count / 100)
    elif unit == "shard":
        bound = sum(lengths[: int(match["value"])])
    else:
        bound = int(match["value"])
    if abs(bound) > count:
        raise ValueError(f"the slice of split {split!r} asks for more than its {count} records")
    return bound + count if bound < 0 else bound


def _slices(split: str, shards: dict[str, list[int]], name: str) -> list[tuple[str, int, int]]:
    """(split, first record, last record + 1) of 'train', 'train[:90%]+validation[10:20]' or 'all'.

    shards: {split: the numbers of records of its files}.
    """
    found = []
    for part in list(shards) if split == "all" else re.split(r"\s*\+\s*", split):
        match = _SPLIT.fullmatch(part)
        base = match["split"] if match else part
        if not match or base not in shards:
            raise ValueError(f"{name} has no split {part!r}" + did_you_mean(base, shards))
        lengths = shards[base]
        first, last = 0, sum(lengths)
        if match["colon"]:
            units = [
                unit for end in ("first", "last") for unit in ("%", "shard") if match[end].endswith(unit)
            ]
            unit = units[0] if units else ""  # both ends have one unit
            first = _bound(match["first"], unit, lengths, first, part)
            last = _bound(match["last"], unit, lengths, last, part)
        elif match["first"] is not None:
            if not re.fullmatch(r"\d+shard", match["first"]):
                raise ValueError(f"a slice of split {part!r} has two ends: give for example train[10:20]")
            number = int(match["first"].removesuffix("shard"))
            first, last = sum(lengths[:number]), sum(lengths[: number + 1])
        found.append((base, first, last))
    return found


def _shard_path(folder: str, info: dict, split: dict, shard: int) -> str:
    """The path of file number `shard` of a split."""
    number, count = f"{shard:05d}", f"{len(split['shardLengths']):05d}"
    name = split.get("filepathTemplate") or _SHARD_NAME
    for variable, value in {
        "DATASET": info["name"],
        "SPLIT": split["name"],
        "FILEFORMAT": "tfrecord",
        "SHARD_INDEX": number,
        "NUM_SHARDS": count,
        "SHARD_X_OF_Y": f"{number}-of-{count}",
    }.items():
        name = name.replace(f"{{{variable}}}", value)
    return os.path.join(folder, os.path.basename(name))


def _open_folder(
    folder: str, split: str, image_field: str, caption_field: str, name: str, label_field: str = ""
) -> ExampleSource:
    """The records of one split of a prepared folder with TFRecord files."""
    info = _read_json(folder, "dataset_info.json")
    file_format = info.get("fileFormat", "tfrecord")
    if file_format != "tfrecord":
        raise ValueError(
            f"{name} in {folder} is stored as {file_format}; prepare it as TFRecord: "
            "`tfds build --file_format=tfrecord`"
        )
    splits = {entry["name"]: entry for entry in info.get("splits", ())}
    shards = {key: [int(length) for length in entry["shardLengths"]] for key, entry in splits.items()}
    paths, indexes = [], []
    for base, first, last in _slices(split, shards, name):
        begin = 0
        for shard, length in enumerate(shards[base]):
            skip, take = max(first - begin, 0), min(last - begin, length)
            begin += length
            if skip >= take:
                continue
            path = _shard_path(folder, info, splits[base], shard)
            index = records.index_tfrecord(path)
            if len(index.rows) != length:
                raise ValueError(
                    f"{path} holds {len(index.rows)} records where its manifest has {length} "
                    f"({index.damage or index.refused or 'cut between two records'}): delete {folder} and "
                    "prepare it again"
                )
            paths.append(path)
            indexes.append(records.Index(index.rows[skip:take], index.refused, examples=index.examples))
    if not paths:
        raise ValueError(f"split {split!r} of {name} holds no record")
    features = _read_json(folder, "features.json")
    image, captions = _fields(features, image_field, caption_field, name)
    label, classes = _labels(features, folder, label_field, name)
    return ExampleSource(paths, indexes, image, captions, label, classes)


def _prepare_scenes(config: str, data_dir: str) -> str:
    """Draw scenes once, also if several processes start at the same time. Returns their folder."""
    above = os.path.join(data_dir, "scenes", config)
    folder = os.path.join(above, scenes_builder.VERSION)
    if _is_prepared(folder):
        return folder
    with _locked(data_dir, f"scenes-{config}"):
        if _is_prepared(folder):  # by another process, meanwhile
            return folder
        logging.info("preparing scenes/%s in %s (once)", config, folder)
        partial = os.path.join(above, f"incomplete.{secrets.token_hex(4)}_{scenes_builder.VERSION}")
        try:
            os.makedirs(partial)
            scenes_builder.write(config, partial)
            os.rename(partial, folder)
        except OSError:
            if not _is_prepared(folder):  # by another machine, which does not share the lock
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def open_scenes(path: str, split: str, data_dir: str = "", caption_field: str = "") -> ExampleSource:
    """Our scenes, drawn into `data_dir` at first use; path: a config, such as 'quickstart_64'.

    caption_field: 'caption' or 'caption_zh' reads the plain wording alone; '': every wording.
    """
    if path not in scenes_builder.CONFIGS:
        raise ValueError(f"scenes have no config {path!r}" + did_you_mean(path, scenes_builder.CONFIGS))
    data_dir = data_dir or os.path.join(records.cache_dir(), "tfds")
    return _open_folder(_prepare_scenes(path, data_dir), split, "image", caption_field, f"scenes/{path}")


def _find_prepared(path: str, data_dir: str) -> str | None:
    """The prepared folder of `path` of `open_tfds`, the newest version if it names none; None: not
    prepared."""
    match = _NAME.fullmatch(path)
    if not match:
        return None
    folder = os.path.join(data_dir, match["name"])
    config = match["config"]
    if config is None and os.path.isfile(os.path.join(folder, ".config", "metadata.json")):
        config = _read_json(os.path.join(folder, ".config"), "metadata.json").get("defaultConfigName")
    folder = os.path.join(folder, config or "")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    versions = [name for name in names if _VERSION.fullmatch(name) and match["version"] in (None, name)]
    versions = [name for name in versions if _is_prepared(os.path.join(folder, name))]
    newest = max(versions, key=lambda name: [int(number) for number in name.split(".")], default=None)
    return newest and os.path.join(folder, newest)


def _prepare_tfds(tfds, path: str, data_dir: str) -> str:
    """Prepare a tfds dataset once, also if several processes start at the same time. Returns its folder."""

    def make_builder():
        try:
            return tfds.builder(path, data_dir=data_dir)
        except tfds.core.registered.DatasetNotFoundError as error:
            raise ValueError(f"tfds knows no dataset {path!r}: {error}") from None

    builder = make_builder()
    if not builder.is_prepared():
        with _locked(data_dir, path):
            builder = make_builder()  # another process may have prepared it meanwhile
            if not builder.is_prepared():
                logging.info("preparing %s in %s (once)", path, builder.data_dir)
                tfds.disable_progress_bar()  # dozens of lines in a log
                builder.download_and_prepare(file_format="tfrecord")
    return os.fspath(builder.data_dir)


def open_tfds(
    path: str,
    split: str,
    data_dir: str = "",
    image_field: str = "",
    caption_field: str = "",
    label_field: str = "",
) -> ExampleSource:
    """A tfds dataset with an image, such as 'coco_captions' or 'cifar10'; prepared if necessary.

    Args:
        path: name, name/config or name:version.
        split: 'train', 'validation', or a slice such as 'train[:10%]'.
        data_dir: the tfds folder; '': tfds's default.
        image_field: the image feature; '': the only one.
        caption_field: the text feature, 'captions/text' for a sequence; '': those named caption, text,
            caption_zh.
        label_field: the ClassLabel feature; '': 'label', or the only one.

    Raises:
        ValueError: also if it is not prepared and TensorFlow cannot be imported.
    """
    data_dir = data_dir or files.expand(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    try:
        import tensorflow  # noqa: F401  (tensorflow_datasets can be imported without it, and prepares nothing)
        import tensorflow_datasets as tfds
    except Exception as error:  # not installed, or incompatible with another package
        folder = _find_prepared(path, data_dir)
        if folder is None:
            raise ValueError(
                f"tfds {path} is not prepared in {data_dir}, and what prepares it cannot be imported "
                f"({error}): install tensorflow and tensorflow-datasets, or run `tfds build {path} "
                f"--file_format=tfrecord` where they are, copy the folder, and name it by data.data_dir"
            ) from None
    else:
        folder = _prepare_tfds(tfds, path, data_dir)
    return _open_folder(folder, split, image_field, caption_field, path, label_field)
