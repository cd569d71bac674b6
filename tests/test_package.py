"""The package as a whole: its definition, its pinned versions, and what no file of it may hold."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dalle2_jax
from dalle2_jax.data import scenes
from dalle2_jax.runtime.extras import EXTRA_OF

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# What is installed under another name than it is imported by.
DISTRIBUTIONS = {"PIL": "pillow", "absl": "absl-py", "orbax": "orbax-checkpoint", "google": "protobuf"}


def definition() -> tuple[list[str], dict[str, list[str]]]:
    """(REQUIRED, EXTRAS) of setup.py, read without running it; the extra `dev` is made of the others."""
    literals = {}
    for node in ast.parse((ROOT / "setup.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("REQUIRED", "EXTRAS"):
            literals[node.targets[0].id] = ast.literal_eval(node.value)
    return literals["REQUIRED"], literals["EXTRAS"]


def applying(requirements: list[Requirement], python: str) -> list[Requirement]:
    """Those whose marker holds for this Python (on this machine's system)."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    return [r for r in requirements if r.marker is None or r.marker.evaluate(environment)]


def constraints(text: str) -> list[Requirement]:
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return [Requirement(line) for line in lines if line]


def constraint_errors(needs: list[Requirement], pins: list[Requirement], python: str) -> list[str]:
    """Direct dependencies without exactly one pin for this Python, and pins inexact or not permitted."""
    errors = []
    by_name = {}
    for pin in applying(pins, python):
        by_name.setdefault(canonicalize_name(pin.name), []).append(pin)
        if [s.operator for s in pin.specifier] != ["=="] or "*" in str(pin.specifier):
            errors.append(f"{pin} is not an exact version")
    for name, own in by_name.items():
        if len(own) > 1:
            errors.append(f"{name} has {len(own)} pins for Python {python}")
    for need in applying(needs, python):
        own = by_name.get(canonicalize_name(need.name), [])
        if not own:
            errors.append(f"{need.name} has no pin for Python {python}")
        for pin in own:
            version = next(iter(pin.specifier)).version
            if not need.specifier.contains(version, prereleases=True):
                errors.append(f"{pin} is not what setup.py asks for: {need}")
    return errors


def tracked_files() -> list[Path]:
    """The files under version control; of an unpacked archive without history, those that would be."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        paths = [ROOT / name for name in listed.split("\0") if name]
    else:
        folders = ("dalle2_jax", "configs", "tests", "launch", "docs")
        paths = [p for folder in folders for p in (ROOT / folder).rglob("*") if "__pycache__" not in p.parts]
        paths += ROOT.glob("*.*")
    return [path for path in paths if path.is_file()]


def machine_paths(text: str) -> list[str]:
    """Absolute paths below someone's home or workplace; examples write /home/somebody."""
    return re.findall(
        r"(?<![\w.$}/-])(?:/(?:work|root|home/(?!somebody/)\w+|Users/\w+|tmp/\w+)/[\w.-]+|[A-Z]:\\Users)",
        text,
    )


def test_one_version():
    version = dalle2_jax.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", version)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)[1]
    assert newest == version, f"CHANGELOG.md begins with {newest}, dalle2_jax.__version__ is {version}"


def test_the_version_that_is_installed():
    try:
        installed = importlib.metadata.version("dalle2_jax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("dalle2_jax is not installed here (launch/test.sh installs it)")
    assert installed == dalle2_jax.__version__


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_every_direct_dependency(python):
    required, extras = definition()
    needs = [
        Requirement(line) for line in (*required, *(need for extra in extras.values() for need in extra))
    ]
    pins = constraints((ROOT / "constraints.txt").read_text("utf-8"))
    assert len(needs) > 20 and len(pins) > 50
    assert not constraint_errors(needs, pins, python)


def test_training_asks_for_tensorflow_where_it_has_a_release():
    needs = [Requirement(line) for line in definition()[1]["train"]]
    for python in ("3.11", "3.12", "3.13", "3.14"):
        asked = {need.name for need in applying(needs, python)}
        found = {name for name in asked if name.startswith("tensorflow")}
        assert len(found) == (0 if python == "3.14" else 2), found  # one of its two builds, and its datasets
        assert {"pyarrow", "tensorboardX", "transformers"} <= asked


@pytest.mark.parametrize(
    ("pins", "error"),
    [
        ("jax==0.10.2", ""),
        ("jax==0.10.2; python_version < '3.12'\njax==0.12.0; python_version >= '3.12'", ""),
        ("jax==0.10.2; python_version < '3.11'", "no pin for Python 3.11"),
        ("flax==0.12.8", "no pin for Python 3.11"),
        ("jax>=0.10.2", "not an exact version"),
        ("jax==0.10.*", "not an exact version"),
        ("jax==0.9.1", "not what setup.py asks for"),
        ("jax==0.10.2\njax==0.10.1", "has 2 pins"),
    ],
)
def test_the_check_of_constraints(pins, error):
    errors = constraint_errors([Requirement("jax[tpu]>=0.10")], constraints(pins), "3.11")
    assert any(error in line for line in errors) if error else not errors


def test_every_imported_distribution_is_in_setup_py():
    required, extras = definition()
    declared = {canonicalize_name(Requirement(line).name) for line in (*required, *sum(extras.values(), []))}
    known = {"dalle2_jax", "configs"} | sys.stdlib_module_names
    undeclared = set()
    for path in [*(ROOT / "dalle2_jax").rglob("*.py"), *(ROOT / "configs").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.split(".")[0] for name in names} - known:
                if canonicalize_name(DISTRIBUTIONS.get(top, top)) not in declared:
                    undeclared.add(f"{path.relative_to(ROOT)} imports {top}")
    assert not undeclared


def test_messages_name_extras_that_exist():
    named = set(EXTRA_OF.values())
    for path in [*(ROOT / "dalle2_jax").rglob("*.py"), *(ROOT / "docs").rglob("*.ipynb")]:
        lines = [line for line in path.read_text("utf-8").splitlines() if "pip install" in line]
        named |= {name for line in lines for name in re.findall(r"dalle2_jax\[(\w+)\]", line)}
        assert all("dalle2_jax[" in line for line in lines), path
        assert not lines or path.suffix != ".py" or path.name == "extras.py", f"{path}: let extras.py say it"
    wanted = {"eval", "gs", "hub", "s3", "sentencepiece", "studio", "tpu", "train", "wandb"}
    assert wanted <= named <= definition()[1].keys()


def test_the_bundled_model_is_packaged():
    setup = (ROOT / "setup.py").read_text("utf-8")
    assert '"bundled/**/*"' in setup
    for path in (ROOT / "dalle2_jax").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            assert path.relative_to(ROOT / "dalle2_jax").parts[0] == "bundled", (
                f"{path} is not in package_data"
            )


@pytest.mark.parametrize("python", PYTHONS)
def test_sources_are_of_a_supported_python(python):
    version = tuple(int(part) for part in python.split("."))
    files = [path for path in tracked_files() if path.suffix == ".py"]
    assert len(files) > 20
    for path in files:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error"
            )  # an invalid escape is a warning in one Python and an error in a later one
            tree = ast.parse(path.read_text("utf-8"), str(path), feature_version=version)
            compile(tree, str(path), "exec")


@pytest.mark.parametrize("kind", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
@pytest.mark.parametrize(
    "module", ["dalle2_jax", "dalle2_jax.models.nets.unet", "configs.tiny.clip", "tests.test_x"]
)
def test_a_deprecation_in_the_code_of_the_repository_is_an_error(module, kind):
    """Raised there, or by a function of somebody else's that is called there; elsewhere it is none."""
    others = {"__name__": "jax.numpy", "kind": kind, "warnings": warnings}
    exec("def old(): warnings.warn('old', kind, stacklevel=2)", others)
    for line in ("warnings.warn('old', kind)", "old()"):
        with pytest.raises(kind, match="old"):
            exec(line, others | {"__name__": module})
    if kind is DeprecationWarning:
        exec("old()", others)
        exec("old()", others | {"__name__": "tests_of_others"})


def test_a_deprecation_in_a_test_is_an_error():
    with pytest.raises(DeprecationWarning, match="old"):
        warnings.warn("old", DeprecationWarning, stacklevel=1)


def test_no_file_names_a_path_of_somebodys_machine():
    found = {}
    for path in tracked_files():
        data = path.read_bytes()
        if b"\0" not in data[:4096]:
            found |= {
                str(path.relative_to(ROOT)): hits for hits in [machine_paths(data.decode("utf-8"))] if hits
            }
    assert not found


def test_the_check_of_machine_paths():
    # put together here, so that this file does not hold one
    for parts in (("work", "main", "x"), ("root", ".venv"), ("home", "ann", "data"), ("Users", "ann", "x")):
        assert machine_paths(f"see /{'/'.join(parts)} there") and machine_paths(f'"/{"/".join(parts)}"')
    for text in (
        "a/work/b",
        "gs://bucket/home/ann/x",
        "$HOME/root/x",
        "./root/x",
        "kernel/root/b",
        "work/x",
        "~/x",
    ):
        assert not machine_paths(text), text


def test_the_quickstart_says_rightly_what_training_never_shows():
    script = (ROOT / "launch/quickstart.sh").read_text("utf-8")
    config = scenes.preset("quickstart")
    noun = f"an? ({'|'.join(config.colours)}) ({'|'.join(config.shapes)})"
    sides = {"above": "above", "below": "below", "to the left of": "left of", "to the right of": "right of"}

    def facts(name: str) -> list[tuple[list[tuple[str, str]], bool]]:
        """Of every caption of an array of the script: its objects, and whether its relation is held out."""
        captions = [
            c
            for line in re.findall(rf"^{name}\+?=\((.*)\)$", script, re.M)
            for c in re.findall('"([^"]+)"', line)
        ]
        assert len(captions) == 4
        out = []
        for caption in captions:
            match = re.fullmatch(rf"{noun}(?: ({'|'.join(sides)}) {noun})?", caption)
            assert match, caption
            objects = [pair for pair in (match.group(1, 2), match.group(4, 5)) if pair[0]]
            relation = sides.get(match.group(3))
            held_out = relation and scenes.is_held_out_triple(objects[0][1], relation, objects[1][1])
            out.append((objects, bool(held_out)))
        return out

    held_out_pairs = scenes.pairs(config, held_out=True)
    for name, new_pair, new_relation in (("SEEN", 0, 0), ("NEW_PAIRS", 1, 0), ("NEW_RELATIONS", 0, 1)):
        for objects, held_out in facts(name):
            assert any(pair in held_out_pairs for pair in objects) == new_pair, objects
            assert held_out == new_relation, objects
