"""Compiled programs on disk: the same pictures with and without them, and no program of other sources."""

import types

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dalle2_jax import pipeline
from dalle2_jax.runtime import partition, programs
from tests.tiny_model import CAPTIONS, make_model

OURS = ("dalle2_jax.models.stages.prior",)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A new folder of programs."""
    monkeypatch.setattr(programs, "KEEP", True)
    monkeypatch.setattr(programs, "folder", lambda: tmp_path / "programs")
    return tmp_path / "programs"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def without_jax_cache():
    """A function that turns JAX's compilation cache off until the test ends."""

    def turn(on=False):
        jax.config.update("jax_enable_compilation_cache", on)
        compilation_cache.reset_cache()

    yield turn
    turn(on=True)


def test_pictures_are_the_same_with_programs_off_cold_warm_and_damaged(
    directory, place, without_jax_cache, monkeypatch
):
    traced = []
    original = programs.compiled

    def counted(path, compile_program, *rest):
        return original(path, lambda: traced.append(path) or compile_program(), *rest)

    def draw(caption=CAPTIONS[0], *, seed):
        """(a base picture by a new pipeline, the number of programs that were traced)."""
        traced.clear()
        model = pipeline.UnCLIP.load(directory)
        return model.text_to_image([caption], upsample=False, seed=seed).base, len(traced)

    monkeypatch.setattr(programs, "compiled", counted)
    with monkeypatch.context() as patch:
        patch.setattr(programs, "folder", lambda: None)
        expected, stages = draw(seed=5)
    assert stages == 3  # text, prior, decoder
    draw(seed=5)
    assert len(list(place.iterdir())) == stages  # of shapes: the programs came from JAX's cache
    without_jax_cache()
    cold, warm, other = draw(seed=5), draw(seed=5), draw(CAPTIONS[1], seed=6)
    assert (cold[1], warm[1], other[1]) == (stages, 0, 0)  # seed and caption are no part of a program
    np.testing.assert_array_equal(cold[0], expected)
    np.testing.assert_array_equal(warm[0], expected)
    assert (other[0] != expected).any()

    contents = {path: path.read_bytes() for path in place.iterdir()}
    assert len(contents) == 2 * stages  # a program and the shapes of the parameters of each
    small = sorted(contents, key=lambda path: len(contents[path]))[: stages + 1]  # one program
    for i, path in enumerate(small):  # cut short, or with a changed byte
        data = contents[path]
        path.write_bytes(data[: len(data) // 2] if i % 2 == 0 else data[:-1] + bytes([data[-1] ^ 1]))
    damaged, again = draw(seed=5), draw(seed=5)
    assert (damaged[1], again[1]) == (1, 0)
    np.testing.assert_array_equal(damaged[0], expected)
    np.testing.assert_array_equal(again[0], expected)


def test_what_decides_a_program_is_in_its_key(place, monkeypatch):
    mesh = partition.local_mesh()
    usual = programs.file_of(OURS, mesh, "a", 1)
    assert usual.parent == place and programs.file_of(OURS, mesh, "a", 1) == usual
    found = {usual, programs.file_of(OURS, mesh, "a", 2)}
    found.add(programs.file_of(OURS, partition.make_mesh(devices=jax.devices()[:1]), "a", 1))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    found.add(programs.file_of(OURS, mesh, "a", 1))
    with jax.numpy_dtype_promotion("strict"):
        found.add(programs.file_of(OURS, mesh, "a", 1))
    monkeypatch.setattr(programs, "_versions", lambda: ["another jax"])
    found.add(programs.file_of(OURS, mesh, "a", 1))
    monkeypatch.setattr(programs, "sources", lambda: "of another version")
    found.add(programs.file_of(OURS, mesh, "a", 1))
    assert len(found) == 7 and None not in found
    assert programs.file_of((*OURS, "my.stage"), mesh, "a", 1) is None
    monkeypatch.setattr(programs, "sources", lambda: "")
    assert programs.file_of(OURS, mesh, "a", 1) is None


def test_every_source_counts_and_new_ones_are_not_those_that_run(tmp_path, monkeypatch):
    (tmp_path / "nets").mkdir()
    files = [tmp_path / name for name in ("__init__.py", "nets/unet.py")]
    for path in files:
        path.write_text("x = 1\n")
    monkeypatch.setattr(programs, "PACKAGE", tmp_path)
    monkeypatch.setattr(programs, "_sha256", programs._sha256.__wrapped__)
    assert programs.sources() == ""  # written after this process began
    monkeypatch.setattr(programs, "_STARTED", programs.time.time() + 60)
    found = {programs.sources()}
    for path in files:
        path.write_text("x = 2\n")
        found.add(programs.sources())
    files[1].rename(tmp_path / "unet.py")
    found.add(programs.sources())
    assert len(found) == 4 and "" not in found
    monkeypatch.setattr(programs, "PACKAGE", tmp_path / "nets")
    assert programs.sources() == ""


def test_there_is_no_folder_without_a_local_cache_or_with_several_processes(monkeypatch):
    monkeypatch.setattr(programs, "KEEP", True)
    config = types.SimpleNamespace(jax_compilation_cache_dir="/cache", jax_enable_compilation_cache=True)
    count = types.SimpleNamespace(config=config, process_count=lambda: 1)
    monkeypatch.setattr(programs, "jax", count)
    assert str(programs.folder()) == "/cache/programs"
    for name, value in (
        ("jax_compilation_cache_dir", None),
        ("jax_compilation_cache_dir", "gs://bucket/cache"),
        ("jax_enable_compilation_cache", False),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(config, name, value)
            assert programs.folder() is None
    monkeypatch.setattr(count, "process_count", lambda: 2)
    assert programs.folder() is None


def test_the_files_that_were_not_used_for_longest_go(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "MAX_FILES", 2)
    for age, name in ((300, "a"), (200, "b"), (100, "c")):
        programs._write(tmp_path / name, name.encode())
        programs.os.utime(tmp_path / name, (0, programs.time.time() - age))
        if name == "b":
            assert programs._read(tmp_path / "a") == b"a"  # used now
    assert {path.name for path in tmp_path.iterdir()} == {"a", "c"}
    assert programs._read(tmp_path / "b") is None
