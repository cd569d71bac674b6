"""docs/notebooks: their cells run from top to bottom, and are stored without outputs."""

import ast
import json
from pathlib import Path

import pytest

from dalle2_jax.edit import actions
from dalle2_jax.generate.result import Result
from dalle2_jax.runtime import hub
from tests.tiny_model import make_model

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
NOTEBOOKS = {path.stem: path for path in FOLDER.glob("*.ipynb")}


def cells(name: str) -> list[str]:
    """The code cells of a notebook."""
    found = json.loads(NOTEBOOKS[name].read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def run(name: str, replaced: dict[str, str] | None = None) -> list:
    """Runs the code cells; returns what a notebook would show: the value of each cell that ends in one."""
    namespace, shown = {}, []
    for source in cells(name):
        for old, new in (replaced or {}).items():
            source = source.replace(old, new)
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{name}.ipynb", "exec"), namespace)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), f"{name}.ipynb", "eval"), namespace))
    return shown


def test_notebooks_are_stored_without_outputs():
    assert NOTEBOOKS.keys() == {"draw", "train"}
    for path in NOTEBOOKS.values():
        found = json.loads(path.read_text("utf-8"))["cells"]
        assert all(not cell["outputs"] and not cell["execution_count"] for cell in found if "outputs" in cell)


def test_the_notebook_of_drawing(tmp_path, monkeypatch):
    """With a tiny model in the place of the bundled one, and programs that other tests compile too."""
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "packaged" / "scenes")
    monkeypatch.setattr(hub, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(actions, "INVERSION_STEPS", 6)
    monkeypatch.setattr(actions, "RESAMPLE", 2)
    shown = run("draw")
    assert [len(result.images) for result in shown] == [4, 4, 4, 4, 4]
    assert all(result._repr_png_() for result in shown)
    assert (tmp_path / "pictures" / "grid.png").exists()


@pytest.mark.slow
def test_the_notebook_of_training(tmp_path, monkeypatch):
    """Two steps instead of hundreds."""
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    grid, drawn = run("train", {"= 300, 100": "= 2, 2; config.optim.warmup_steps = 0"})
    assert min(grid.size) > 512 and (tmp_path / "run/samples/samples_00000002.png").exists()
    assert isinstance(drawn, Result) and drawn.images.shape == (4, 16, 16, 3)
    assert (tmp_path / "run" / "metrics.jsonl").exists()
