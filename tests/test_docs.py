"""README.md and docs compared with the code: commands, settings, files, links.

Flags are read from the modules' sources; settings from the configs and from the signatures that they fill.
"""

import ast
import functools
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dalle2_jax.__main__ import COMMANDS
from dalle2_jax.convert import convert
from dalle2_jax.data import damage
from dalle2_jax.data.settings import DataSettings
from dalle2_jax.generate.settings import SETTINGS
from dalle2_jax.models.diffusion import sampling
from dalle2_jax.runtime import commandline
from tests import settings_page
from tests.settings_page import flatten

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = "python -m dalle2_jax."


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def module_path(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


# Commands


def commands(text: str) -> list[tuple[list[str], bool]]:
    """(words behind 'python -m', whether it is a whole command) of each command in a page.

    A command in a block of bash is whole, one within a line of text may leave arguments out.
    """
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if COMMAND in line:
                words = shlex.split(line, comments=True)
                if "-m" in words:
                    found.append((words[words.index("-m") + 1 :], True))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for span in re.findall(r"`([^`\n]+)`", prose):
        if span.startswith(COMMAND):
            found.append((shlex.split(span)[2:], False))
    return found


def text_arguments(call: ast.Call, loops: dict[str, list[str]]) -> list[str]:
    """The texts that a call's first argument may be; f"--{role}" in a loop over constants is several."""
    first = call.args[0] if call.args else None
    if isinstance(first, ast.Constant) and isinstance(first.value, str):
        return [first.value]
    if isinstance(first, ast.JoinedStr):
        texts = [""]
        for part in first.values:
            if isinstance(part, ast.Constant):
                texts = [text + part.value for text in texts]
            else:
                texts = [text + value for text in texts for value in loops.get(ast.unparse(part.value), [])]
        return texts
    return []


def constants(node: ast.AST) -> list:
    if isinstance(node, ast.Name):  # one of the samplers' own lists, or the converter's
        return list(getattr(sampling, node.id, ()) or getattr(convert, node.id, ()))
    elements = node.elts if isinstance(node, ast.List | ast.Tuple) else []
    return [element.value for element in elements if isinstance(element, ast.Constant)]


def defined_flags(node: ast.AST) -> dict:
    """Of the code below `node`: {'flags': {name: kind}, 'choices', 'required', 'subcommands'}.

    kind is absl's ('string', 'integer', 'bool', 'config_file', ...), or 'argparse'.
    """
    loops = {
        loop.target.id: constants(loop.iter)
        for loop in ast.walk(node)
        if isinstance(loop, ast.For) and isinstance(loop.target, ast.Name)
    }
    found = {"flags": {}, "choices": {}, "required": set(), "subcommands": set(), "required_by": {}}
    parsers = {
        assigned.targets[0].id: assigned.value
        for assigned in ast.walk(node)
        if isinstance(assigned, ast.Assign) and isinstance(assigned.targets[0], ast.Name)
    }
    if any(isinstance(n, ast.For) and ast.unparse(n.iter) == "SETTINGS.items()" for n in ast.walk(node)):
        kinds = {int: "integer", float: "float"}
        found["flags"] |= {name: kinds.get(setting.kind, "string") for name, setting in SETTINGS.items()}
        chosen = {name: setting.kind for name, setting in SETTINGS.items() if isinstance(setting.kind, tuple)}
        found["choices"] |= chosen
    for call in ast.walk(node):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        name, texts = call.func.attr, text_arguments(call, loops)
        options = {keyword.arg: keyword.value for keyword in call.keywords}
        if name.startswith("DEFINE_"):
            for text in texts:
                found["flags"][text] = name.removeprefix("DEFINE_")
                if name == "DEFINE_enum":
                    found["choices"][text] = constants(call.args[2])
        elif name == "add_argument":
            for text in texts:
                found["flags"][text.removeprefix("--")] = "argparse"
                if "required" in options:
                    found["required"].add(text.removeprefix("--"))
                    made = parsers.get(getattr(call.func.value, "id", ""))
                    if isinstance(made, ast.Call) and getattr(made.func, "attr", "") == "add_parser":
                        aliases = [constants(k.value) for k in made.keywords if k.arg == "aliases"]
                        names = text_arguments(made, loops) + sum(aliases, [])
                        found["required_by"][text.removeprefix("--")] = set(names)
        elif name == "add_parser":
            found["subcommands"].update(texts + constants(options.get("aliases")))
        elif name == "mark_flags_as_required":
            found["required"].update(constants(call.args[0]))
    return found


@functools.cache
def flags_of(module: str) -> dict:
    """`defined_flags` of a command, with those of the functions define_... that it takes from another."""
    path = module_path(module)
    if module == "dalle2_jax.convert":  # its parser of subcommands lies beside `__main__`
        path = path.with_name("convert.py")
    tree = tree_of(path)
    found = defined_flags(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dalle2_jax."):
            names = [alias.name for alias in node.names if alias.name.startswith("define_")]
            for name in names:  # grows by those that these call
                functions = {getattr(f, "name", ""): f for f in tree_of(module_path(node.module)).body}
                calls = (call.func for call in ast.walk(functions[name]) if isinstance(call, ast.Call))
                names += [n for n in (getattr(f, "id", "") for f in calls) if n.startswith("define_")]
                taken = defined_flags(functions[name])
                found["flags"] |= taken["flags"]
                found["choices"] |= taken["choices"]
    return found


@functools.cache
def recipe(where: str) -> dict:
    """The settings of RECIPE[:preset] and the rest of its model and data, flat; ValueError says why none."""
    name, _, preset = where.partition(":")
    path = Path(commandline.recipe_file(name)).resolve()
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    config = module.get_config(preset).to_dict()
    build = importlib.import_module(f"dalle2_jax.models.stages.{config['stage']}").build
    defaults = {
        f"{part}.{name}": parameter.default
        for part, function in (("model", build), ("data", DataSettings))
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return defaults | flatten(config)


def value_problem(value: str, known) -> str:
    """Why a setting's text cannot take the place of the value `known`; '' if it can."""
    try:
        if isinstance(known, bool):
            return "" if value.lower() in ("true", "false") else f"{value!r} is no truth value"
        if isinstance(known, int | float):
            type(known)(value)
        if isinstance(known, tuple):
            ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
        return str(error)
    return ""


def flag_problem(kind: str, value: str | None, choices: list) -> str:
    if kind == "bool":
        return ""
    if value is None:
        return "lacks a value"
    if choices and value not in choices:
        return f"{value!r} is none of {choices}"
    return value_problem(value, {"integer": 0, "float": 0.0}.get(kind, ""))


def problems(words: list[str], whole: bool = True) -> list[str]:
    """What is wrong with the command `python -m WORDS`."""
    module, *arguments = words
    if not module_path(module).is_file():
        return [f"there is no module {module}"]
    known = flags_of(module)
    given, positional, found = {}, [], []
    for word in arguments:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            given[name] = value if equals else None
        elif word != "...":
            positional.append(word)
    settings = {name: value for name, value in given.items() if name.startswith("config.")}
    for name in given.keys() - settings.keys():
        if name not in known["flags"]:
            found.append(f"{module} has no flag --{name}")
            continue
        why = flag_problem(known["flags"][name], given[name], known["choices"].get(name, []))
        found += [f"--{name}: {why}"] if why else []
    if "config" in known["flags"] and "config" in given:
        try:
            recipe(given["config"] or "")
        except ValueError as error:
            return [*found, str(error)]
        for name, value in settings.items():
            setting = name.removeprefix("config.")
            if setting not in recipe(given["config"]):
                found.append(f"{given['config']} has no setting {setting}")
            else:
                why = value_problem(value or "", recipe(given["config"])[setting])
                found += [f"--{name}: {why}"] if why else []
    elif settings and "config" not in known["flags"]:
        found.append(f"{module} has no settings {sorted(settings)}")
    if whole:
        of_others = {
            name
            for name, by in known["required_by"].items()
            if positional and positional[0] in known["subcommands"] - by
        }
        missing = known["required"] - given.keys() - of_others
        found += [f"--{name} is missing" for name in sorted(missing)]
    if known["subcommands"]:
        if positional and positional[0] not in known["subcommands"]:
            found.append(f"{module} has no subcommand {positional[0]}")
    elif positional and module in ("dalle2_jax.train", "dalle2_jax.evaluate", "dalle2_jax.preflight"):
        found.append(f"{module} takes no {positional}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_right(page):
    wrong = [
        f"python -m {' '.join(words)}: {why}"
        for words, whole in commands(page.read_text("utf-8"))
        for why in problems(words, whole)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_package_lists_its_commands():
    done = subprocess.run([sys.executable, "-m", "dalle2_jax"], cwd=ROOT, capture_output=True, text=True)
    listed = re.findall(r"^  (\w+) +\w", done.stdout, re.M)
    package = ROOT / "dalle2_jax"
    mains = {path.parent.name for path in package.glob("*/__main__.py")}
    mains |= {path.stem for path in package.glob("*.py") if "start.run(" in path.read_text("utf-8")}
    assert done.returncode == 0 and listed == list(COMMANDS) and mains == set(COMMANDS)


def test_the_pages_have_commands():
    found = {words[0] for page in PAGES for words, whole in commands(page.read_text("utf-8")) if whole}
    assert found == {f"dalle2_jax.{name}" for name in COMMANDS}
    assert len(commands((ROOT / "README.md").read_text("utf-8"))) >= 8


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("dalle2_jax.paint 'a star'", "no module"),
        ("dalle2_jax.generate 'a star' --nn=4", "no flag --nn"),
        ("dalle2_jax.generate 'a star' --n=four", "invalid literal"),
        ("dalle2_jax.generate 'a star' --out", "lacks a value"),
        ("dalle2_jax.generate 'a star' --method=plms", "none of"),
        ("dalle2_jax.generate 'a star' --metrics=scenes", "no flag --metrics"),
        ("dalle2_jax.evaluate 'a star'", "takes no"),
        ("dalle2_jax.convert workdirs --clip=a --prior=b --decoder=c", "--out is missing"),
        ("dalle2_jax.convert hf-clip a b --dtyp=float32", "no flag --dtyp"),
        ("dalle2_jax.convert openai --clip=a --prior=b --decoder=c --out=d", "no subcommand"),
        ("dalle2_jax.train --config=configs/clip.py", "--workdir is missing"),
        ("dalle2_jax.train --config=configs/klip.py --workdir=d", "no recipe configs/klip.py"),
        ("dalle2_jax.train --config=configs/clip.py:big --workdir=d", "preset 'big' is unknown"),
        ("dalle2_jax.train --config=configs/clip.py --workdir=d --config.data.pth=x", "no setting data.pth"),
        ("dalle2_jax.train --config=configs/clip.py --workdir=d --config.mesh.fsdp=all", "invalid literal"),
    ],
)
def test_the_check_of_commands_finds(command, why):
    found = problems(shlex.split(command))
    assert len(found) == 1 and why in found[0]


def test_commands_are_read_from_blocks_and_lines():
    text = f"Run `{COMMAND}train`.\n```bash\nX=1 {COMMAND}generate 'a b' \\\n    --n=2  # two\n```\n"
    assert commands(text) == [(["dalle2_jax.generate", "a b", "--n=2"], True), (["dalle2_jax.train"], False)]
    assert flags_of("dalle2_jax.evaluate")["flags"]["upsampler_steps"] == "string"  # taken from generate


def test_settings_named_in_the_text_exist():
    names = set()
    for known in commandline.recipes():
        names |= {".".join(name.split(".")[:end]) for name in recipe(known) for end in range(1, 5)}
    for page in PAGES:
        named = set(re.findall(r"--config\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)", page.read_text("utf-8")))
        named -= {"a.b"}  # stands for any
        named = {name for name in named if not name.startswith("frozen.")}  # names are the user's
        assert named <= names, f"{page.name}: {sorted(named - names)}"


def test_readme_names_the_two_commands():
    text = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    assert "bash launch/quickstart.sh" in blocks[0] and "bash launch/test.sh" in blocks[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_and_extras_exist(page):
    text = page.read_text("utf-8")
    for script in re.findall(r"launch/[\w.-]+\.sh", text):
        assert (ROOT / script).is_file(), script
    setup = tree_of(ROOT / "setup.py")
    extras = next(
        ast.literal_eval(node.value)
        for node in setup.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "EXTRAS"
    )
    for group in re.findall(r"(?:EXTRAS=|\.\[|dalle2_jax\[)([a-z,]+)", text):
        assert set(group.split(",")) <= {*extras, "dev"}, group


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not re.match(r"[a-z]+:", target):
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(path.read_text("utf-8")), f"{page.name} links to {target}"


def there_already(items: list[str]) -> list[str]:
    """Those of some items, said to be missing, that name what a command or the launchers do.

    What an item claims ends at its first full stop, colon or bracket; the rest may say what there is instead.
    """
    package = ROOT / "dalle2_jax"
    mains = [path.stem for path in package.glob("*.py") if "start.run(" in path.read_text("utf-8")]
    mains += [path.parent.name for path in package.glob("*/__main__.py")]
    names = "|".join(name.removesuffix("e") for name in ["launch", *mains])
    return [x for x in items if re.search(rf"\b({names})", re.split(r"[.:(]", x)[0], re.I)]


def test_what_the_readme_says_is_missing_is_missing():
    section = (ROOT / "README.md").read_text("utf-8").partition("## What is not there yet\n")[2]
    items = re.findall(r"^- (.*)", section.partition("\n## ")[0], re.M)
    assert len(items) > 2 and not there_already(items)
    there = ["A command that writes embeddings.", "Launchers for pods", "Evaluating by several", "To Edit"]
    assert there_already([*there, "Weights (docs/training.md)", "Pods: launched by hand"]) == there


# Settings


def test_settings_are_documented():
    """Each setting of a config with its default: see `settings_page`."""
    text = settings_page.PAGE.read_text("utf-8")
    assert settings_page.updated(text, settings_page.sources()) == text, "python -m tests.settings_page"
    tables = [settings_page.read(match[0])[1] for match in settings_page.TABLE.finditer(text)]
    nameless = [name for rows in tables for name, meaning in rows.items() if not meaning]
    assert len(tables) > 4 and not nameless, f"docs/training.md says no meaning of {nameless}"


def test_the_check_of_settings_finds():
    page = (
        "| setting | a | b | |\n|---|---|---|---|\n| `x` | `1` | | in a |\n| `old` | `1` | | gone |\n\nText\n"
    )
    found = {"a": {"x": "2", "z": "'|'"}, "b": {"y": "required"}}
    assert settings_page.updated(page, found).splitlines()[2:] == [
        "| `x` | `2` | | in a |",
        "| `z` | `'|'` | | |",
        "| `y` | | required | |",
        "",
        "Text",
    ]
    with pytest.raises(ValueError, match="no table of settings has a column 'c'"):
        settings_page.updated(page, {"c": {}})
    assert {
        "batch_size",
        "mesh.fsdp",
        "optim.eps",
        "data.group",
        "data.random_crop",
    } <= settings_page.of_config().keys()
    assert settings_page.of_stage("clip")["embed_dim"] == "required"
    assert value_problem("1.5", 3) and value_problem("(1", (1,)) and value_problem("yes", True)
    assert not value_problem("1.5", 3.0) and not value_problem("$DATA", "")


def test_flags_of_generate_are_documented():
    text = (ROOT / "docs/models.md").read_text("utf-8")
    rows = re.findall(r"^\| ((?:`--\w+`(?:, )?)+) \|", text, re.M)
    documented = {name for row in rows for name in re.findall(r"--(\w+)", row)}
    assert documented == flags_of("dalle2_jax.generate")["flags"].keys()


def test_the_bundled_model_is_documented():
    text = (ROOT / "docs/models.md").read_text("utf-8")
    section = text.partition("## The bundled model\n")[2].partition("\n## ")[0]
    folder = ROOT / "dalle2_jax/bundled/scenes"
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    assert json.dumps(index["trained_steps"]) in text
    model = {s: json.loads((folder / s / "config.json").read_text())["model"] for s in index["trained_steps"]}
    said = ["{num_steps} steps, {num_candidates} candidates".format(**model["prior"])]
    said += ["{num_steps} DDIM steps, guidance {guidance_scale:g}".format(**model["decoder"])]
    for upsampler in ("upsampler64", "upsampler256"):
        said += ["{low_res_size} to {image_size}, {num_steps} DDIM steps".format(**model[upsampler])]
    size = sum(path.stat().st_size for path in folder.glob("*/model.safetensors"))
    said += [f"{size / 2e6:.1f} million parameters, {size / 1e6:.1f} MB"]
    assert not [words for words in said if words not in section.replace("\n", " ")]


def test_settings_that_may_differ_on_resume_are_documented():
    text = (ROOT / "docs/training.md").read_text("utf-8")
    listed = re.search(r"Settings that may differ: (.*?)\. Any", text, re.S)[1]
    assigned = next(
        node.value
        for node in tree_of(ROOT / "dalle2_jax/train/resume.py").body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FREE"
    )
    assert re.findall(r"`([\w.]+)`", listed) == constants(assigned)


def test_reasons_of_bad_records_are_documented():
    code = "".join(path.read_text("utf-8") for path in (ROOT / "dalle2_jax/data").glob("*.py"))
    reasons = set(re.findall(r'BadRecord\(\s*"(\w+)"|\bnote\("(\w+)"', code))
    reasons = {name for match in reasons for name in match if name} | damage.KINDS.keys()
    assert len(reasons) > 15
    section = (ROOT / "docs/data.md").read_text("utf-8").partition("## Bad records")[2].partition("\n## ")[0]
    documented = {
        name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)
    }
    assert documented == reasons


# The house


def tree(text: str) -> list[str]:
    """The paths of a tree: two spaces a level, folders end with a slash, commas join the files of a line."""
    paths, folders = [], []
    for line in text.splitlines():
        indent, names = re.match(r"( *)((?:[\w./-]+, )*[\w./-]+)", line).groups()
        folders = folders[: len(indent) // 2]
        paths += ["".join(folders) + name for name in names.split(", ")]
        folders += [names] if names.endswith("/") else []
    return paths


def test_the_tree_of_the_design_is_the_repositorys():
    """Every path of the tree and of the text exists, and every folder of the package is in the tree."""
    text = (ROOT / "docs/design.md").read_text("utf-8")
    paths = tree(re.search(r"^```\n(dalle2_jax/\n.*?)^```", text, re.M | re.S)[1])
    assert len(paths) > 60 and not [path for path in paths if not (ROOT / path).exists()]
    folders = {path.parent.relative_to(ROOT).as_posix() + "/" for path in (ROOT / "dalle2_jax").rglob("*.py")}
    assert len(folders) > 15 and not folders - set(paths)
    named = [name for name in re.findall(r"`((?:\w+/)+\w+\.py)`", text) if "foo" not in name]
    assert len(named) > 20
    tops = ("", "dalle2_jax", "dalle2_jax/models")
    assert not [name for name in named if not any((ROOT / top / name).exists() for top in tops)]


def test_every_module_says_what_it_is_for():
    """The tree names the files that matter; the first line of each file says the rest."""
    package = ROOT / "dalle2_jax"
    nameless = [str(path) for path in package.rglob("*.py") if not ast.get_docstring(tree_of(path))]
    assert not nameless


def test_trees_are_read():
    assert tree("a/  the top\n  b.py, c.py  two\n  d/\n    e.py  deep\n  f.py\ng/\n") == [
        *("a/", "a/b.py", "a/c.py", "a/d/", "a/d/e.py", "a/f.py", "g/")
    ]


def test_the_tests_that_reliability_names_exist():
    text = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    named = re.findall(r'\]\(\.\./(tests/\S+\.py) "(\w+)"\)', text)
    assert len(named) > 200 and text.count("](../tests/") == len(named) and "::" not in text
    missing = [f"{f}::{name}" for f, name in named if f"def {name}(" not in (ROOT / f).read_text()]
    assert not missing


def test_reliability_lists_every_fault():
    text = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    rows = re.findall(r"^\| (R\d\d[R\d, ]*) \|.*\| (.*) \|$", text, re.M)
    rows = [row for row in rows if "../tests/" in row[1]]
    tested = {number for numbers, _ in rows for number in numbers.split(", ")}
    untested = set(re.findall(r"R\d\d", text.partition("## Without a test yet")[2]))
    assert tested | untested == {f"R{i:02d}" for i in range(1, 46)}
