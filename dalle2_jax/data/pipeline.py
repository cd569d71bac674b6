"""Datasets of batches: records read, checked, cut to size and tokenized.

`stream` says which record comes when. The augmentation of a record is a function of (seed, epoch, record).
A record that cannot be used is replaced by the next usable one, the same on every run, and counted
(`budget`).
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging

from dalle2_jax.data import shards, sources, stream, transforms
from dalle2_jax.data.budget import Budget, TooManyBadRecords
from dalle2_jax.data.degradations import BSR
from dalle2_jax.data.records import BadRecord, Record, RecordSource
from dalle2_jax.data.transforms import CAPTION, LANGUAGE, Views

FIELDS = (
    "image",
    "clip_image",
    "low_res",
    "crop_yx",
    "tokens",
    "token_mask",
    "image_embed",
    "text_embed",
    "label",
)
ANY_LANGUAGE = "any"
MAX_CAPTION_BYTES = 64 << 10
_PICTURES = ("image", "clip_image", "low_res", "crop_yx")
# Records a call: enough to amortize the call, few enough to spread a batch over the workers, and to bound
# memory.
_CHUNK, _CHUNK_PIXELS = 32, 1 << 21


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset whose batches are a pure function of the step; made by `make_dataset`."""

    source: RecordSource
    fields: tuple[str, ...]
    views: Views
    image_size: int | None
    language: str
    tokenizer: object
    seed: int
    num_workers: int
    group: int
    classes: tuple[str, ...]
    _bad: Budget

    @property
    def num_records(self) -> int:
        """How many records one epoch has."""
        return len(self.source)

    @property
    def fingerprint(self) -> str:
        """sha256 that changes when a file of the dataset does (name, size or number of records)."""
        return self.source.fingerprint

    @property
    def files(self) -> list[tuple[str, int, int]]:
        """(name, size in bytes, number of records) of each file, which the fingerprint is made of."""
        return self.source.files

    @property
    def clip_sha256(self) -> str:
        """Of the parameters of the CLIP that made the embeddings it reads; '' where none is named."""
        return self.source.clip_sha256

    def bad_records(self) -> dict[str, int]:
        """{reason: count} of what was not used so far: left out while indexing, and bad while reading."""
        return self._bad.counts()

    def bad_record_list(self) -> list[dict]:
        """The first 100 bad records: index, key, reason, detail."""
        return list(self._bad.kept)

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
            batch_size: of all hosts together; a multiple of num_parts.
            start_step: the first batch; the sequence is what an uninterrupted run sees from there.
            parts, num_parts: which of so many equal parts of each batch this host reads, ascending.
            repeat: go on over epochs without end, batches across their borders; False stops after one
                pass, in which the last batch holds what is left (fewer rows, on the last hosts perhaps none).
            shuffle: False reads the records in their order.

        Yields:
            The dataset's fields and `index` int64 [b], the record numbers; pictures uint8, a `low_res`
            that is blurred or degraded float32 in [-1, 1].

        Raises:
            ValueError: batch_size is no multiple of num_parts. TooManyBadRecords: above the budget.
        """
        if batch_size < 1 or batch_size % num_parts:
            raise ValueError(f"batch_size {batch_size} must be a positive multiple of its {num_parts} parts")
        side = max(self.views.image_size or 1, self.views.clip_image_size or 1)
        return stream.batches(
            self._load,
            self._signature(),
            num_records=self.num_records,
            seed=self.seed,
            batch_size=batch_size,
            start_step=start_step,
            parts=parts,
            num_parts=num_parts,
            repeat=repeat,
            shuffle=shuffle,
            chunk=max(1, min(_CHUNK, _CHUNK_PIXELS // side**2)),
            num_workers=max(1, self.num_workers),
            group=self.group,
        )

    def _signature(self) -> dict[str, tuple[object, tuple]]:
        """{field: (dtype, shape of one record)} of what `_load` returns."""
        views = self.views
        low_res_dtype = np.float32 if views.degrades else np.uint8
        length = self.tokenizer.context_length if self.tokenizer else None
        known = {
            "image": (np.uint8, (views.crop_size or views.image_size,) * 2 + (3,)),
            "clip_image": (np.uint8, (views.clip_image_size,) * 2 + (3,)),
            "low_res": (low_res_dtype, (views.low_res_size,) * 2 + (3,)),
            "crop_yx": (np.int32, (2,)),
            "tokens": (np.int32, (length,)),
            "token_mask": (np.bool_, (length,)),
            "image_embed": (np.float32, (self.source.embed_dims.get("image_embed"),)),
            "text_embed": (np.float32, (self.source.embed_dims.get("text_embed"),)),
            "label": (np.int32, ()),
        }
        return {name: known[name] for name in self.fields} | {"index": (np.int64, ())}

    def _load(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """The fields of some records, stacked; bad records replaced."""
        draws = transforms.uniforms(self.seed, epochs, indices)
        rows = [self._load_good(int(i), int(e), d) for i, e, d in zip(indices, epochs, draws, strict=True)]
        made = {"index": np.array([row["index"] for row in rows], np.int64)}
        if "tokens" in self.fields or "token_mask" in self.fields:
            made["tokens"], made["token_mask"] = self.tokenizer([row["caption"] for row in rows])
        if "label" in self.fields:
            labels = [label_of(row["caption"], self.classes) for row in rows]
            made["label"] = np.array(labels, np.int32)
        for name, (dtype, shape) in self._signature().items():
            if name not in made:
                stack = made[name] = np.empty((len(rows), *shape), dtype)
                for slot, row in enumerate(rows):
                    stack[slot] = row[name]
        return made

    def _load_good(self, index: int, epoch: int, draws: np.ndarray) -> dict:
        """The parts of record `index`, or of the first usable one after it."""
        for offset in range(self.num_records):
            chosen = (index + offset) % self.num_records
            if self._bad.reason(chosen):
                continue
            if offset:
                draws = transforms.uniforms(self.seed, epoch, chosen)
            record = None
            self._bad.count_read()
            try:
                record = self._read(chosen)
                return self._parts(record, draws) | {"index": chosen}
            except BadRecord as error:
                self._bad.add(chosen, record.key if record else self.key(chosen), error)
        raise TooManyBadRecords(f"none of the {self.num_records} records can be used: {self.bad_records()}")

    @functools.cached_property
    def _needs_caption(self) -> bool:
        return bool({"tokens", "token_mask", "label"} & set(self.fields))

    @functools.cached_property
    def _needs_image(self) -> bool:
        return bool(set(_PICTURES) & set(self.fields))

    def key(self, index: int) -> str:
        """The name of a record, or its number where it cannot be read."""
        try:
            return self.source.read(index, image=False, captions=False).key
        except BadRecord:
            return f"record {index}"

    def _read(self, index: int) -> Record:
        return self.source.read(index, self._needs_image, captions=self._needs_caption or self.views.flip)

    def record_fields(self, index: int) -> tuple[str, str, dict[str, np.ndarray]]:
        """(key, caption, fields) of record `index` itself, centred and with its first caption.

        Raises BadRecord: nothing takes its place, as it would in a batch.
        """
        record = self._read(index)
        parts = self._parts(record, np.zeros(8))
        caption = parts.pop("caption", "")
        if "tokens" in self.fields:
            tokens, mask = self.tokenizer([caption])
            parts |= {"tokens": tokens[0], "token_mask": mask[0]}
        return record.key, caption, {name: parts[name] for name in self.fields}

    def _parts(self, record: Record, draws: np.ndarray) -> dict:
        """The arrays and the caption of one record. Raises BadRecord."""
        parts = dict(record.embeds)
        if self._needs_caption:
            parts["caption"] = self._choose_caption(record, draws)
        if record.image is not None:
            may_flip = self.views.flip and not transforms.names_sides(record.captions)
            picture = transforms.decode(record.image, enough=self.views.enough)
            parts |= self.views.make(picture, draws, may_flip)
        return parts

    def _choose_caption(self, record: Record, draws: np.ndarray) -> str:
        captions = record.captions
        if self.language == ANY_LANGUAGE:
            languages = sorted(captions)
            chosen = languages[int(draws[LANGUAGE] * len(languages))] if languages else ""
        else:
            chosen = self.language
        texts = captions.get(chosen, ())
        if not texts:
            others = f"captions in {', '.join(sorted(captions))}" if captions else "no caption"
            found = f"it has {others}{_named(record.fields)}"
            raise BadRecord("no_caption", f"language {self.language}; {found}")
        text = texts[int(draws[CAPTION] * len(texts))]
        if "\ufffd" in text:
            self._bad.note("unreadable_character")
        return _cap_caption(text, self._bad)

    def labels(self, indices) -> list[str]:
        """A text below each of some records in a grid: its first caption in the dataset's language, else one
        in another language, else its key."""
        labels = []
        for index in map(int, indices):
            try:
                record = self.source.read(index, image=False)
                captions = _captions_of(record, self.language)
                labels.append(_cap_caption(captions[0], None) if captions else record.key)
            except BadRecord:
                labels.append(self.key(index))
        return labels

    def examples(self, indices) -> dict:
        """Records as they are, for evaluation: the centre crop, never mirrored, with the first caption.

        Args:
            indices: record numbers.

        Returns:
            captions, keys: lists of str; index: int64 [n], the record numbers; where the dataset has an
            image_size, image: uint8 [n, image_size, image_size, 3]. A record that cannot be used is left
            out, so compare `index`.
        """
        plain = Views(image_size=self.image_size if self.source.has_images else None)
        images, captions, keys, used = [], [], [], []
        for index in map(int, indices):
            try:
                record = self.source.read(index, image=bool(plain.image_size))
                caption = self._choose_caption(record, np.zeros(8))
                if plain.image_size:
                    images.append(plain.make(transforms.decode(record.image), np.zeros(8))["image"])
            except BadRecord as error:
                logging.warning("example %d is left out: %s", index, error)
                continue
            captions.append(caption)
            keys.append(record.key)
            used.append(index)
        made = dict(captions=captions, keys=keys, index=np.array(used, np.int64))
        return made | ({"image": np.stack(images)} if images else {})


def _captions_of(record: Record, language: str) -> Sequence[str]:
    """Its captions in the language, in any other where there are none."""
    of_all = record.captions
    return of_all.get(language) or next((texts for _, texts in sorted(of_all.items()) if texts), ())


def label_of(caption: str, classes: Sequence[str]) -> int:
    """The number of the one class whose name a caption holds as whole words, -1 for none or several.

    Upper and lower case are alike. A name inside another that is there too, as 'ring' in 'red ring', does
    not count.
    """
    # A thousand patterns would be compiled for every caption, so only names that are there are looked at.
    folded = caption.casefold()
    found = [
        name
        for name in classes
        if name.casefold() in folded and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", caption, re.IGNORECASE)
    ]
    found = [name for name in found if not any(name != other and name in other for other in found)]
    return list(classes).index(found[0]) if len(found) == 1 else -1


_FIRST, _SPREAD = 16, 64  # records that are asked for captions
_SHOWN_FIELDS, _SHOWN_NAME = 12, 40  # names in a message, characters of each


def _named(fields: Sequence[str]) -> str:
    """'; fields: alt, url', the first few, or '' for none."""
    shown = [shards.encodable(name[:_SHOWN_NAME]) for name in fields[:_SHOWN_FIELDS]]
    return f"; fields: {', '.join(shown)}{', ...' if len(fields) > len(shown) else ''}" if shown else ""


def _check_captions(source: RecordSource, path: str, language: str) -> None:
    """Raise ValueError where the first records, and others spread over the source, have no caption in it.

    Records that cannot be read say nothing.
    """
    spread = np.linspace(0, len(source) - 1, min(len(source), _SPREAD)).astype(int).tolist()
    found, fields, read = set(), {}, 0
    for number, index in enumerate(dict.fromkeys([*range(min(len(source), _FIRST)), *spread])):
        if number >= _FIRST and (language in found or (found and language == ANY_LANGUAGE)):
            break
        try:
            record = source.read(index, image=False)
        except BadRecord:
            continue
        found |= record.captions.keys()
        fields |= dict.fromkeys(record.fields[:_SHOWN_FIELDS])
        read += 1
    if read and not found:
        mend = "rename the field that holds the captions" if fields else "put KEY.txt beside each KEY.jpg"
        raise ValueError(
            f"no captions in {path}: none of {read} records has one in KEY.txt or in a field caption, text, "
            f"txt, or caption_zh for Chinese and so on{_named(list(fields))}; {mend}"
        )
    if found and language not in (found | {ANY_LANGUAGE}):
        raise ValueError(
            f"data.language {language!r}: the first records have no such captions"
            + sources.did_you_mean(language, found | {ANY_LANGUAGE})
        )


def _cap_caption(text: str, bad: Budget | None) -> str:
    if len(text) * 4 <= MAX_CAPTION_BYTES or len(text.encode("utf-8", "ignore")) <= MAX_CAPTION_BYTES:
        return text
    if bad is not None:
        bad.note("caption_cut")
    return text.encode("utf-8", "ignore")[:MAX_CAPTION_BYTES].decode("utf-8", "ignore")


def iterate_captions(
    *,
    source: str,
    path: str,
    split: str,
    language: str = "en",
    limit: int = 50_000,
    data_dir: str = "",
    image_field: str = "",
    caption_field: str = "",
    embeddings: str = "",
    verify_sha256: bool = False,
    allow_damaged: str | Sequence[str] = "",
    max_bad_fraction: float = 1e-3,
    num_workers: int = 2,
    group: int = 1,
    classes: Sequence[str] = (),
    random_crop: bool = False,
    low_res_blur_sigma: float = 0.6,
    low_res_bsr: str = "",
) -> Iterator[str]:
    """All captions of up to `limit` records spread over the dataset: what a tokenizer is trained on.

    Takes every setting of `make_dataset` that names the data, so that one config serves both; records
    without a readable caption are passed over. Raises ValueError where there are none.
    """
    opened = sources.open_source(
        source,
        path,
        split,
        data_dir=data_dir,
        image_field=image_field,
        caption_field=caption_field,
        embeddings=embeddings,
        verify_sha256=verify_sha256,
        allow_damaged=allow_damaged,
    )
    _check_captions(opened, path, language)
    stride = max(1, -(-len(opened) // limit))
    for index in range(0, len(opened), stride):
        try:
            captions = opened.read(index, image=False).captions
        except BadRecord:
            continue
        for chosen in sorted(captions) if language == ANY_LANGUAGE else [language]:
            for text in captions.get(chosen, ()):
                yield _cap_caption(text, None)


def make_dataset(
    *,
    source: str,
    path: str,
    split: str,
    fields: tuple[str, ...],
    image_size: int | None = None,
    clip_image_size: int | None = None,
    low_res_size: int | None = None,
    crop_size: int | None = None,
    low_res_blur: float = 0.0,
    low_res_blur_sigma: float = 0.6,
    low_res_bsr: str = "",
    random_crop: bool = False,
    flip: bool = False,
    language: str = "en",
    tokenizer=None,
    seed: int = 0,
    max_bad_fraction: float = 1e-3,
    num_workers: int = 2,
    group: int = 1,
    classes: Sequence[str] = (),
    data_dir: str = "",
    image_field: str = "",
    caption_field: str = "",
    embeddings: str = "",
    verify_sha256: bool = False,
    allow_damaged: str | Sequence[str] = "",
) -> Dataset:
    """Open a dataset.

    Args:
        source, path, split, data_dir, image_field, caption_field, embeddings, verify_sha256, allow_damaged:
        see `sources.open_source`. fields: what batches hold, of image, clip_image, low_res, crop_yx, tokens,
        token_mask, image_embed, text_embed. image_size, clip_image_size, low_res_size, crop_size,
            low_res_blur, low_res_blur_sigma, low_res_bsr, random_crop, flip: see `transforms.Views`. Where a
            caption names sides a record is never mirrored.
        language: whose captions: 'en', 'zh', ..., or 'any' for all of them mixed.
        tokenizer: needed for tokens and token_mask.
        max_bad_fraction: share of unusable records above which the run stops; 0 stops at the first.
        num_workers: threads that read.
        group: so many successive records stay together in the shuffled order; see `stream`.
        classes: names of the classes of field label; see `label_of`.

    Raises:
        ValueError: a setting is unknown, missing or impossible; the message says what to change.
        TooManyBadRecords: indexing alone lost more than the budget.
    """
    if group < 1:
        raise ValueError(f"data.group={group} must be at least 1, which keeps no records together")
    if "label" in fields and len(set(classes)) < 2:
        raise ValueError("field label needs data.classes, two or more names that captions hold")
    for field in fields:
        if field not in FIELDS:
            raise ValueError(f"field {field!r} is unknown" + sources.did_you_mean(field, FIELDS))
    needs = dict(
        image="image_size", clip_image="clip_image_size", low_res="low_res_size", crop_yx="crop_size"
    )
    given = dict(
        image_size=image_size, clip_image_size=clip_image_size, low_res_size=low_res_size, crop_size=crop_size
    )
    for field, setting in needs.items():
        if field in fields and not given[setting]:
            raise ValueError(f"field {field!r} needs {setting}")
    if ("low_res" in fields or "crop_yx" in fields) and not image_size:
        raise ValueError("low_res and crop_yx need image_size, the side of the full picture")
    if image_size and max(low_res_size or 0, crop_size or 0) > image_size:
        raise ValueError(
            f"low_res_size {low_res_size} and crop_size {crop_size} must not exceed image_size {image_size}"
        )
    if {"tokens", "token_mask"} & set(fields) and tokenizer is None:
        raise ValueError("fields tokens and token_mask need a tokenizer")
    if low_res_bsr not in ("", *BSR):
        hint = sources.did_you_mean(low_res_bsr, BSR)
        raise ValueError(f"low_res_bsr {low_res_bsr!r} must be '' or one of {', '.join(BSR)}{hint}")
    if low_res_bsr and (low_res_blur or image_size % low_res_size):
        raise ValueError(
            f"low_res_bsr replaces low_res_blur ({low_res_blur}) and shrinks by a whole number "
            f"({image_size} -> {low_res_size}): set low_res_blur=0"
        )
    if not 0 <= low_res_blur <= 1 or low_res_blur_sigma <= 0:
        raise ValueError(
            f"low_res_blur {low_res_blur} is a probability, low_res_blur_sigma {low_res_blur_sigma} above 0"
        )
    opened = sources.open_source(
        source,
        path,
        split,
        data_dir=data_dir,
        image_field=image_field,
        caption_field=caption_field,
        embeddings=embeddings,
        verify_sha256=verify_sha256,
        allow_damaged=allow_damaged,
    )
    for field in ("image_embed", "text_embed"):
        if field in fields and field not in opened.embed_dims:
            raise ValueError(
                f"field {field!r} is not in the dataset (there is {sorted(opened.embed_dims) or 'none'}); "
                "set data.embeddings to a folder of embeddings, or compute it with a CLIP"
            )
    if set(_PICTURES) & set(fields) and not opened.has_images:
        raise ValueError(
            f"source {source!r} holds no images, but {sorted(set(_PICTURES) & set(fields))} are asked for"
        )
    if {"tokens", "token_mask"} & set(fields):
        _check_captions(opened, path, language)
    views = Views(
        image_size=image_size if {"image", "low_res", "crop_yx"} & set(fields) else None,
        clip_image_size=clip_image_size if "clip_image" in fields else None,
        low_res_size=low_res_size if "low_res" in fields else None,
        crop_size=crop_size,
        low_res_blur=low_res_blur,
        low_res_blur_sigma=low_res_blur_sigma,
        low_res_bsr=low_res_bsr,
        random_crop=random_crop,
        flip=flip,
    )
    bad = Budget(len(opened), max_bad_fraction, opened.refused, opened.passed, opened.examples)
    return Dataset(
        opened,
        tuple(fields),
        views,
        image_size,
        language,
        tokenizer,
        seed,
        num_workers,
        group,
        tuple(classes),
        bad,
    )
