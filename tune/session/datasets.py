"""The corpora of a campaign: prepared and checked before the first trial, and described in its results."""

from collections.abc import Callable, Mapping
from typing import Any

from ngpt.config.base import ConfigError
from ngpt.data.dataset import DataConfig, open_dataset, prepare
from ngpt.data.loader import eval_set
from ngpt.training.config import TrainConfig
from tune.planning.plan import preview
from tune.spec.schema import Campaign


def prepare_all(campaign: Campaign, log: Callable[[str], None]) -> None:
    """Prepares every corpus of the campaign, as far as it is known before the first winner."""
    for config in _data_configs(campaign):
        prepare(config, log=log)


def check_all(campaign: Campaign) -> dict[str, Any]:
    """Reads every shard of every corpus of the campaign again, and describes the shards for `changed_shards`.

    By corpus with its tokenizer and split: size and CRC32 of each shard, or why it is left out. Corpora that
    are prepared from text are covered by their fingerprint instead.

    Raises:
        CorruptShardError: a shard has changed since the corpus was prepared.
    """
    described = {}
    for config in _data_configs(campaign):
        manifest = open_dataset(config, recheck=True).manifest
        if manifest["shard_folder"] is None:
            continue
        entries = [entry for counts in manifest["splits"].values() for entry in counts["shards"]]
        intact = {entry["name"]: f"{entry['size']} bytes, CRC32 {entry['crc32']:08x}" for entry in entries}
        left_out = {shard["name"]: f"left out, {shard['reason']}" for shard in manifest["skipped"]}
        how = f"tokenizer {config.tokenizer}, val_fraction {config.val_fraction}, {config.shards} files"
        described[f"{config.corpus} ({how})"] = dict(sorted((intact | left_out).items()))
    return described


def check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compares descriptions of the data, of the existing results and of this run.

    Raises:
        ConfigError: a corpus has changed since the first trial.
    """
    if before and before["fingerprint"] == now["fingerprint"] and before["sha256"] != now["sha256"]:
        hashes = f"{before['sha256'][:12]} then, {now['sha256'][:12]} now"
        text = f"the corpus {now['corpus']} has changed since this campaign began ({hashes})"
        raise ConfigError(f"{text}; restore it, or choose another --out")
    if changed := changed_shards(before.get("shards", {}), now.get("shards", {})):
        text = "shards have changed since this campaign began; restore them, or choose another --out:\n"
        raise ConfigError(text + "\n".join(changed))


def changed_shards(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The differences between two results of `check_all`, a line for each shard of the corpora in both."""
    return [
        f"{corpus}: {name}: {before[corpus].get(name, 'missing')} -> {now[corpus].get(name, 'missing')}"
        for corpus in sorted(before.keys() & now.keys())
        for name in sorted(before[corpus].keys() | now[corpus].keys())
        if before[corpus].get(name) != now[corpus].get(name)
    ]


def _data_configs(campaign: Campaign) -> list[DataConfig]:
    trials = {trial.config.data for phase in preview(campaign) for trial in phase.trials}
    return sorted({campaign.base.data} | trials, key=str)


def describe_data(config: TrainConfig) -> dict[str, Any]:
    """The training and evaluation data of a trial, with their hashes."""
    dataset, size, block_size = open_dataset(config.data), config.batch_size, config.model.block_size
    validation = eval_set(dataset, tokens=config.eval_tokens, batch_size=size, block_size=block_size)
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
