"""Who may import whom (docs/design.md), read from the sources with `ast`.

    each floor        -> the floors below it, and its own folder: FLOORS
    models/nets       -> jax, flax; of the package only nets and partition.constrain
    models/diffusion  -> jax, numpy; no network
    models/tokens     -> jax; no network
    models/stages     -> nets, diffusion, tokens, jax, numpy
    nobody            -> configs, torch, pickle;  outside nets -> flax.linen;  outside data -> TensorFlow

An import counts wherever it stands, inside functions too. What loads when a module is imported (imports
outside functions, followed through the package) is checked apart: generating needs no TensorFlow, no extra.
"""

import ast
import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "dalle2_jax"
TENSORFLOW = ("tensorflow", "tensorflow_datasets", "tensorflow_metadata", "keras")
# Heavy or optional: imported by the function that needs them, so that a module can be read without them.
INSIDE_FUNCTIONS = (
    *TENSORFLOW,
    "transformers",
    "diffusers",
    "fsspec",
    "wandb",
    "tensorboard",
    "tensorboardX",
    "pyarrow",
    "gradio",
    "huggingface_hub",
)
# From the roof down. What is beside the floors (`__init__`, `__main__`, `pipeline`) imports what it likes.
FLOORS = (
    ("evaluate", "studio"),
    ("edit", "embed", "convert", "preflight", "benchmark"),
    ("generate", "train"),
    ("systems",),
    ("models", "data"),
    ("runtime",),
)
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
BESIDE = {"", "__main__", "configs", "pipeline"}
COMMANDS_WITHOUT_TENSORFLOW = ("generate.__main__", "pipeline", "models.models", "convert.convert")


@dataclasses.dataclass(frozen=True)
class Import:
    """`module` is a full name; of `from a.b import c`, where c may be a module or a thing in one, `a.b.c`."""

    module: str
    line: int
    in_function: bool

    def within(self, *names: str) -> bool:
        return any(self.module == name or self.module.startswith(name + ".") for name in names)


