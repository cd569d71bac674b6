"""The table of traps is true of the code, and planting works."""

import pytest

from tests import traps


def test_every_trap_could_be_planted():
    assert not traps.missing()


@pytest.mark.parametrize("trap", traps.TRAPS, ids=lambda trap: str(trap.number))
def test_the_test_of_a_trap_exists(trap):
    path, _, name = trap.test.partition("::")
    assert f"\ndef {name}(" in (traps.ROOT / path).read_text("utf-8")


@pytest.mark.parametrize("number", [3, 4])
def test_a_planted_trap_is_caught(number):
    """All of them: python tests/traps.py (which takes minutes)."""
    assert traps.caught(next(trap for trap in traps.TRAPS if trap.number == number))
