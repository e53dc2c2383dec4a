"""What an evaluation of a run measures: the scores, how far the model is off the sphere, its alphas and divisors."""

import logging

from torch import Tensor

from ngpt.diagnostics import (
    activation_norm_error,
    counted_once,
    divisor_statistics,
    divisors,
    step_lengths,
    weight_norm_error,
)
from ngpt.evaluate import evaluate
from ngpt.memory import retry_smaller
from ngpt.projection import project_weights
from ngpt.run import Run, position
from ngpt.setbacks import ON_OOM, Metrics
from ngpt.tracker import finite

log = logging.getLogger(__name__)


def measure(run: Run, *, last: bool) -> dict[str, Tensor]:
    """Evaluates into `progress.last_eval` and returns what is worth a histogram: alphas and divisors, by name.

    The drift off the sphere is measured before the last projection. A number that is not finite becomes None. Where
    memory runs out it is tried again with half as many sequences at once.
    """
    drift, r = retry_smaller(lambda: look(run), lambda: shrink_evaluation(run), run.device)
    if last:  # the finished model lies on the sphere, however lazy the projection was
        project_weights(run.model)
    scores = retry_smaller(lambda: scored(run), lambda: shrink_evaluation(run), run.device)
    metrics = position(run) | {"train_loss": run.progress.train_loss} | scores | drift | replaced_divisors(run)
    run.progress.last_eval = {name: finite(value) for name, value in metrics.items()}
    return step_lengths(run.model) | r


def scored(run: Run) -> Metrics:
    """The validation loss, on as many sequences at once as fit."""
    with counted_once(run.model):
        return evaluate(run.model, run.validation.cut(run.eval_rows), autocast=run.autocast)


def look(run: Run) -> tuple[Metrics, dict[str, Tensor]]:
    """How far the model is off the sphere, and its divisors, by name; on one validation sequence."""
    idx = run.validation.batches[0][0][:1].to(run.device)
    r = divisors(run.model, idx)
    drift: Metrics = {
        "weight_norm_error": weight_norm_error(run.model),
        "activation_norm_error": activation_norm_error(run.model, idx),
    }
    return drift | divisor_statistics(r), r


def replaced_divisors(run: Run) -> Metrics:
    """`r_replaced`: how many divisors were not finite so far, in training and evaluation; each rise is a warning."""
    if run.model.normalizer is None:
        return {}
    replaced = int(run.model.normalizer.replaced)
    if replaced > (run.progress.last_eval.get("r_replaced") or 0):
        log.warning("step %d: %d divisors r were not finite and became 1", run.progress.step, replaced)
    return {"r_replaced": replaced}


def shrink_evaluation(run: Run) -> bool:
    """Halves the sequences at once in evaluation, which changes no result; False if it cannot, or should not."""
    if ON_OOM[run.config.on_oom] is None or run.eval_rows == 1:
        return False
    run.progress.eval_splits += 1
    log.warning("step %d: out of memory in evaluation; now %d sequences at once", run.progress.step, run.eval_rows)
    return True
