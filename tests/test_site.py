"""The site of docs/: it builds without a warning, and its reference has what the code has."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dalle2_jax.__main__ import COMMANDS
from dalle2_jax.convert.convert import FORMATS
from dalle2_jax.generate.settings import SETTINGS
from dalle2_jax.runtime import commandline
from tests import settings_page
from tests.test_docs import flags_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import reference

    return reference


def test_every_setting_and_recipe_is_in_the_reference(reference):
    page = reference.settings()
    found = {name for columns in settings_page.sources().values() for name in columns} | SETTINGS.keys()
    assert len(found) > 100
    assert not [name for name in found if not re.search(rf"^\| `(model\.)?{re.escape(name)}` \|", page, re.M)]
    assert not re.findall(r"\| *\|$", page, re.M), "a setting without a meaning"
    assert not [name for name in commandline.recipes() if f"| `{name}` |" not in reference.recipes()]


def test_docstrings_become_markdown(reference):
    class Canvas:
        """A canvas.

        Args:
          size: pixels of a side;
            even.
        """

        def __init__(self, size: int = 4, *, fill: Path | None = None):
            pass

        @property
        def area(self) -> int:
            """Pixels."""
            return 16

    page = "\n\n".join(reference.described("a.b.Canvas", Canvas, "##"))
    assert "## `a.b.Canvas`\n\n```python\nCanvas(size: int = 4, *, fill: Path | None = None)\n```" in page
    assert "**Args**\n\n- `size`: pixels of a side;\n  even." in page
    assert "### `Canvas.area`\n\n```python\narea -> int\n```\n\nPixels." in page


def test_the_site_builds_without_warnings(tmp_path):
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason="pip install -e '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = (tmp_path / "index.html").read_text("utf-8")
    for page in [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/reference").glob("*.md")]:
        html = page.relative_to(ROOT / "docs").with_suffix(".html")
        assert (tmp_path / html).is_file() and (page.stem == "index" or f'href="{html}"' in first), page
    assert "/blob/main/CONTRIBUTING.md" in first  # a file outside of docs/
    page = (ROOT / "docs/reference/commands.md").read_text("utf-8")
    for name in COMMANDS:
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        flags = {flag for flag, kind in flags_of(f"dalle2_jax.{name}")["flags"].items() if kind != "argparse"}
        assert section and not [f for f in flags if not re.search(rf"--(\[no\])?{f}\b", section)], name
    assert not [name for name in FORMATS if f"\n## convert {name}\n" not in page]
    library = (tmp_path / "reference/library.html").read_text("utf-8")
    assert "dalle2_jax.load" in library and "Result.save" in library
