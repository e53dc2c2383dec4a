"""The corpora of a campaign: prepared before the first trial, and described in what it leaves behind."""

from collections.abc import Callable
from typing import Any

from ngpt.data.corpora import open_dataset, prepare
from ngpt.data.loader import eval_set
from ngpt.train import TrainConfig
from tune.campaign import Campaign
from tune.plan import preview


def prepare_all(campaign: Campaign, log: Callable[[str], None]) -> None:
    """Prepares every corpus that a trial of the campaign will use, as far as can be known before the first winner."""
    configs = {trial.config.data for phase in preview(campaign) for trial in phase.trials}
    for config in sorted({campaign.base.data} | configs, key=str):
        prepare(config, log=log)


def describe_data(config: TrainConfig) -> dict[str, Any]:
    """What a trial trains and is evaluated on, with the hashes that pin it down."""
    dataset = open_dataset(config.data)
    validation = eval_set(
        dataset, tokens=config.eval_tokens, batch_size=config.batch_size, block_size=config.model.block_size
    )
    manifest = dataset.manifest
    return {
        "corpus": manifest["corpus"],
        "tokenizer": manifest["tokenizer"]["spec"],
        "tokenizer_sha256": manifest["tokenizer"].get("sha256"),
        "vocab_size": dataset.vocab_size,
        "train_tokens": sum(len(tokens) for tokens in dataset.train),
        "val_tokens": sum(len(tokens) for tokens in dataset.val),
        "eval_tokens": validation.n_tokens,
        "eval_sha256": validation.sha256,
        "fingerprint": manifest["fingerprint"],
        "sha256": manifest["content_sha256"],
        "skipped_shards": len(manifest["skipped"]),
    }
