"""The model card of the bundled model: `python -m tests.bundled_card` writes it from the model's files.

`convert workdirs` writes the same card when the model is trained again.
"""

from pathlib import Path

from dalle2_jax.convert.card import model_card
from dalle2_jax.runtime import modeldir

MODEL = Path(__file__).resolve().parents[1] / "dalle2_jax/bundled/scenes"
CARD = MODEL / modeldir.CARD_FILE


def text() -> str:
    """The card."""
    index = modeldir.read_index(MODEL)
    return model_card(index, {name: modeldir.load_stage(MODEL / name) for name in index["stages"]})


if __name__ == "__main__":
    CARD.write_text(text(), "utf-8")
