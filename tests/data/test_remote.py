"""Shards in object stores, on servers of this machine: indexed once, read in ranges, with connections cut."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from dalle2_jax.data import pipeline, remote
from tests.data import object_servers
from tests.data import shards_for_tests as made

fsspec = pytest.importorskip("fsspec", reason="reads object stores")


def needs(*modules):
    for module in modules:
        pytest.importorskip(module, reason="tries a store of an extra (pip install '.[stores]')")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty cache, short pauses, and no file system of another test."""
    monkeypatch.setenv("DALLE2_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    remote._file_system.cache_clear()
    yield
    remote._file_system.cache_clear()


def dataset(path, fields=("image", "tokens"), split="train", source="tar", **settings):
    settings = dict(image_size=8, tokenizer=made.WordTokenizer()) | settings
    return pipeline.make_dataset(source=source, path=path, split=split, fields=fields, **settings)


def seen(data) -> dict[int, int]:
    """{number of a picture, by its colour: the number that ends its caption} of an epoch."""
    found = {}
    for batch in data.batches(4, repeat=False):
        for picture, tokens in zip(batch["image"], batch["tokens"], strict=True):
            red, green, blue = map(int, picture[0, 0])
            found[red // 16 + green + blue * 16] = int(tokens[0])
    return found


def files_of(folder) -> dict[str, bytes]:
    """Two shards of training, one of validation, and a parquet file."""
    for name, numbers in {"train-0": range(6), "train-1": range(6, 10), "valid-0": [20]}.items():
        made.write_samples(folder / f"{name}.tar", numbers)
    return {f"data/{path.name}": path.read_bytes() for path in sorted(folder.glob("*.tar"))}


class Hurried:
    """The module `time` whose pauses are short."""

    def __getattr__(self, name):
        return getattr(time, name)

    def sleep(self, seconds):
        time.sleep(min(seconds, 0.01))


@contextlib.contextmanager
def hugging_face(files, monkeypatch):
    """(address, hub, proxy before it) of an endpoint with these files."""
    needs("huggingface_hub")
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http, "time", Hurried())  # it tries again by itself
    with object_servers.hub(files) as server:
        proxy = object_servers.Proxy(server.server_address[1])
        conf = {"endpoint": f"http://127.0.0.1:{proxy.port}", "token": False, "skip_instance_cache": True}
        monkeypatch.setitem(fsspec.config.conf, "hf", conf)
        yield f"hf://datasets/{object_servers.REPOSITORY}/data", server, proxy
        proxy.close()


def test_shards_are_indexed_once_and_read_in_ranges(tmp_path, monkeypatch):
    files = files_of(tmp_path)
    with hugging_face(files, monkeypatch) as (address, server, _):
        data = dataset(address)
        whole = [read for read in server.ranges if read[2] == len(files[read[0]])]
        assert len(whole) == 2  # one sequential read of each shard; the others look for captions
        del server.ranges[:]
        assert seen(data) == {number: number for number in range(10)}
        reads = server.ranges
        assert len(reads) == 10 and max(size for _, _, size in reads) < 4096  # one request a record
        assert seen(dataset(address, split="validation")) == {20: 20}
        del server.ranges[:]
        again = dataset(address + "/train-*.tar", ("image",), split="")
        assert not server.ranges and again.fingerprint == dataset(address).fingerprint
        assert seen(dataset(address + "/{train-0,valid-0}.tar")) == {n: n for n in (*range(6), 20)}
        local = dataset(str(tmp_path))
        for _, one, other in zip(range(3), data.batches(4, 3), local.batches(4, 3), strict=False):
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])
        made.write_samples(tmp_path / "train-1.tar", range(6, 12))  # a shard of the same name
        server.files["data/train-1.tar"] = (tmp_path / "train-1.tar").read_bytes()
        assert seen(dataset(address)) == {number: number for number in range(12)}
        assert seen(dataset("", sources=(address, str(tmp_path)))) == seen(dataset(address))


def test_a_connection_that_is_cut_is_tried_again_or_reported(tmp_path, monkeypatch):
    with hugging_face(files_of(tmp_path), monkeypatch) as (address, _, proxy):
        proxy.cuts, proxy.cut_after = 3, 2000  # in the middle of the shards
        data = dataset(address)
        assert not proxy.cuts
        proxy.cuts, proxy.cut_after = 4, 0
        assert seen(data) == {number: number for number in range(10)} and not proxy.cuts
        assert data.bad_records() == {}
        proxy.cuts = 10**6
        monkeypatch.setattr(remote, "RETRIES", 2)
        with pytest.raises(remote.Unreachable, match=r"train-.*tar: reading .* failed 3 times"):
            seen(data)
        proxy.cuts = 0
        assert seen(data) == {number: number for number in range(10)}


def test_parquet_in_a_store_is_read_by_row_groups(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason="reads parquet")
    pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": made.flat_png(n) + bytes(9999), "path": f"{n}.png"} for n in range(8)]
    table = pyarrow.table({"image": images, "text": [f"caption {n}" for n in range(8)]})
    pyarrow.parquet.write_table(table, tmp_path / "0.parquet", row_group_size=2, compression="none")
    files = {"data/train-0.parquet": (tmp_path / "0.parquet").read_bytes()}
    with hugging_face(files, monkeypatch) as (address, server, proxy):
        data = dataset(address, source="parquet")
        del server.ranges[:]
        data.source.read(3)
        assert 20_000 < sum(size for _, _, size in server.ranges) < 25_000  # of 80,000
        proxy.cuts, proxy.cut_after = 2, 1000
        assert seen(data) == {number: number for number in range(8)}


