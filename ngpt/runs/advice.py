"""What a colleague would say about the settings of a run before it starts. Nothing here is an error."""

from collections.abc import Iterator

from ngpt.training.config import TrainConfig

MOST_EPOCHS = 4  # up to which repeated data are nearly as good as new ones (arXiv 2305.16264)
FEW_EVAL_TOKENS = 5_000


def advice(
    config: TrainConfig,
    *,
    train_tokens: int | None = None,
    eval_tokens: int | None = None,
    has_tokenizer: bool | None = None,
) -> Iterator[str]:
    """Yields one sentence, without a period, for each setting that is likely to be a mistake.

    `train_tokens` is the size of the training split, `eval_tokens` what an evaluation scores, and `has_tokenizer`
    whether tokens of the corpus can be decoded; None where unknown.
    """
    steps, warmup, per_step = config.steps, config.schedule.warmup_steps, config.tokens_per_step
    if warmup >= steps:
        text = f"the warm-up of {warmup:,} steps is not shorter than the run of {steps:,}"
        yield f"{text}: the rate never stays at its peak"
    if (evaluated := min(config.eval_tokens, eval_tokens or config.eval_tokens)) < FEW_EVAL_TOKENS:
        yield f"an evaluation scores {evaluated:,} tokens: below {FEW_EVAL_TOKENS:,}, chance decides small differences"
    if config.tracker.sample_tokens and has_tokenizer is False:
        yield "tracker.sample_tokens has no effect: no tokenizer decodes the tokens of this corpus"
    if train_tokens is None:
        return
    if per_step > train_tokens:
        yield f"a batch has {per_step:,} tokens, more than the {train_tokens:,} of the training split"
    elif steps * per_step > MOST_EPOCHS * train_tokens:
        epochs = steps * per_step / train_tokens
        text = f"the run reads its {train_tokens:,} training tokens {epochs:.1f} times"
        yield f"{text}: beyond {MOST_EPOCHS}, little is gained"
