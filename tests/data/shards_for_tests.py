"""Small shards for the data tests: pictures whose colour tells their number, and tars with any fault."""

import io
import json
import struct
import tarfile

import numpy as np
from PIL import Image

from dalle2_jax.data import examples, records, sources


def colour_of(number: int) -> tuple[int, int, int]:
    """A colour that no other number below 4096 has, far from what compression of a flat PNG could change."""
    return (number % 16 * 16, number // 16 % 16 * 16, number // 256 * 16)


def encode(picture, format: str = "PNG", **options) -> bytes:
    """The file of a PIL picture."""
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def flat_png(number: int, size=(8, 8)) -> bytes:
    """A PNG of one colour, that of `number`."""
    return encode(Image.new("RGB", size, colour_of(number)))


def noise_picture(size, seed: int = 0) -> Image.Image:
    """A picture (width, height) of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def write_tar(path, members, tar_format: int = tarfile.USTAR_FORMAT) -> None:
    """A tar of (name, bytes) pairs or of ready tarfile.TarInfo."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))


def sample(number: int, caption: str | None = None, image: bytes | None = None, **fields):
    """The members of one img2dataset sample; its caption says its number."""
    key = f"{number:09d}"
    caption = f"caption {number}" if caption is None else caption
    fields = {"caption": caption, "key": key, **fields}
    return [
        (f"{key}.png", flat_png(number) if image is None else image),
        (f"{key}.txt", caption.encode()),
        (f"{key}.json", json.dumps(fields).encode()),
    ]


def write_samples(path, numbers) -> None:
    """A tar of the samples of these numbers."""
    write_tar(path, [member for number in numbers for member in sample(number)])


def tfrecord_frame(payload: bytes) -> bytes:
    """One TFRecord."""
    length = struct.pack("<Q", len(payload))
    crcs = (struct.pack("<I", records.masked_crc32c(data)) for data in (length, payload))
    return length + next(crcs) + payload + next(crcs)


def open_source(*names: str, **settings):
    """The records of a dataset: `names` are source, path and split."""
    return sources.open_source(sources.SourceSettings(*names, **settings))


def write_class_folder(root, classes: dict[str, list[int]]) -> None:
    """ROOT/CLASS/NUMBER.png of `flat_png`, in folders below the class for numbers from 100 on."""
    for name, numbers in classes.items():
        for number in numbers:
            path = root / name / ("below" if number >= 100 else "") / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(flat_png(number))


def labelled_example(features: dict[str, list[bytes]], label: int, packed: bool = True) -> bytes:
    """A tf.train.Example of lists of bytes and of the whole number `label`."""
    value, varint = label % 2**64, bytearray()
    while value > 127:
        varint.append(value & 127 | 128)
        value >>= 7
    varint.append(value)
    number = examples._field(1, bytes(varint)) if packed else bytes([1 << 3, *varint])
    entry = examples._field(1, b"label") + examples._field(2, examples._field(3, number))
    return examples.serialize(features) + examples._field(1, examples._field(1, entry))


def write_labelled_tfds(folder, splits: dict[str, list[int]], classes: tuple[str, ...] = ()) -> None:
    """A prepared dataset NAME/VERSION of pictures, texts that are no captions, and the labels number % 3."""
    folder.mkdir(parents=True)
    name = folder.parent.name
    for split, numbers in splits.items():
        with open(folder / f"{name}-{split}.tfrecord-00000-of-00001", "wb") as file:
            for number in numbers:
                features = {"image": [flat_png(number)], "id": [b"photo_%d" % number]}
                file.write(examples.tfrecord(labelled_example(features, number % 3)))
    entries = [{"name": split, "shardLengths": [str(len(numbers))]} for split, numbers in splits.items()]
    info = {"name": name, "version": "1.0.0", "splits": entries}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    image, text = ({"pythonClassName": f"a.{kind}"} for kind in ("Image", "Text"))
    label = {"pythonClassName": "a.ClassLabel", "classLabel": {"numClasses": "3"}}
    features = {"image": image, "id": text, "label": label}
    written = {"pythonClassName": "a.FeaturesDict", "featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(written))
    if classes:
        (folder / "label.labels.txt").write_text("\n".join(classes) + "\n")


class WordTokenizer:
    """Stands for a tokenizer: the token is the number that ends the caption."""

    context_length, vocab_size = 4, 5000

    def __call__(self, captions):
        tokens = np.zeros((len(captions), 4), np.int32)
        tokens[:, 0] = [int(caption.split()[-1]) for caption in captions]
        return tokens, tokens > 0
