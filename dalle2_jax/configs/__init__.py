"""The recipes. A wheel has them in this folder; in a clone they are in `configs/` beside the package."""

from pathlib import Path

if not Path(__file__).with_name("common.py").exists():
    __path__ = [str(Path(__file__).resolve().parents[2] / "configs")]
