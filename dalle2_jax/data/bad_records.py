"""The budget of bad records of a dataset: their counts by reason, and the limit."""

import collections
import threading
from collections.abc import Mapping
from typing import NoReturn

from absl import logging

from dalle2_jax.data.records import BadRecord

BAD_SLACK = 8  # bad records allowed beyond the fraction, because small counts vary
_KEPT_BAD = 100


class TooManyBadRecords(RuntimeError):
    """The share of unusable records is above data.max_bad_fraction."""


class BadRecords:
    """Counts unusable records by reason and raises TooManyBadRecords; thread-safe.

    The run stops when more than BAD_SLACK + max_fraction * (records read) are bad, or one if max_fraction is
    0. Each record counts once.
    """

    def __init__(
        self,
        num_records: int,
        max_fraction: float,
        refused: Mapping[str, int],
        passed: Mapping[str, int] | None = None,
        examples: Mapping[str, str] | None = None,
    ):
        """refused, passed, examples: of `records.RecordSource`."""
        self._lock = threading.Lock()
        self._num_records, self._max_fraction = num_records, max_fraction
        self._slack = BAD_SLACK if max_fraction > 0 else 0
        self._reasons: dict[int, str] = {}  # of each bad record
        self._refused = dict(refused)
        self._noted, self._examples = collections.Counter(passed or {}), examples or {}
        self._read = 0
        self._stopped = ""  # why, once the run has to stop
        self.kept: list[dict] = []  # the first bad records: index, key, reason, detail
        lost = sum(refused.values())
        if lost > self._slack + max_fraction * (num_records + lost):
            self._stop(lost, num_records + lost, "of the dataset's files")

    def reason(self, index: int) -> str | None:
        """The reason of record `index` if it is bad, else None."""
        return self._reasons.get(index)

    def add(self, index: int, key: str, error: BadRecord) -> None:
        """Count record `index` once. Raises TooManyBadRecords above the budget, from then on in every
        thread."""
        with self._lock:
            if self._stopped:
                raise TooManyBadRecords(self._stopped)
            if index not in self._reasons:
                self._reasons[index] = error.reason
                logging.log_first_n(logging.WARNING, "bad record %s: %s", 20, key, error)
                if len(self.kept) < _KEPT_BAD:
                    self.kept.append(dict(index=index, key=key, reason=error.reason, detail=error.detail))
            bad = len(self._reasons)
            read = max(min(self._read, self._num_records), bad)
            if bad > self._slack + self._max_fraction * read:
                self._stop(bad, read, "read")

    def note(self, reason: str) -> None:
        """Count a flaw of a usable record."""
        with self._lock:
            self._noted[reason] += 1

    def count_read(self) -> None:
        """Count a record read, good or bad."""
        with self._lock:
            self._read += 1

    def _stop(self, bad: int, count: int, what: str) -> NoReturn:
        read = [f"{item['key']} ({item['reason']} {item['detail']})" for item in self.kept]
        lost = [
            f"{self._examples[reason]} ({reason})" for reason in self._refused if reason in self._examples
        ]
        examples = "; ".join((read or lost)[:5])
        self._stopped = (
            f"{bad} of {count} records {what} cannot be used, above data.max_bad_fraction="
            f"{self._max_fraction}: {self.counts()}. {examples}{'. ' if examples else ''}"
            "Mend the dataset, or raise data.max_bad_fraction"
        )
        raise TooManyBadRecords(self._stopped)

    def counts(self) -> dict[str, int]:
        """{reason: count} of all losses and flaws."""
        return dict(
            collections.Counter(self._refused) + collections.Counter(self._reasons.values()) + self._noted
        )