def imports(source: str, module: str, is_package: bool = False) -> list[Import]:
    """Every import of a module: statements (relative ones made absolute), import_module(), __import__()."""
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[
                    : None if is_package and node.level == 1 else -(node.level - is_package)
                ]
                base = ".".join([*above, base] if base else above)
            found.extend(Import(f"{base}.{alias.name}", node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append(Import(node.args[0].value, node.lineno, in_function))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            in_function = True  # never executed
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def is_standard(entry: Import) -> bool:
    return entry.module.split(".")[0] in sys.stdlib_module_names


def package_part(module: str) -> str:
    """'models' of dalle2_jax.models.nets.unet, 'embed' of dalle2_jax.embed."""
    return module.split(".")[1] if "." in module else ""


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What `module` imports against the rules, each as 'module:line imports x: why not'."""
    part, room = package_part(module), ".".join(module.split(".")[1:3])
    own = {name: f"{PACKAGE}.models.{name}" for name in ("nets", "diffusion", "tokens", "stages")}
    parts = tuple(f"{PACKAGE}.runtime.partition.{name}" for name in ("constrain", "batch_shards"))
    names = f"{PACKAGE}.runtime.names"  # of the standard library alone
    allowed = {  # everything that a folder may import besides the standard library
        "models.nets": ("jax", "flax", own["nets"], parts[0]),
        "models.diffusion": ("jax", "numpy", own["diffusion"], names),
        "models.tokens": ("jax", own["tokens"]),
        "models.stages": ("jax", "numpy", *own.values(), *parts, names),
    }
    out = []
    for entry in imports(source, module, is_package):
        why = []
        if room in allowed and not is_standard(entry) and not entry.within(*allowed[room]):
            why.append(f"{room} may import {', '.join(allowed[room])}")
        target = package_part(entry.module) if entry.within(PACKAGE) else None
        if part not in BESIDE and target in FLOOR_OF and target != part:
            if FLOOR_OF[target] <= FLOOR_OF[part]:
                why.append(f"{part} imports what is below it, and {target} is not")
        if entry.within("configs", f"{PACKAGE}.configs") and part != "configs":
            why.append("nobody imports configs")
        if entry.within("torch", "torchvision"):
            why.append("torch is for tests alone")
        if entry.within("pickle", "cloudpickle", "dill", "joblib"):
            why.append("reading a pickle runs its code")
        if entry.within("flax.linen") and room != "models.nets":
            why.append("flax.linen is imported in nets alone")
        if entry.within(*TENSORFLOW) and part != "data":
            why.append("TensorFlow is imported in data alone")
        if entry.within(*INSIDE_FUNCTIONS) and not entry.in_function:
            why.append("only inside the functions that need it")
        if module == f"{PACKAGE}.evaluate.scenes" and entry.within(f"{PACKAGE}.data", *own.values()):
            why.append("the checker of scenes must not know how they are drawn")
        out += [f"{module}:{entry.line} imports {entry.module}: {reason}" for reason in why]
    return out


def sources() -> dict[str, tuple[str, bool]]:
    """Of every module of the package: its source, and whether it is a package."""
    out = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        out[".".join(parts[:-1] if is_package else parts)] = path.read_text("utf-8"), is_package
    return out


def loaded_by(module: str, modules: dict[str, tuple[str, bool]]) -> dict[str, list[Import]]:
    """Every module of the package that importing `module` loads, with its imports outside functions."""
    out, waiting = {}, [module]
    while waiting:
        name = waiting.pop()
        if name in out or name not in modules:
            continue
        out[name] = [
            entry for entry in imports(modules[name][0], name, modules[name][1]) if not entry.in_function
        ]
        for entry in (*out[name], Import(name, 0, False)):
            parts = entry.module.split(".")
            waiting += [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return out


MODULES = sources()


def test_every_part_has_its_floor():
    assert {package_part(module) for module in MODULES} <= FLOOR_OF.keys() | BESIDE


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_the_permitted_way(module):
    source, is_package = MODULES[module]
    assert not violations(module, source, is_package)


@pytest.mark.parametrize(
    "command", [name for name in COMMANDS_WITHOUT_TENSORFLOW if f"{PACKAGE}.{name}" in MODULES]
)
def test_what_generating_loads_is_in_the_base_of_setup_py(command):
    # names of distributions that differ from what is imported
    distributions = {
        "PIL": "pillow",
        "absl": "absl-py",
        "orbax": "orbax-checkpoint",
        "google_crc32c": "google-crc32c",
    }
    tree = ast.parse((ROOT / "setup.py").read_text("utf-8"))
    required = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "REQUIRED"
    )
    base = {name.split(">")[0].split("[")[0] for name in required}
    assert "jax" in base
    for module, entries in loaded_by(f"{PACKAGE}.{command}", MODULES).items():
        for entry in entries:
            top = entry.module.split(".")[0]
            known = top == PACKAGE or is_standard(entry) or distributions.get(top, top) in base
            assert known, f"{module}:{entry.line} imports {top}, which only an extra of setup.py installs"


def test_every_module_can_be_imported_where_tensorflow_and_torch_are_not_installed():
    code = f"""
        import importlib, sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {(*TENSORFLOW, "torch", "transformers", "wandb", "tensorboardX")!r}:
                    raise ModuleNotFoundError(f"{{name}} is blocked by the test")

        sys.meta_path.insert(0, Absent())
        for blocked in ("tensorflow", "torch"):
            try:
                importlib.import_module(blocked)
            except ModuleNotFoundError:
                continue
            sys.exit(f"{{blocked}} was not blocked")
        for module in {list(MODULES)!r}:
            importlib.import_module(module)
        print("imported all")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "imported all" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("dalle2_jax.models.nets.unet", "import numpy as np", "nets may import"),
        ("dalle2_jax.models.nets.unet", "from dalle2_jax.models.diffusion import process", "nets may import"),
        ("dalle2_jax.models.nets.unet", "from dalle2_jax.runtime import partition", "nets may import"),
        (
            "dalle2_jax.models.nets.unet",
            "from dalle2_jax.runtime.partition import make_mesh",
            "nets may import",
        ),
        ("dalle2_jax.models.nets.unet", "from ...runtime.partition import make_mesh", "nets may import"),
        ("dalle2_jax.models.diffusion.process", "import flax", "diffusion may import"),
        (
            "dalle2_jax.models.diffusion.process",
            "def f():\n  from dalle2_jax.models.nets import unet",
            "diffusion may import",
        ),
        ("dalle2_jax.models.tokens.decode", "from dalle2_jax.models.nets import causal", "tokens may import"),
        ("dalle2_jax.models.stages.prior", "import optax", "stages may import"),
        ("dalle2_jax.models.stages.prior", "from dalle2_jax.runtime import checkpoint", "stages may import"),
        ("dalle2_jax.data.pipeline", "from dalle2_jax.models.stages import clip", "models is not"),
        ("dalle2_jax.runtime.checkpoint", "from dalle2_jax.data import records", "data is not"),
        (
            "dalle2_jax.runtime.metrics",
            "def f():\n  import dalle2_jax.models.nets.unet",
            "models is not",
        ),
        ("dalle2_jax.generate.pipeline", "from dalle2_jax.train import step", "train is not"),
        ("dalle2_jax.models.models", "from dalle2_jax import embed", "embed is not"),
        ("dalle2_jax.train.loop", "from configs.tiny import clip", "nobody imports configs"),
        (
            "dalle2_jax.train.loop",
            "import importlib\nimportlib.import_module('configs.clip')",
            "nobody imports configs",
        ),
        ("dalle2_jax.train.loop", "from dalle2_jax.configs.tiny import clip", "nobody imports configs"),
        ("dalle2_jax.convert.card", "def f():\n  import torch", "tests alone"),
        ("dalle2_jax.convert.card", "import torch.nn as nn", "tests alone"),
        ("dalle2_jax.runtime.checkpoint", "import pickle", "runs its code"),
        ("dalle2_jax.train.step", "import flax.linen as nn", "nets alone"),
        ("dalle2_jax.train.step", "from flax import linen", "nets alone"),
        ("dalle2_jax.runtime.metrics", "def f():\n  import tensorflow as tf", "data alone"),
        ("dalle2_jax.data.pipeline", "import tensorflow as tf", "only inside the functions"),
        (
            "dalle2_jax.data.pipeline",
            "try:\n  import tensorflow_datasets\nexcept ImportError: pass",
            "only inside",
        ),
        ("dalle2_jax.data.pipeline", "class A:\n  import tensorflow", "only inside the functions"),
        ("dalle2_jax.data.tokenizer", "from transformers import CLIPTokenizer", "only inside the functions"),
        ("dalle2_jax.evaluate.scenes", "from dalle2_jax.data import scenes", "how they are drawn"),
    ],
)
def test_the_check_finds(module, source, reason):
    assert any(reason in line for line in violations(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dalle2_jax.models.nets.unet", "import math\nimport jax\nimport flax.linen as nn"),
        (
            "dalle2_jax.models.nets.unet",
            "from dalle2_jax.models.nets.layers import Dense\n"
            "from dalle2_jax.runtime.partition import constrain",
        ),
        ("dalle2_jax.models.nets.unet", "from . import layers"),
        (
            "dalle2_jax.models.stages.prior",
            "from dalle2_jax.models.diffusion import sampling\nfrom dalle2_jax.models.nets import text",
        ),
        ("dalle2_jax.data.pipeline", "def f():\n  import tensorflow as tf\n  import tensorflow_datasets"),
        ("dalle2_jax.data.sources", "from dalle2_jax.data import scenes_builder"),
        ("dalle2_jax.train.step", "import flax.struct"),
        ("dalle2_jax.train.loop", "import configs_of_others"),
    ],
)
def test_the_check_permits(module, source):
    assert not violations(module, source)


