"""The site of docs/: `python -m sphinx -W docs site`, with the packages of `pip install -e '.[docs]'`.

`reference.py` beside this file writes the pages of docs/reference from the code at each build; git ignores
them and the site.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import reference  # noqa: E402

import dalle2_jax  # noqa: E402

project, release = "dalle2_jax", dalle2_jax.__version__
copyright = "the authors of dalle2_jax, Apache-2.0"
extensions = ["myst_parser"]
root_doc = "index"
myst_heading_anchors = 4  # links to headings, with the anchors of code hosts
html_theme = "furo"
html_title = "dalle2_jax"
html_show_sourcelink = False
HOME = re.search(r'^HOME = "(.+?)"', (ROOT / "setup.py").read_text("utf-8"), re.M)[1]
# The menu: title of a part -> its pages
PARTS = {
    "Draw": ["editing", "studio", "models"],
    "Train": ["training", "data", "emoji", "systems", "quickstart"],
    "At scale": ["scaling", "launching", "reliability", "performance"],
    "Evaluate": ["evaluation", "paper"],
    "Extend": ["design", "reference/parts"],
    "Reference": [f"reference/{name}" for name in ("library", "edits", "commands", "settings", "recipes")],
}


def adapt(app, name: str, source: list[str]) -> None:
    """Links to files outside of docs/ lead to the repository. The first page gets the menu.

    On the page itself code hosts would show the menu's directives as text.
    """
    if not name.startswith("reference/"):
        source[0] = source[0].replace("](../", f"]({HOME}/blob/main/")
    if name == root_doc:
        for title, pages in PARTS.items():
            source[0] += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {title}", *pages, "```\n"])


def setup(app) -> None:
    """What the build calls."""
    app.connect("builder-inited", lambda app: reference.write(Path(app.srcdir) / "reference"))
    app.connect("source-read", adapt)
