"""The traps that implementations of DALL-E 2 and its family fall into, and the tests that catch them.

Each of tests/traps.toml is planted by replacing a piece of the code in a copy of the repository; the test
named beside it must then fail:

    python tests/traps.py [NUMBER ...]

tests/test_traps.py checks with every run that the pieces are still there, and plants two of them.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("dalle2_jax", "configs", "tests", "pyproject.toml", "setup.py")


@dataclasses.dataclass(frozen=True)
class Trap:
    """What goes wrong, the test that notices, and the replacement of `right` by `wrong` that plants it."""

    number: int
    what: str
    test: str
    file: str
    right: str
    wrong: str


TABLE = tomllib.loads((ROOT / "tests" / "traps.toml").read_text("utf-8"))
TRAPS = tuple(Trap(**row) for row in TABLE["trap"])


def missing() -> list[str]:
    """The traps that could not be planted, as the code that they replace is not there exactly once."""
    lines = []
    for trap in TRAPS:
        count = (ROOT / trap.file).read_text("utf-8").count(trap.right)
        if count != 1:
            lines.append(f"trap {trap.number}: {trap.file} holds {trap.right!r} {count} times")
    return lines


def run(trap: Trap) -> subprocess.CompletedProcess:
    """The trap's test, run by pytest in a copy of the repository in which the trap is planted."""
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder) / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
                shutil.copytree(source, target, ignore=ignored)
            elif source.exists():
                shutil.copy(source, target)
        path = Path(folder) / trap.file
        path.write_text(path.read_text("utf-8").replace(trap.right, trap.wrong), "utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", trap.test]
        environment = os.environ | {"PYTHONPATH": folder}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def caught(trap: Trap) -> bool:
    """Whether a test failed; a collection that broke, or found nothing, counts as nothing."""
    result = run(trap)
    return result.returncode == 1 and " failed" in result.stdout


def main() -> int:
    chosen = {int(number) for number in sys.argv[1:]}
    problems = missing()
    for trap in TRAPS:
        if chosen and trap.number not in chosen:
            continue
        found = caught(trap)
        print(
            f"{trap.number:2d} {'caught' if found else 'NOT CAUGHT':10s} {trap.what}: {trap.test}", flush=True
        )
        if not found:
            problems.append(f"trap {trap.number}")
    print("\n".join(problems))
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