def test_relative_imports_are_resolved():
    assert imports("from . import a", "p.q.m")[0].module == "p.q.a"
    assert imports("from ..b import a", "p.q.m")[0].module == "p.b.a"
    assert imports("from . import a", "p.q", is_package=True)[0].module == "p.q.a"
    assert imports("from .. import a", "p.q", is_package=True)[0].module == "p.a"


def test_what_a_module_loads_is_followed_through_the_package():
    modules = {
        "dalle2_jax": ("", True),
        "dalle2_jax.embed": (
            "from dalle2_jax.data import pipeline\ndef f():\n  import dalle2_jax.train",
            False,
        ),
        "dalle2_jax.data": ("", True),
        "dalle2_jax.data.pipeline": ("import tensorflow", False),
        "dalle2_jax.train": ("", False),
    }
    loaded = loaded_by("dalle2_jax.embed", modules)
    assert set(loaded) == set(modules) - {"dalle2_jax.train"}
    assert [entry.module for entry in loaded["dalle2_jax.data.pipeline"]] == ["tensorflow"]


MOST_LINES, MOST_LINES_OF_FUNCTION, MOST_PARAMETERS = 400, 80, 8


def too_large(source: str) -> list[str]:
    """What of a file is above the limits. A stage's `build` takes a config, and may have more keywords."""
    found = ["the file"] if source.count("\n") > MOST_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([argument for argument in given if argument.arg not in ("self", "cls")])
            lines = node.end_lineno - node.lineno + 1
            if lines > MOST_LINES_OF_FUNCTION or (count > MOST_PARAMETERS and node.name != "build"):
                found.append(f"{node.name}: {lines} lines, {count} parameters")
    return found


def test_files_and_functions_are_short():
    files = {path: too_large(path.read_text("utf-8")) for path in (ROOT / PACKAGE).rglob("*.py")}
    assert len(files) > 100 and not {str(path): found for path, found in files.items() if found}


@pytest.mark.parametrize(
    "source", ["\n" * 401, "def f():\n" + " 0\n" * 80, "def f(a, b, c, d, *, e, f, g, h, i): 0"]
)
def test_what_is_too_large_is_found(source):
    assert too_large(source)
