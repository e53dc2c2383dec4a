"""What the tracking tools have in common: the run that a writer logs, its place in a campaign, and histograms."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import Tensor

HISTOGRAM_BINS = 32
FLOAT32_MAX = 3.4028234663852886e38

Ending = Literal["finished", "diverged", "stopped", "failed", "continues"]


class Histogram(NamedTuple):
    """Counts of the finite values per bin, and the edges of the bins. Both lists are empty without finite values."""

    edges: list[float]  # one more than `counts`
    counts: list[int]
    not_finite: int
    total: float  # sum of the finite values
    squares: float  # sum of their squares


def histogram(values: "ArrayLike | Tensor") -> Histogram:
    """Sorts values into `HISTOGRAM_BINS` bins of equal width. Those not finite in float32 are counted separately."""
    import numpy as np

    detach = getattr(values, "detach", None)
    array = np.asarray(detach().float().cpu() if detach else values, dtype=np.float64)  # NumPy lacks bfloat16
    finite = array[np.abs(array) <= FLOAT32_MAX]
    not_finite = array.size - finite.size
    if not finite.size:
        return Histogram([], [], not_finite, 0.0, 0.0)
    low, high = float(finite.min()), float(finite.max())
    # The range is at least a thousandth of the values, so that rounding noise falls into one bin.
    middle = (low + high) / 2
    half = max(abs(low), abs(high), 1e-6) * 5e-4
    low, high = min(low, middle - half), max(high, middle + half)
    counts, edges = np.histogram(finite, bins=HISTOGRAM_BINS, range=(low, high))
    return Histogram(edges.tolist(), counts.tolist(), not_finite, float(finite.sum()), float(finite @ finite))


@dataclass(frozen=True)
class TrackedRun:
    """A run as the tracking tools show it. Outside of a campaign, `group`, `phase` and `arm` are empty."""

    folder: Path
    project: str
    group: str = ""  # the campaign
    phase: str = ""
    arm: str = ""
    seed: int = 0
    name: str = ""  # outside of a campaign
    settings: Mapping[str, Any] = field(default_factory=dict)  # all of them, by dotted name
    varied: tuple[str, ...] = ()  # the settings that the arms of the phase vary; empty: unknown
    keep_until: int | None = None  # the step that the run continues from
    # The last step of each metric that an interrupted attempt has logged after `keep_until`; the run repeats it.
    repeated: Mapping[str, int] = field(default_factory=dict)
    rolled_back: bool = False  # whether the steps after `keep_until` get other values than before

    @property
    def path(self) -> tuple[str, ...]:
        """The names that lead to the run: phase, arm and seed, or its own name outside of a campaign."""
        return (self.phase, self.arm, f"seed {self.seed}") if self.group else (self.name or self.folder.name,)

    @property
    def parameters(self) -> dict[str, Any]:
        """The settings by which runs are told apart: those that the phase varies, or all if that is not known."""
        names = self.varied or tuple(self.settings)
        return {name: self.settings[name] for name in names if name in self.settings}


class Writer(contextlib.AbstractContextManager["Writer"]):
    """Logs one run to a tracking tool, until the `with` block ends. What a tool does not have does nothing.

    A writer never raises because its server is away: rows are then missing there, and `metrics.jsonl` has them.
    """

    repeated: dict[str, int]  # the last step of each metric that the tool has; rows up to there are not sent again

    def log(self, row: Mapping[str, Any]) -> None:
        """Logs metrics by name, and their `step`."""

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Logs histograms by name, none of them empty."""

    def note(self, facts: Mapping[str, Any]) -> None:
        """Adds facts about the whole run; values are plain JSON."""

    def end(self, ending: Ending, metrics: Mapping[str, Any]) -> None:
        """Says how the run ends, with its final metrics. `continues`: it goes on in another writer."""

    def new_values(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """The entries that the tool does not have yet, without `step`."""
        return {name: item for name, item in values.items() if name != "step" and step > self.repeated.get(name, -1)}
