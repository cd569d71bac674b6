"""The error budget of a dataset: which records could not be used, why, and when that is too many."""

import collections
import threading

from absl import logging

from dalle2_jax.data.records import BadRecord

BAD_SLACK = 8  # bad records that are borne beyond the fraction, for small numbers scatter
_KEPT_BAD = 100


class TooManyBadRecords(RuntimeError):
    """The share of unusable records is above data.max_bad_fraction."""


class Budget:
    """Counts what could not be used, by reason, and raises TooManyBadRecords; safe to use from many threads.

    The run stops when more than `max_fraction` of the records seen are bad, and more than BAD_SLACK of
    them (none where max_fraction is 0). A record counts once, however often it comes.
    """

    def __init__(
        self,
        num_records: int,
        max_fraction: float,
        refused: dict[str, int],
        passed: dict[str, int] | None = None,
        examples: dict[str, str] | None = None,
    ):
        """What indexing lost already; what it left out besides; a name for each reason."""
        self._lock = threading.Lock()
        self._num_records, self._max_fraction = num_records, max_fraction
        self._slack = BAD_SLACK if max_fraction > 0 else 0
        self._known: dict[int, str] = {}  # record -> reason
        self._refused = dict(refused)
        self._noted, self._examples = collections.Counter(passed or {}), examples or {}
        self._read = 0
        self._stopped = ""  # why, once the run has to stop
        self.kept: list[dict] = []
        lost = sum(refused.values())
        if lost > self._slack + max_fraction * (num_records + lost):
            self._stop(lost, num_records + lost, "of the dataset's files")

    def reason(self, index: int) -> str | None:
        """Why record `index` is known to be bad, or None."""
        return self._known.get(index)

    def add(self, index: int, key: str, error: BadRecord) -> None:
        """Count record `index`, once. Raises TooManyBadRecords above the budget, and from then on the same to
        every thread, without counting."""
        with self._lock:
            if self._stopped:
                raise TooManyBadRecords(self._stopped)
            if index not in self._known:
                self._known[index] = error.reason
                logging.log_first_n(logging.WARNING, "bad record %s: %s", 20, key, error)
                if len(self.kept) < _KEPT_BAD:
                    self.kept.append(dict(index=index, key=key, reason=error.reason, detail=error.detail))
            bad = len(self._known)
            seen = max(min(self._read, self._num_records), bad)
            if bad > self._slack + self._max_fraction * seen:
                self._stop(bad, seen, "read")

    def note(self, reason: str) -> None:
        """Count something that does not make a record unusable."""
        with self._lock:
            self._noted[reason] += 1

    def count_read(self) -> None:
        """Count a record read, good or bad."""
        with self._lock:
            self._read += 1

    def _stop(self, bad: int, seen: int, what: str):
        examples = "; ".join(f"{item['key']} ({item['reason']} {item['detail']})" for item in self.kept[:5])
        lost = [
            f"{self._examples[reason]} ({reason})" for reason in self._refused if reason in self._examples
        ]
        examples = examples or "; ".join(lost[:5])
        self._stopped = (
            f"{bad} of {seen} records {what} cannot be used, above data.max_bad_fraction="
            f"{self._max_fraction}: {self.counts()}. {examples}{'. ' if examples else ''}"
            "Mend the dataset, or raise data.max_bad_fraction"
        )
        raise TooManyBadRecords(self._stopped)

    def counts(self) -> dict[str, int]:
        """{reason: count} of everything so far."""
        counts = collections.Counter(self._refused)
        counts.update(self._known.values())
        counts.update(self._noted)
        return dict(counts)
