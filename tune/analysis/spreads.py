"""Mean, standard deviation and interval of metrics that no verdict depends on."""

from collections.abc import Iterable, Sequence
from math import fsum, sqrt
from statistics import fmean

from tune.storage.summaries import MetricSpread

MAX_VALUE = 1e100  # squares of larger values overflow


def metric_spread(values: Iterable[float | None], confidence: float) -> MetricSpread:
    """The spread of one arm over its trials; None is a trial without a value.

    The interval is Student's t interval (1908) of the arm's own values, not pooled with others as that of a verdict: a
    metric may scatter differently in each arm.
    """
    known = [float(value) for value in values if value is not None and abs(value) < MAX_VALUE]
    n = len(known)
    if not n:
        return MetricSpread()
    mean = fmean(known)
    if n == 1:
        return MetricSpread(mean, n=1)
    from scipy.special import stdtrit

    sd = _sd(known, mean)
    half_width = sd / sqrt(n) * float(stdtrit(n - 1, 0.5 + confidence / 2))
    return MetricSpread(mean, sd, mean - half_width, mean + half_width, n=n)


def _sd(sample: Sequence[float], mean: float) -> float:
    return sqrt(fsum((x - mean) ** 2 for x in sample) / (len(sample) - 1))
