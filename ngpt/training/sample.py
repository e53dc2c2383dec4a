"""The sample text of a finished run: what its model writes without a prompt, in `sample.txt` of its folder."""

import logging
from pathlib import Path

from ngpt.config.base import ConfigError
from ngpt.generation.sampling import Sampling
from ngpt.generation.text import Continuation, continue_all, encode_prompt
from ngpt.model import diagnostics
from ngpt.system.atomic_files import describe_os_error, write_atomic
from ngpt.system.memory import is_out_of_memory
from ngpt.training.checkpoint import newest_checkpoint
from ngpt.training.load_model import build_model, checkpoint_tokenizer
from ngpt.training.run import Run

SAMPLE_FILE = "sample.txt"
SAMPLING, SEED = Sampling(temperature=0.8), 0  # of every run, so that texts differ by their models only

log = logging.getLogger(__name__)


def write_sample(run: Run) -> None:
    """Writes `sample.txt` durably: `tracker.sample_tokens` tokens, or fewer if the document ends; without, removes it.

    The text depends on the weights only, and no number of the run depends on it: it has random numbers of its own, and
    the run's last metrics have been taken. If it cannot be written, the log says why, and the run has finished anyway.
    Of several ranks, the first one writes it alone.
    """
    if not run.ranks.is_first:
        return
    path, tokens = run.out_dir / SAMPLE_FILE, run.config.tracker.sample_tokens
    try:
        if not tokens:
            path.unlink(missing_ok=True)  # of an earlier end of this run
        elif (text := sample_text(run, tokens)) is not None:
            write_atomic(path, text)
    except OSError as error:
        log.warning("the sample text was not written (%s)", describe_os_error(error, path))
    except ConfigError as error:  # of the tokenizer, whose files may be gone
        log.warning("the sample text was not written: %s", error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        log.warning("the sample text was not written: no memory to generate it")


def sample_text(run: Run, tokens: int) -> str | None:
    """Returns a text of the run's model, with the tokenizer of its newest checkpoint; None if that has none."""
    checkpoint = newest_checkpoint(Path(run.out_dir) / "checkpoints")
    tokenizer = checkpoint_tokenizer(checkpoint) if checkpoint else None
    if checkpoint is None or tokenizer is None:
        log.warning("the sample text was not written: no tokenizer decodes the tokens of this corpus")
        return None
    # Where ranks have parts of the weights, the checkpoint of the last step has them whole.
    model = build_model(checkpoint, device=run.config.device) if run.replica.saves_shards else run.model
    continuation, was_training = Continuation(encode_prompt("", tokenizer), tokenizer), model.training
    model.eval()
    try:
        with diagnostics.restore_counts(model):
            how = {"max_tokens": tokens, "sampling": SAMPLING, "seed": SEED, "dtype": run.config.dtype}
            for _ in continue_all(model, tokenizer, [continuation], **how):
                pass
    finally:
        model.train(was_training)
    return continuation.unprinted
