"""The options and the result of a part of the harness."""

import sys
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Options:
    kills: int = 0
    ray: int = 0  # kills under Ray, of `kills`
    rounds: int = 0
    bits: int = 0
    seed: int = 0
    every: int = 1
    faults: tuple[str, ...] = ()
    case: str | None = None


@dataclass
class Outcome:
    """The number of cases, and each violation with the name of its case."""

    tried: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)  # counts and times, by name

    def add(self, case: str, broken: list[str]) -> None:
        self.tried += 1
        self.failures += [(case, sentence) for sentence in broken]
        for sentence in broken:
            print(f"  {case}: {sentence}", file=sys.stderr, flush=True)
        if self.tried % 50 == 0:
            print(f"  {self.tried} cases so far", file=sys.stderr, flush=True)

    def count(self, what: str, n: int = 1) -> None:
        self.figures[what] = self.figures.get(what, 0) + n

    def summary(self) -> dict[str, Any]:
        failures = [{"case": case, "broken": sentence} for case, sentence in self.failures]
        return {"tried": self.tried, "failures": failures} | self.figures
