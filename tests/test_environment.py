"""launch/env.sh and .ci/run: the Python that they take, and the environment that they make or leave.

The machines are folders of stand-ins. A stand-in for Python passes the script's own question on to a real
one, which it tells another version. Nothing is downloaded.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASH = shutil.which("bash")
TOOLS = "awk bash cat cksum cp dirname env grep ls mkdir mktemp rm sed sort touch tr".split()
BARE = "sys.modules['ensurepip'] = None"  # as on Debian without the package python3-venv
PYPY = "sys.implementation.name = 'pypy'"
UV = """
case "$*" in
  "python install 3.13") [ -z "${OFFLINE:-}" ] || { echo "cannot reach the server" >&2; exit 1; } ;;
  "python find --system 3.13") echo "$UV_PYTHON_PREFERENCE" >> "$NOTES"; echo "$MANAGED" ;;
esac
"""

if BASH is None:
    pytest.skip("the scripts are for bash", allow_module_level=True)


def program(path: Path, lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!{BASH}\necho "{path.name} $*" >> "$NOTES"\n{lines}\n')
    path.chmod(0o755)
    return path


def python(path: Path, version: tuple[int, int], change: str = "", pip: bool = False) -> Path:
    """A stand-in for a Python of this version; `change` is Python code that changes what it says of itself.

    An environment that it makes is a folder with a copy of it, whose pip installs the stand-in for uv.
    """
    told = f"import sys; sys.version_info = {(*version, 0)}; {change or 'pass'}; exec(sys.argv[1])"
    return program(
        path,
        f"""
case "$*" in
  -c*) exec {sys.executable} -I -S -c "{told}" "$2" ;;
  --version) echo "Python {version[0]}.{version[1]}.0" ;;
  "-m venv "*)
    [ -z "{change}" ] || exit 1
    place="${{@: -1}}"
    mkdir -p "$place/bin"
    cp "$0" "$place/bin/python"
    touch "$place/pyvenv.cfg" "$place/has-pip" ;;
  "-m ensurepip") touch "$(dirname "$0")/../has-pip" ;;
  "-m pip --version") [ -e "$(dirname "$0")/../has-pip" ] || {"true" if pip else "false"} ;;
  "-m pip install "*--target*) mkdir -p "${{@: -2:1}}/bin"; cp "$WHERE/uv" "${{@: -2:1}}/bin/uv" ;;
  "-m pip install "*) cp "$WHERE/uv" "$(dirname "$0")/uv" ;;
