"""Frozen stages as functions of batches of records: CLIP, a text encoder, a tokenizer of pictures."""

import jax.numpy as jnp
import numpy as np
from etils import epath

from dalle2_jax.data import embeddings, text_states
from dalle2_jax.models import frozen, models
from dalle2_jax.runtime import hub, modeldir, partition
from dalle2_jax.runtime.batch import as_floats
from dalle2_jax.runtime.batched import Batched

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
        self.plan = dict(
            frozen={name: found.sha256}, codes=dict(grids=self.stage.grids, num_codes=self.stage.num_codes)
        )

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
        frozen.ops([*stages.values()][0], "encode")  # refuses one without an encoder
        return CodesEncoder(*paths.popitem(), batch_size)
    texts = [name for name, stage in stages.items() if frozen.ops(stage, "encode_text")]
    if len(texts) != 1 or texts == ["clip"]:
        raise ValueError(
            "give --clip=MODEL for CLIP's embeddings, or --config.frozen.t5=MODEL for the states of one text "
            f"encoder; config.frozen has {', '.join(texts) or 'none'}"
        )
    return StatesEncoder(texts[0], paths[texts[0]], batch_size)


def tokenizer_alone(config: dict, clip: str) -> dict[str, str]:
    """{name: path} of the one tokenizer of pictures among `config.frozen`; ValueError without."""
    paths = frozen.paths({"frozen": config.get("frozen")})
    found = {n: path for n, path in paths.items() if hasattr(models.open_stage(path, n)[0], "num_codes")}
    if len(found) != 1 or clip:
        raise ValueError("--kind=codes needs one tokenizer, --config.frozen.tokenizer=MODEL, and no --clip")
    return found
