"""Recognizes a loss that exploded to a finite number, so that such a trial is `diverged` like one whose loss is NaN.

An untrained model predicts about equally for every token, so its loss is near ln(vocab_size); a model that does not
learn stays there. A loss of twice that is worse than no training: on average it gives the right token a probability of
1 / vocab_size ** 2. One such trial would enter the noise of its phase with its whole size and hide every real effect.
"""

from collections.abc import Mapping
from math import log
from typing import Any

EXPLODED = 2.0  # a final loss above this multiple of an untrained model's has exploded


def explosion(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str | None:
    """Returns why the final `val_loss` of a finished trial counts as exploded, or None if it does not.

    The loss of an untrained model is the trial's own at step 0 (`initial_val_loss`, missing in older records), but at
    least ln(vocab_size): a start far above it, as with a large logit scale, is no explosion, and a restored model that
    starts far below it must not lower the limit. `config` has dotted names. The metric that ranks the arms plays no
    part: `val_bpb` is the same loss in other units.
    """
    loss, initial, size = metrics.get("val_loss"), metrics.get("initial_val_loss"), config.get("model.vocab_size")
    if loss is None or size is None:
        return None
    untrained = max(log(size), initial or 0.0)
    if loss <= EXPLODED * untrained:
        return None
    start = f"ln {size} = {log(size):.4g}, that of an untrained model"
    if initial is not None and initial >= log(size):
        start = f"{initial:.4g} at step 0"
    return f"its loss exploded: val_loss {loss:.6g} at the end, more than {EXPLODED:g} times {start}"


def with_divergence(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a `trial_finished` event, as `diverged` if it says `finished` but its loss exploded.

    Journals of versions that did not recognize this are read by the same rule. The metrics keep the finite loss.
    """
    if result["status"] != "finished":
        return result
    reason = explosion(result.get("config") or {}, result["metrics"])
    return result if reason is None else {**result, "status": "diverged", "error": reason}
