"""The uncertainty of a difference between two arms that comes from the choice of the evaluation text.

Intervals over seeds answer what other seeds would give on the same text. Another text of the same kind and length would
move the difference, too: by the standard error of a block bootstrap (Efron 1979; Kuensch 1989) over the blocks of the
text, paired since both arms are evaluated on the same blocks. It is computed by its limit for many resamples, the
linearized variance of a ratio (Cochran 1977, chapter 6), so it needs no random numbers.
"""

from collections.abc import Mapping, Sequence
from math import fsum, sqrt
from typing import Any

MIN_BLOCKS = 5  # with fewer, a standard error means little


def text_standard_error(arm: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns the standard error of arm minus baseline, in nats per token.

    Each argument has a mapping per seed with the `tokens` and `nats` of each block of the text; seeds are averaged.
    Returns None if a side has none, or if the arms were evaluated on different blocks.
    """
    runs = [*arm, *baseline]
    if not arm or not baseline or any(run["tokens"] != runs[0]["tokens"] for run in runs):
        return None
    tokens = runs[0]["tokens"]
    n, total = len(tokens), sum(tokens)
    if n < MIN_BLOCKS:
        return None
    means = [
        [fsum(block) / len(side) for block in zip(*(run["nats"] for run in side), strict=True)]
        for side in (arm, baseline)
    ]
    differences = [a - b for a, b in zip(*means, strict=True)]
    mean = fsum(differences) / total
    squares = fsum((difference - mean * size) ** 2 for difference, size in zip(differences, tokens, strict=True))
    return sqrt(n / (n - 1) * squares) / total