def test_addresses_that_are_refused(tmp_path, monkeypatch):
    for path, message in (
        ("ftp://host/data", "ftp:// is unknown: there are gs://"),
        ("hf://datasets/owner/pictures/other", "holds no "),
        ("hf://datasets/owner/pictures/data/{train-0,train-7}.tar", "1 of the 2 names"),
        ("hf://datasets/owner/pictures/data/train-7.tar", "holds no "),
    ):
        with hugging_face(files_of(tmp_path), monkeypatch) as (_, _, _):
            remote._file_system.cache_clear()
            with pytest.raises(ValueError, match=message):
                dataset(path)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"pip install 'dalle2_jax\[s3\]'"):
        dataset("s3://bucket/data")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"pip install 'dalle2_jax\[gs\]'"):
        dataset("gs://bucket/data", source="folder")


def loose_files() -> dict[str, bytes]:
    """Pictures with captions beside them, and embeddings of their captions."""
    files, array = {}, io.BytesIO()
    for n in range(7):
        text = f"caption {n}".encode()
        files |= {f"data/loose/train/{n}.png": made.flat_png(n), f"data/loose/train/{n}.txt": text}
    np.save(array, np.arange(14, dtype=np.float16).reshape(7, 2))
    lines = "".join(json.dumps({"caption": f"caption {n}"}) + "\n" for n in range(7))
    files |= {"data/embeds/img_emb/img_emb_0.npy": array.getvalue()}
    return files | {"data/embeds/metadata/metadata_0.jsonl": lines.encode()}


def tried_loose(address: str, folder) -> None:
    """Pictures and embeddings of a store are those of the same files on the disk."""
    for name, content in loose_files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    fields = ("image", "tokens", "image_embed")
    both, local = (
        dataset(f"{place}/loose", fields, source="folder", embeddings=f"{place}/embeds")
        for place in (address, folder / "data")
    )
    assert both.source.remote and seen(both) == {number: number for number in range(7)}
    assert both.fingerprint == local.fingerprint
    alone = dataset(f"{address}/embeds", ("image_embed", "tokens"), source="embeddings")
    for data in (both, alone):
        (batch,) = data.batches(7, repeat=False)
        numbers = batch["tokens"][:, 0]
        np.testing.assert_array_equal(batch["image_embed"], np.stack([2 * numbers, 2 * numbers + 1], 1))


def test_loose_pictures_and_embeddings_of_a_store(tmp_path, monkeypatch):
    with hugging_face(loose_files(), monkeypatch) as (address, _, proxy):
        tried_loose(address, tmp_path)
        for source, message in (("folder", "absent is no folder"), ("embeddings", "absent does not exist")):
            with pytest.raises(ValueError, match=message):
                dataset(f"{address}/absent", ("tokens",), source=source)
        proxy.cuts, proxy.cut_after = 3, 100
        tried_loose(address, tmp_path)
        assert not proxy.cuts


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def running(command: list[str], port: int, **environment):
    """A server in a process of its own, once it listens."""
    process = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, "the server ended"
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(10)


def tried(address: str, proxy) -> None:
    """The records of a store, with connections that are cut while they are indexed and read."""
    proxy.cuts, proxy.cut_after = 2, 3000
    data = dataset(address)
    assert not proxy.cuts
    proxy.cuts, proxy.cut_after = 2, 500
    assert seen(data) == {number: number for number in range(10)} and not proxy.cuts
    assert data.bad_records() == {} and seen(dataset(address, split="validation")) == {20: 20}
    assert seen(dataset(address + "/train-*.tar", split="")) == {number: number for number in range(10)}


def test_s3_on_moto(tmp_path, monkeypatch):
    needs("s3fs", "moto", "flask")
    port = free_port()
    with running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port):
        proxy = object_servers.Proxy(port)
        options = dict(key="a", secret="b", endpoint_url=f"http://127.0.0.1:{proxy.port}")
        options["client_kwargs"] = {"region_name": "eu-west-1"}
        monkeypatch.setitem(fsspec.config.conf, "s3", options)
        store = fsspec.filesystem("s3")
        store.mkdir("bucket")
        for name, content in (files_of(tmp_path) | loose_files()).items():
            store.pipe(f"bucket/{name}", content)
        tried("s3://bucket/data", proxy)
        tried_loose("s3://bucket/data", tmp_path / "loose")
        proxy.close()


def test_gs_on_its_emulator(tmp_path, monkeypatch):
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # which asks Google by grpc
    needs("gcsfs", "gcp_storage_emulator")
    port = free_port()
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", f"--port={port}", "--in-memory"]
    with running([*command, "--default-bucket=bucket"], port):
        proxy = object_servers.Proxy(port)
        options = dict(token="anon", endpoint_url=f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setitem(fsspec.config.conf, "gs", options)
        store = fsspec.filesystem("gs")
        for name, content in (files_of(tmp_path) | loose_files()).items():
            store.pipe(f"bucket/{name}", content)
        tried("gs://bucket/data", proxy)
        tried_loose("gs://bucket/data", tmp_path / "loose")
        proxy.close()
