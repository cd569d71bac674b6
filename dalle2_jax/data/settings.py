"""The settings of a dataset of batches: those of `config.data`, and those that a run adds for its stage."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dalle2_jax.data.degradations import BSR
from dalle2_jax.data.find import did_you_mean
from dalle2_jax.data.records import RecordSource
from dalle2_jax.data.sources import SourceSettings
from dalle2_jax.data.transforms import Views
from dalle2_jax.runtime import batch

# The fields of `batch.FIELDS` that a dataset has; frozen networks compute others.
FIELDS = (
    "image",
    "low_res",
    "crop_yx",
    "tokens",
    "token_mask",
    "image_embed",
    "text_embed",
    "text_states",
    "codes",
    "label",
)
TEXT = ("tokens", "token_mask")
# A field that is cut from a picture -> the setting with its side; `image_sizes` has those of OWNER.image.
SIDES = dict(image="image_size", low_res="low_res_size", crop_yx="crop_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings(SourceSettings, Views):
    """The records (`SourceSettings`) and the batches to make of them.

    fields: the fields of batches, of `FIELDS`; OWNER.image is a picture for the frozen stage OWNER.
    image_size ... flip: see `transforms.Views`. A record whose captions name sides is never mirrored.
    language: of captions: 'en', 'zh', ..., or 'any' for all, mixed.
    tokenizer: for tokens and token_mask. bpe_dropout: how often it leaves a merge out, see `bpe_dropout`.
    seed: of order and augmentation.
    max_bad_fraction: share of unusable records above which the run stops; 0: at the first.
    num_workers: reading threads.
    group: the number of successive records that stay together in the shuffled order; see `order`.
    classes: names of the classes of the field label; see `classes.names`, and for records without labels
    `pipeline.label_of`. num_classes: how many the stage reads; 0: any number.
    """

    fields: tuple[str, ...] = ()
    language: str = "en"
    tokenizer: Any = None
    bpe_dropout: float = 0.0
    seed: int = 0
    max_bad_fraction: float = 1e-3
    num_workers: int = 2
    group: int = 1
    classes: Sequence[str] = ()
    num_classes: int = 0

    def has(self, *names: str) -> bool:
        """Whether batches have any of these fields."""
        return bool(set(names) & set(self.fields))

    @property
    def tokenizes(self) -> bool:
        """Whether captions are tokenized; stored text states have a mask of their own."""
        return self.has("tokens") or (self.has("token_mask") and not self.has("text_states"))

    @property
    def pictures(self) -> tuple[str, ...]:
        """The fields that are cut from a picture."""
        return tuple(name for name in self.fields if name in SIDES or name.endswith(".image"))

    @property
    def views(self) -> Views:
        """The pictures to make of each record."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(Views)}
        sides = dict(
            image_size=self.image_size if self.has("image", "low_res", "crop_yx") else None,
            image_sizes={name: side for name, side in self.image_sizes.items() if self.has(name)},
            low_res_size=self.low_res_size if self.has("low_res") else None,
        )
        return Views(**settings | sides)

    def check(self) -> None:
        """Raise ValueError, with a remedy, for an unknown, missing or impossible setting."""
        if self.group < 1:
            raise ValueError(f"data.group={self.group} must be at least 1, which keeps no records together")
        for field in self.fields:
            if field not in FIELDS and not field.endswith(".image"):
                raise ValueError(f"field {field!r} is unknown" + did_you_mean(field, FIELDS))
            side = getattr(self, SIDES[field]) if field in SIDES else self.image_sizes.get(field)
            if field in self.pictures and not side:
                raise ValueError(f"field {field!r} needs {SIDES.get(field, f'image_sizes[{field!r}]')}")
        if self.has("low_res", "crop_yx") and not self.image_size:
            raise ValueError("low_res and crop_yx need image_size, the side of the full picture")
        if self.image_size and max(self.low_res_size or 0, self.crop_size or 0) > self.image_size:
            raise ValueError(
                f"low_res_size {self.low_res_size} and crop_size {self.crop_size} must not exceed image_size "
                f"{self.image_size}"
            )
        if self.has(*TEXT) and self.tokenizer is None:
            raise ValueError("fields tokens and token_mask need a tokenizer")
        if self.has("text_states") and (self.has("tokens") or not self.has("token_mask")):
            raise ValueError("field text_states comes with token_mask, which is its own, and without tokens")
        self._check_low_res()

    def _check_low_res(self) -> None:
        bsr, blur, sigma = self.low_res_bsr, self.low_res_blur, self.low_res_blur_sigma
        if bsr not in ("", *BSR):
            hint = did_you_mean(bsr, BSR)
            raise ValueError(f"low_res_bsr {bsr!r} must be '' or one of {', '.join(BSR)}{hint}")
        if bsr and (blur or (self.image_size or 0) % (self.low_res_size or 1)):
            raise ValueError(
                f"low_res_bsr replaces low_res_blur ({blur}) and shrinks by a whole number "
                f"({self.image_size} -> {self.low_res_size}): set low_res_blur=0"
            )
        if not 0 <= blur <= 1 or sigma <= 0:
            raise ValueError(f"low_res_blur {blur} is a probability, low_res_blur_sigma {sigma} above 0")

    def check_source(self, source: RecordSource) -> None:
        """Raise ValueError for a field that the source does not have."""
        embeddings = source.embed_dims
        for field in self.fields:
            if batch.field(field).kind in batch.STORED and field not in embeddings:
                raise ValueError(
                    f"field {field!r} is not in the dataset (there is {sorted(embeddings) or 'none'}); "
                    "set data.embeddings to a folder of embeddings, or compute it with a frozen encoder"
                )
        if self.has("text_states") and source.most_tokens > self.tokenizer.context_length:
            raise ValueError(
                f"the stored text_states are of captions of up to {source.most_tokens} tokens, and "
                f"tokenizer.context_length is {self.tokenizer.context_length}: make them one"
            )
        cut = sorted(self.pictures)
        if cut and not source.has_images:
            raise ValueError(f"source {self.source!r} holds no images, but {cut} are needed")

    def shapes(self, source: RecordSource) -> dict[str, tuple[str, tuple[int, ...]]]:
        """{field: (dtype, shape of one record)} of batches, `index` last."""
        views = self.views
        length = self.tokenizer.context_length if self.tokenizer else None
        shapes: dict[str, tuple[Any, ...]] = {
            "image": ((views.crop_size or views.image_size,) * 2 + (3,)),
            "low_res": ((views.low_res_size,) * 2 + (3,)),
            "crop_yx": (2,),
            "tokens": (length,),
            "token_mask": (length,),
            "image_embed": (source.embed_dims.get("image_embed"),),
            "text_embed": (source.embed_dims.get("text_embed"),),
            "text_states": (length, source.embed_dims.get("text_states")),
            "codes": (source.embed_dims.get("codes"),),
            "label": (),
            "index": (),
        } | {name: (side, side, 3) for name, side in views.image_sizes.items()}
        types = {name: batch.field(name).dtype for name in shapes}
        if views.degrades:
            types["low_res"] = "float32"
        return {name: (types[name], shapes[name]) for name in (*self.fields, "index")}
