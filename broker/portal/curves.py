"""The curves of a job: what its sites measured, gathered from their metrics files.

A site appends one JSON object a line with `time_ms`, `samples_done` (of the whole job) and what the
script reported. A file may be long; then evenly spaced pieces of it are read, so that a page costs
the same after an hour and after a week.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from pydantic_core import from_json

from broker.database.tables import Lease
from broker.streams import StreamStore

WHOLE_BYTES_MAX: Final = 400_000
PIECES: Final = 48
PIECE_BYTES: Final = 8_192
LEASES_MAX: Final = 16
POINTS_MAX: Final = 400
FIGURE_MAX: Final = 1e300  # beyond it a site measures nothing
_Column = list[float | None]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One line of a site's metrics that says how far the job was."""

    site_id: str
    time_ms: float
    samples_done: float
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Curves:
    """Columns over `samples_done`, as uPlot takes them, and the last values for those without a chart.

    `rate` is measured from the time between reports; `predicted` is what the placement was sold with.
    """

    samples_done: list[float]
    loss: _Column
    held_out_loss: _Column
    rate: _Column
    predicted: float | None

    def as_json(self) -> dict[str, object]:
        """Return the columns as plain JSON values."""
        return {
            "samples_done": self.samples_done,
            "loss": self.loss,
            "held_out_loss": self.held_out_loss,
            "samples_per_s": self.rate,
            "samples_per_s_predicted": [self.predicted] * len(self.samples_done),
        }

    @property
    def last_loss(self) -> float | None:
        """The newest training loss."""
        return _last(self.loss)

    @property
    def first_held_out_loss(self) -> float | None:
        """The held-out loss with which the job began."""
        return _last(self.held_out_loss[::-1])

    @property
    def last_held_out_loss(self) -> float | None:
        """The newest held-out loss."""
        return _last(self.held_out_loss)

    @property
    def last_rate(self) -> float | None:
        """The newest measured rate in samples per second."""
        return _last(self.rate)


def read_curves(streams: StreamStore, leases: Sequence[Lease], predicted: float | None) -> Curves:
    """Return the curves of a job from the metrics of its newest leases."""
    rows = [
        measurement
        for lease in leases[:LEASES_MAX]
        for measurement in _measurements(lease.site_id, _lines(streams, lease.lease_id))
    ]
    return curves_of(rows, predicted)


def curves_of(rows: Iterable[Measurement], predicted: float | None) -> Curves:
    """Return the columns of some measurements; those of several sites at one place are averaged."""
    ordered = sorted(rows, key=lambda row: (row.samples_done, row.time_ms))
    rates = _rates(ordered)
    loss = _averages((row.samples_done, row.values.get("loss")) for row in ordered)
    held_out = _averages((row.samples_done, row.values.get("held_out_loss")) for row in ordered)
    places = _thinned(sorted({*loss, *held_out, *rates}), keep={*held_out})
    return Curves(
        samples_done=places,
        loss=[loss.get(place) for place in places],
        held_out_loss=[held_out.get(place) for place in places],
        rate=[rates.get(place) for place in places],
        predicted=predicted,
    )


def _lines(streams: StreamStore, lease_id: str) -> Iterator[bytes]:
    held = streams.state(lease_id, "metrics").held_bytes
    if held <= WHOLE_BYTES_MAX:
        yield from streams.read(lease_id, "metrics", 0, WHOLE_BYTES_MAX).splitlines()
        return
    for piece in range(PIECES):
        offset = piece * (held - PIECE_BYTES) // (PIECES - 1)
        lines = streams.read(lease_id, "metrics", offset, PIECE_BYTES).splitlines()
        yield from lines[1 if piece else 0 : -1]  # the first and the last one are cut


def _measurements(site_id: str, lines: Iterable[bytes]) -> Iterator[Measurement]:
    for line in lines:
        try:
            row = from_json(line)  # refuses deep nesting, at which the standard library runs out of stack
        except ValueError:
            continue  # a line still being written, or something else that a site sent
        if not isinstance(row, dict):
            continue
        values = {name: float(value) for name, value in row.items() if _is_figure(value)}
        if "samples_done" in values and "time_ms" in values:
            yield Measurement(site_id, values["time_ms"], values["samples_done"], values)


def _is_figure(value: object) -> bool:
    # Compared first: a whole number beyond double precision would not convert.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FIGURE_MAX


def _averages(points: Iterable[tuple[float, float | None]]) -> dict[float, float]:
    at: dict[float, list[float]] = {}
    for place, value in points:
        if value is not None:
            at.setdefault(place, []).append(value)
    return {place: sum(values) / len(values) for place, values in at.items()}


def _rates(ordered: Sequence[Measurement]) -> dict[float, float]:
    """Return the job's rate at each place where its progress is reported again, from one site's clock."""
    last: dict[str, Measurement] = {}
    points: list[tuple[float, float | None]] = []
    for row in ordered:
        former = last.get(row.site_id)
        if former is not None and row.samples_done == former.samples_done:
            continue
        if former is not None and row.time_ms > former.time_ms:
            rate = (row.samples_done - former.samples_done) * 1000 / (row.time_ms - former.time_ms)
            points.append((row.samples_done, rate))
        last[row.site_id] = row
    return _averages(points)


def _thinned(places: list[float], keep: set[float]) -> list[float]:
    if len(places) <= POINTS_MAX:
        return places
    step = len(places) / POINTS_MAX
    chosen = {places[int(index * step)] for index in range(POINTS_MAX)} | {places[-1]}
    # Held-out losses are few and what one looks for; beyond the limit they are thinned as all others are.
    return sorted(chosen | keep if len(keep) <= POINTS_MAX else chosen)


def _last(column: _Column) -> float | None:
    return next((value for value in reversed(column) if value is not None), None)
