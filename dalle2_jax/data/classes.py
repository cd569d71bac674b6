"""The classes of a dataset: their names, and the class that each label of its source stands for."""

from collections.abc import Sequence

import numpy as np

from dalle2_jax.data.records import RecordSource

_SHOWN = 5  # names in a message


def names(source: RecordSource, given: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """The names of the classes of batches.

    given: `data.classes`, else those of the source, else numbers. num_classes: of the stage, 0 for any.

    Raises ValueError, with a remedy: the records have no label and nothing is given, or the labels do not fit
    the names or the stage.
    """
    own, count = tuple(source.classes), source.num_classes
    if not count and len(set(given)) < 2:
        raise ValueError(
            "field label needs data.classes, two or more names that captions hold, or records with labels: "
            "folders by class (data.source=folder), a label in tfds, KEY.cls in tar shards. A stage without "
            "classes has model.num_classes=0"
        )
    found = tuple(given) or own or tuple(map(str, range(max(num_classes, count))))
    unknown = [name for name in own if name not in found]
    if 0 < len(unknown) < len(own):
        raise ValueError(
            f"the data have classes that training, or data.classes, does not name: {_shown(unknown)}. Name "
            "them, or remove them"
        )
    if len(found) < count or (unknown and len(found) != count):
        what = f"the classes {_shown(own)}" if own else f"the label {count - 1}"
        raise ValueError(f"the data have {what}, data.classes has {len(found)} names: give {count}, or none")
    if num_classes and len(found) != num_classes:
        raise ValueError(
            f"the data have {len(found)} classes ({_shown(found)}), model.num_classes is {num_classes}: set "
            f"--config.model.num_classes={len(found)}"
        )
    if len(found) < 2:
        raise ValueError(f"the data have one class ({_shown(found)}), and field label needs two or more")
    return found


def of_labels(source: RecordSource, found: Sequence[str]) -> np.ndarray | None:
    """The class int32 of each label of the source among the `names`; None: its records have no label.

    The source's own names decide. Where `found` has none of them, it renames the labels 0, 1, ...
    """
    if not source.num_classes:
        return None
    numbers = {name: number for number, name in reversed(list(enumerate(found)))}
    by_name = bool(source.classes) and all(name in numbers for name in source.classes)
    labels = [numbers[name] for name in source.classes] if by_name else range(source.num_classes)
    return np.array(labels, np.int32)


def _shown(given: Sequence[str]) -> str:
    return ", ".join(map(repr, given[:_SHOWN])) + (", ..." if len(given) > _SHOWN else "")