esac""",
    )


class Machine:
    """A machine on which nothing is in PATH but a few tools and what a test puts into the folder `bin`."""

    def __init__(self, where: Path):
        self.where, self.bin, self.venv = where, where / "bin", where / "venv"
        self.managed = python(where / "uv-pythons" / "python3.13", (3, 13))
        for folder in ("bin", "scratch"):
            (where / folder).mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        program(where / "uv", UV)  # in PATH only where a test copies it there
        self.variables = dict(
            PATH=str(self.bin),
            HOME=str(where / "home"),
            TMPDIR=str(where / "scratch"),
            DALLE2_JAX_VENV=str(self.venv),
            NOTES=str(where / "notes.txt"),
            WHERE=str(where),
            MANAGED=str(self.managed),
        )

    def run(self, lines: str, **variables: str) -> subprocess.CompletedProcess:
        """What bash says to these lines behind `source launch/env.sh`."""
        script = f"set -euo pipefail; source launch/env.sh; {lines}"
        command = [BASH, "-c", script]
        environment = self.variables | variables
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)

    def notes(self) -> list[str]:
        path = self.where / "notes.txt"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_what_a_python_says_of_itself(machine):
    version = "{}.{}".format(*sys.version_info[:2])
    said = machine.run(f'about "{sys.executable}"').stdout.split()
    assert said == [version, "new" if sys.version_info >= (3, 14) else "fits"]
    for version, change, state in (
        ((3, 10), BARE, "old"),
        ((3, 11), "", "fits"),
        ((3, 13), "", "fits"),
        ((3, 13), BARE, "bare"),
        ((3, 13), PYPY, "odd"),
        ((3, 14), "", "new"),
    ):
        path = python(machine.where / "asked", version, change)
        assert machine.run(f'about "{path}"').stdout == f"{version[0]}.{version[1]} {state}\n"


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        ({"python3": (3, 11), "python3.12": (3, 12), "python3.13": (3, 13)}, "python3.13"),
        ({"python3": (3, 12), "python3.11": (3, 11)}, "python3"),
        ({"python3": (3, 14), "python": (3, 9), "python3.11": (3, 11)}, "python3.11"),
        ({"python3.13": (3, 13, BARE), "python3.12": (3, 12, PYPY), "python3": (3, 11)}, "python3"),
    ],
)
def test_the_newest_python_that_fits_is_taken(machine, there, taken):
    for name, (major, minor, *change) in there.items():
        python(machine.bin / name, (major, minor), *change)
    said = machine.run("find_python")
    assert said.stdout == f"{machine.bin / taken}\n", said.stderr


@pytest.mark.parametrize("root", ["home/.pyenv", "elsewhere"])
def test_a_python_of_pyenv_is_found_behind_a_shim_that_answers_nothing(machine, root):
    program(machine.bin / "python3.13", "exit 127")
    python(machine.bin / "python3", (3, 11))
    path = python(machine.where / root / "versions" / "3.13.0" / "bin" / "python3", (3, 13))
    variables = {} if root.startswith("home") else dict(PYENV_ROOT=str(machine.where / root))
    assert machine.run("find_python", **variables).stdout == f"{path}\n"


@pytest.mark.parametrize("there", [None, (3, 14), (3, 10)])
def test_uv_of_the_path_brings_a_python_where_none_fits(machine, there):
    if there:
        python(machine.bin / "python3", there)
    shutil.copy(machine.where / "uv", machine.bin)
    said = machine.run("find_python")
    assert said.stdout == f"{machine.managed}\n" and "uv downloads 3.13" in said.stderr
    calls = [line for line in machine.notes() if line.startswith("uv ")]
    assert calls == ["uv python install 3.13", "uv python find --system 3.13"]
    assert "only-managed" in machine.notes()  # else uv may stumble over somebody's shim


@pytest.mark.parametrize(("change", "pip"), [("", False), (BARE, True)])
def test_uv_of_a_throw_away_environment_brings_a_python(machine, change, pip):
    """Of an environment of the Python that does not fit, or of its pip where it can make none."""
    python(machine.bin / "python3", (3, 14), change, pip)
    said = machine.run("find_python")
    assert said.stdout == f"{machine.managed}\n", said.stderr
    assert ("--target" in "".join(machine.notes())) == pip
    assert not any((machine.where / "scratch").iterdir())


@pytest.mark.parametrize(
    ("there", "change", "parts"),
    [
        (None, "", ["no Python here can install uv"]),
        ((3, 13), BARE, ["is Python 3.13", "apt-get install python3.13-venv"]),
        ((3, 14), "", ["cannot reach the server", "is Python 3.14", "python3 takes it all the same"]),
        ((3, 9), "", ["is Python 3.9: too old"]),
        ((3, 12), PYPY, ["is Python 3.12: PyPy"]),
    ],
)
def test_where_no_python_fits_and_uv_brings_none_the_error_says_what_to_do(machine, there, change, parts):
    if there:
        python(machine.bin / "python3", there, change)
    said = machine.run("prepare train", OFFLINE="yes", FAIL_STATUS="5")
    assert said.returncode == 5 and not machine.venv.exists()
    for part in [*parts, "found no Python 3.11 to 3.13", "name one with PYTHON=/path/to/python"]:
        assert part in said.stderr
    assert not any((machine.where / "scratch").iterdir())


@pytest.mark.parametrize(
    ("version", "change", "part"),
    [
        ((3, 14), "", ""),
        ((3, 10), "", "is Python 3.10, too old"),
        ((3, 13), BARE, "apt-get install python3.13-venv"),
        (None, "", "does not run"),
    ],
)
def test_the_python_that_is_named_is_taken_or_refused_with_the_reason(machine, version, change, part):
    python(machine.bin / "python3.13", (3, 13))
    named = machine.where / "named"
    if version:
        python(named, version, change)
    said = machine.run("find_python", PYTHON=str(named))
    assert said.returncode == bool(part) and part in said.stderr
    if not part:
        assert said.stdout == f"{named}\n" and "data is read without TensorFlow" in said.stderr


def test_an_environment_that_is_there_stays(machine):
    newest = python(machine.bin / "python3.13", (3, 13))
    python(machine.where / "python3.11", (3, 11))
    made = machine.run("make_venv", PYTHON=str(machine.where / "python3.11"))
    assert "with Python 3.11.0" in made.stdout
    for named in {}, dict(PYTHON=str(newest)):
        said = machine.run('make_venv; about "$VENV/bin/python"', **named)
        assert said.stdout == "3.11 fits\n"
        assert ("3.11, and stays" in said.stderr) == bool(named)


def test_an_environment_without_pip_gets_it_and_stays(machine):
    """As uv makes them."""
    python(machine.bin / "python3.13", (3, 13))
    python(machine.venv / "bin" / "python", (3, 12))
    said = machine.run('make_venv; about "$VENV/bin/python"')
    assert said.stdout == "3.12 fits\n" and "python -m ensurepip" in machine.notes()


def test_an_environment_whose_python_is_gone_is_made_anew(machine):
    """A new release of the system has another Python; what was installed for the old one is no use then."""
    python(machine.bin / "python3.13", (3, 13))
    (machine.venv / "bin").mkdir(parents=True)
    (machine.venv / "bin" / "python").symlink_to(machine.where / "python3.11")
    (machine.venv / "pyvenv.cfg").touch()
    machine.run("make_venv")
    assert f"python3.13 -m venv --clear {machine.venv}" in machine.notes()


# Continuous integration


def parts(machine: Machine, **variables: str) -> tuple[int, list[list[str]], str]:
    """(status, [[PYTHON, EXTRAS, environment, arguments] of each part], output) of .ci/run.

    launch/test.sh is a stand-in.
    """
    repository = machine.where / "repository"
    for name in (".ci/run", "launch/env.sh"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, repository / name)
    (repository / "tests").mkdir()
    (repository / "tests" / "test_a.py").write_text('torch = pytest.importorskip("torch", reason="")\n')
    (repository / "tests" / "test_b.py").write_text('pytest.importorskip("scipy", reason="")\n')
    program(
        repository / "launch" / "test.sh",
        'echo "part|$PYTHON|$EXTRAS|$DALLE2_JAX_VENV|$*"\ncase "$EXTRAS" in $FAILS) exit 7 ;; esac',
    )
    environment = machine.variables | dict(FAILS="none") | variables
    command = [BASH, str(repository / ".ci" / "run"), "-x"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    found = [line.split("|")[1:] for line in said.stdout.splitlines() if line.startswith("part|")]
    return said.returncode, found, said.stdout + said.stderr


@pytest.mark.parametrize("fails", ["none", "studio,browser,docs", "oracle"])
def test_the_suite_runs_on_the_newest_python_and_the_comparisons_on_the_oldest(machine, fails):
    oldest = python(machine.bin / "python3", (3, 11))
    newest = python(machine.where / "home/.pyenv/versions/3.13.0/bin/python3", (3, 13))
    status, (suite, comparisons), _ = parts(machine, FAILS=fails)
    assert bool(status) == (fails != "none")
    assert suite == [str(newest), "studio,browser,docs", str(machine.venv), "-x"]
    assert comparisons[:3] == [str(oldest), "oracle", f"{machine.venv}-oracle"]
    selected = comparisons[3].split()
    assert selected[0] == "-x" and "tests/test_a.py" in selected and "tests/test_b.py" not in selected
    for path in selected[1:]:
        assert path == "tests/test_a.py" or (ROOT / path).exists()


@pytest.mark.parametrize(
    ("version", "extras", "part"),
    [((3, 11), "oracle,studio,browser,docs", ""), ((3, 13), "studio,browser,docs", "no Python 3.11 here")],
)
def test_where_one_python_is_there_all_runs_on_it(machine, version, extras, part):
    only = python(machine.bin / "python3", version)
    status, (run,), output = parts(machine)
    assert status == 0 and run[:2] == [str(only), extras] and part in output


def test_an_environment_of_another_python_is_left_to_its_owner(machine):
    python(machine.venv / "bin" / "python", (3, 11))
    python(machine.bin / "python3", (3, 13))
    _, (run,), _ = parts(machine)
    assert run[2] == f"{machine.venv}-3.13"
