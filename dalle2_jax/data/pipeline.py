"""Datasets of batches: records read, checked, cut to size and tokenized.

`stream` has the order of records. The augmentation of a record is a function of (seed, epoch, record). A bad
record is counted (`bad_records`) and replaced by the next usable one, the same on every run, and so is one
that `data.leave_out` names: all other records keep their places.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from absl import logging

from dalle2_jax.data import captions as captions_module
from dalle2_jax.data import classes as classes_module
from dalle2_jax.data import remote, sources, stream, text_states, transforms
from dalle2_jax.data.bad_records import BadRecords, TooManyBadRecords
from dalle2_jax.data.order import Order
from dalle2_jax.data.records import BadRecord, Record, RecordSource
from dalle2_jax.data.settings import DataSettings
from dalle2_jax.data.transforms import Views
from dalle2_jax.data.words import WordCounter, Words

# Records a call: enough to amortize it, few enough to split a batch over the workers and to bound memory.
_CHUNK, _CHUNK_PIXELS = 32, 1 << 21


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset whose batches are a pure function of the step; made by `make_dataset`."""

    settings: DataSettings
    source: RecordSource
    _bad: BadRecords
    _words: WordCounter

    @property
    def num_records(self) -> int:
        """The number of records of an epoch."""
        return len(self.source)

    @property
    def fingerprint(self) -> str:
        """sha256 of the names, sizes and numbers of records of the dataset's files."""
        return self.source.fingerprint

    @property
    def files(self) -> list[tuple[str, int, int]]:
        """(name, size in bytes, number of records) of each file."""
        return self.source.files

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes of the field label."""
        return tuple(self.settings.classes)

    @property
    def encoder_sha256(self) -> dict[str, str]:
        """Name -> sha256 of the parameters of the embeddings' encoder, such as 'clip'; {}: unknown."""
        return dict(self.source.encoder_sha256)

    def bad_records(self) -> dict[str, int]:
        """{reason: count} of losses so far, in indexing and in reading."""
        return self._bad.counts()

    def words(self, before: Words | None = None) -> Words | None:
        """The words of the captions read so far, with those `before`; None: the dataset reads no captions."""
        return self._words.so_far(before) if self.settings.tokenizes else None

    def batches(
        self,
        batch_size: int,
        start_step: int = 0,
        parts: Sequence[int] = (0,),
        num_parts: int = 1,
        repeat: bool = True,
        shuffle: bool = True,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Iterate over this host's rows of the batches from `start_step` on.

        Args:
            batch_size: of all hosts; a multiple of num_parts.
            start_step: the first batch, as in an uninterrupted run.
            parts, num_parts: this host's parts of each batch, ascending, of num_parts equal ones.
            repeat: over epochs without end, with batches across their borders; False: one pass, whose last
                batch has the remaining rows (on the last hosts perhaps none).
            shuffle: False: the records in their order.

        Yields:
            The dataset's fields and `index` int64 [b], the record numbers; pictures are uint8, but a blurred
            or degraded `low_res` float32 in [-1, 1].

        Raises:
            ValueError: batch_size is no multiple of num_parts. TooManyBadRecords: above the budget.
        """
        if batch_size < 1 or batch_size % num_parts:
            raise ValueError(f"batch_size {batch_size} must be a positive multiple of its {num_parts} parts")
        settings = self.settings
        order = Order(
            self.num_records,
            settings.seed,
            batch_size,
            tuple(parts),
            num_parts,
            shuffle,
            settings.group,
            self.source.mixture,
        )
        side = max(self._views.image_size or 1, *self._views.image_sizes.values(), 1)
        return stream.batches(
            self._load,
            self._shapes,
            order,
            start_step=start_step,
            repeat=repeat,
            chunk=max(1, min(_CHUNK, _CHUNK_PIXELS // side**2)),
            num_workers=max(1, settings.num_workers),
        )

    @functools.cached_property
    def _shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return self.settings.shapes(self.source)

    @functools.cached_property
    def _pool(self) -> futures.ThreadPoolExecutor:
        """Threads that wait for an object store."""
        return futures.ThreadPoolExecutor(remote.THREADS * max(1, self.settings.num_workers))

    @functools.cached_property
    def _views(self) -> Views:
        return self.settings.views

    def _load(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """The stacked fields of some records, with bad ones replaced."""
        draws = transforms.uniforms(self.settings.seed, epochs, indices)
        load = self._pool.map if self.source.remote else map
        rows = list(load(self._load_good, indices.tolist(), epochs.tolist(), draws))
        made = {"index": np.array([row["index"] for row in rows], np.int64)}
        if self.settings.tokenizes:
            captions = [row["caption"] for row in rows]
            self._words.add(captions)
            made["tokens"], made["token_mask"] = self._tokens(captions, epochs, made["index"])
        for name, (dtype, shape) in self._shapes.items():
            if name not in made:
                stack = made[name] = np.empty((len(rows), *shape), dtype)
                for slot, row in enumerate(rows):
                    stack[slot] = row[name]
        return made

    def _tokens(self, captions: list[str], epochs: np.ndarray, indices: np.ndarray):
        """(tokens, their mask) of the captions of records."""
        settings = self.settings
        if not settings.bpe_dropout:
            return settings.tokenizer(captions)
        seeds = [(settings.seed, int(epoch), int(i)) for epoch, i in zip(epochs, indices, strict=True)]
        return settings.tokenizer.with_dropout(captions, settings.bpe_dropout, seeds)

    def _load_good(self, index: int, epoch: int, draws: np.ndarray) -> dict:
        """The parts of record `index`, or of the first usable one after it."""
        first, count = self.source.span(index)
        for offset in range(count):
            chosen = first + (index - first + offset) % count
            if chosen in self.source.left_out or self._bad.reason(chosen):
                continue
            if offset:
                draws = transforms.uniforms(self.settings.seed, epoch, chosen)
            record = None
            self._bad.count_read()
            try:
                record = self._read(chosen)
                return self._parts(record, draws) | {"index": chosen}
            except BadRecord as error:
                if record and record.source:
                    error = BadRecord(f"{record.source}/{error.reason}", error.detail)
                self._bad.add(chosen, record.key if record else self.key(chosen), error)
        raise TooManyBadRecords(f"none of the {count} records can be used: {self.bad_records()}")

    @functools.cached_property
    def _needs_caption(self) -> bool:
        return _reads_captions(self.settings, self.source)

    @functools.cached_property
    def _class_of_label(self) -> np.ndarray | None:
        return classes_module.of_labels(self.source, self.settings.classes)

    def key(self, index: int) -> str:
        """The name of a record, or its number where it cannot be read."""
        try:
            return self.source.read(index, image=False, captions=False).key
        except BadRecord:
            return f"record {index}"

    def _read(self, index: int) -> Record:
        captions = self._needs_caption or self._views.flip
        return self.source.read(index, bool(self.settings.pictures), captions)

    def record_fields(self, index: int) -> tuple[str, str, dict[str, np.ndarray]]:
        """(key, caption, fields) of record `index`, centred and with its first caption. Raises BadRecord."""
        record = self._read(index)
        parts = self._parts(record, np.zeros(8))
        caption = parts.pop("caption", None)
        if caption is None:  # the fields need none
            texts = self.source.read(index, image=False).captions
            caption = captions_module.cut(next(iter(texts.get(self.settings.language) or ("",))))
        if self.settings.has("tokens"):
            tokens, mask = self.settings.tokenizer([caption])
            parts |= {"tokens": tokens[0], "token_mask": mask[0]}
        return record.key, caption, {name: parts[name] for name in self.settings.fields}

    def _parts(self, record: Record, draws: np.ndarray) -> dict[str, Any]:
        """The arrays and the caption of one record. Raises BadRecord."""
        parts: dict[str, Any] = dict(record.embeds)
        if self.settings.has("text_states"):
            parts |= text_states.padded(parts["text_states"], self.settings.tokenizer.context_length)
        if self._needs_caption:
            parts["caption"] = self._caption(record, draws)
        captions = record.captions
        if self.settings.has("label"):
            label = parts["label"] = self._label(record, parts.get("caption", ""))
            if self._class_of_label is not None and label >= 0:
                captions = captions | {"class": (self.classes[label].replace("_", " "),)}
        if record.image is not None:
            may_flip = self._views.flip and not transforms.names_sides(captions)
            picture = transforms.decode(record.image, enough=self._views.enough)
            parts |= self._views.make(picture, draws, may_flip)
        return parts

    def _caption(self, record: Record, draws: np.ndarray) -> str:
        def note(reason: str) -> None:
            self._bad.note(f"{record.source}/{reason}" if record.source else reason)

        return captions_module.choose(record, self.settings.language, draws, note)

    def _label(self, record: Record, caption: str) -> int:
        """The class of a record, by its label or the caption; -1 for none. Raises BadRecord."""
        if self._class_of_label is None:
            return label_of(caption, self.settings.classes)
        label = record.label
        if label is None or not -1 <= label < len(self._class_of_label):
            raise BadRecord("no_label", "none is stored" if label is None else f"there is no class {label}")
        return int(self._class_of_label[label]) if label >= 0 else -1

    def labels(self, indices) -> list[str]:
        """The labels of records in a grid: first caption in the dataset's language, else in another, else the
        class, else key."""
        labels = []
        for index in map(int, indices):
            try:
                record = self.source.read(index, image=False)
                captions = captions_module.in_any_language(record, self.settings.language)
                if not captions and self.settings.has("label") and (label := self._label(record, "")) >= 0:
                    captions = self.classes[label : label + 1]
                labels.append(captions_module.cut(captions[0]) if captions else record.key)
            except BadRecord:
                labels.append(self.key(index))
        return labels

    def examples(self, indices) -> dict:
        """Records for evaluation: the centre crop, never mirrored, with the first caption.

        Returns:
            captions, keys: lists of str; index: int64 [n], the record numbers without bad records; with an
            image_size, image: uint8 [n, image_size, image_size, 3].
        """
        plain = Views(image_size=self.settings.image_size if self.source.has_images else None)
        images, captions, keys, used = [], [], [], []
        for index in map(int, indices):
            try:
                record = self.source.read(index, image=bool(plain.image_size))
                caption = self._caption(record, np.zeros(8))
                if record.image is not None:
                    images.append(plain.make(transforms.decode(record.image), np.zeros(8))["image"])
            except BadRecord as error:
                logging.warning("example %d is left out: %s", index, error)
                continue
            captions.append(caption)
            keys.append(record.key)
            used.append(index)
        made = dict(captions=captions, keys=keys, index=np.array(used, np.int64))
        return made | ({"image": np.stack(images)} if images else {})


def label_of(caption: str, classes: Sequence[str]) -> int:
    """The number of the only class whose name is in a caption as whole words, -1 for none or several.

    Case is ignored. A name within another one that is also found, as 'ring' in 'red ring', does not count.
    """
    if caption in classes:  # names may differ in case alone
        return list(classes).index(caption)
    # The fast test by `in` saves a regular expression for each of perhaps a thousand names.
    folded = caption.casefold()
    found = [
        name
        for name in classes
        if name.casefold() in folded and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", caption, re.IGNORECASE)
    ]
    found = [name for name in found if not any(name != other and name in other for other in found)]
    return list(classes).index(found[0]) if len(found) == 1 else -1


def iterate_captions(limit: int = 50_000, **settings) -> Iterator[str]:
    """All captions of up to `limit` records spread over the dataset, to train a tokenizer on.

    settings: of `DataSettings`, as for `make_dataset`; only the source and the language matter. Records
    without a readable caption are skipped. Raises ValueError if there are no captions.
    """
    config = DataSettings(**settings)
    opened = sources.open_source(config)
    _check_captions(opened, config)
    stride = max(1, -(-len(opened) // limit))
    for index in range(0, len(opened), stride):
        if index in opened.left_out:
            continue
        try:
            captions = opened.read(index, image=False).captions
        except BadRecord:
            continue
        languages = sorted(captions) if config.language == captions_module.ANY_LANGUAGE else [config.language]
        for language in languages:
            yield from map(captions_module.cut, captions.get(language, ()))


def _check_captions(source: RecordSource, settings: DataSettings) -> None:
    for name, one in (source.sources or {settings.path: source}).items():
        captions_module.check(one, name, settings.language)


def _reads_captions(settings: DataSettings, source: RecordSource) -> bool:
    """Whether batches need captions: as text, or because records have no label."""
    return settings.tokenizes or (settings.has("label") and not source.num_classes)


def make_dataset(**settings) -> Dataset:
    """Open a dataset.

    settings: of `DataSettings`; at least source, path, split and fields. Raises ValueError, with a remedy,
    for an unknown, missing or impossible setting, TooManyBadRecords if indexing lost more than the budget.
    """
    config = DataSettings(**settings)
    config.check()
    opened = sources.open_source(config)
    config.check_source(opened)
    if config.has("label"):
        found = classes_module.names(opened, config.classes, config.num_classes)
        config = dataclasses.replace(config, classes=found)
    if _reads_captions(config, opened):
        _check_captions(opened, config)
    bad = BadRecords(len(opened), config.max_bad_fraction, opened.refused, opened.passed, opened.examples)
    return Dataset(config, opened, bad, WordCounter(config.language))
