"""Prepares and checks the corpora of a campaign before its first trial, and describes them for the results."""

from collections.abc import Callable, Mapping
from typing import Any

from ngpt.config.base import ConfigError
from ngpt.data.dataset import DataConfig, fingerprint, open_dataset, prepare
from ngpt.data.loader import eval_set
from ngpt.training.config import TrainConfig
from tune.planning.plan import preview
from tune.spec.schema import Campaign


def prepare_all(campaign: Campaign, log: Callable[[str], None]) -> None:
    """Prepares every corpus that the campaign is known to use before its first phase has a winner."""
    for config in data_configs(campaign):
        prepare(config, log=log)


def check_bytes(campaign: Campaign) -> None:
    """Checks that every trial can have `val_bpb`, if arms are compared by it; the corpora are prepared.

    Raises:
        ConfigError: a corpus consists of tokens, and no tokenizer says how many bytes each has.
    """
    if campaign.metric.name != "val_bpb":
        return
    for config in data_configs(campaign):
        if open_dataset(config).token_bytes is None:
            text = f"metric.name: val_bpb needs the bytes of each token, which the corpus {config.corpus} does not have"
            raise ConfigError(f"{text}; set data.tokenizer to the tokenizer that made its tokens, or use val_loss")


def check_all(campaign: Campaign) -> dict[str, Any]:
    """Rereads every shard of every corpus of the campaign and describes the shards for `changed_shards`.

    Returns the size and CRC32 of each shard, or why it was skipped, by corpus (with tokenizer and split) and shard
    name. Corpora prepared from text are not included: their fingerprint covers them.

    Raises:
        CorruptShardError: a shard has changed since the corpus was prepared.
    """
    descriptions = {}
    for config in data_configs(campaign):
        manifest = open_dataset(config, recheck=True).manifest
        if manifest["shard_folder"] is None:
            continue
        entries = [entry for counts in manifest["splits"].values() for entry in counts["shards"]]
        intact = {entry["name"]: f"{entry['size']} bytes, CRC32 {entry['crc32']:08x}" for entry in entries}
        skipped = {shard["name"]: f"left out, {shard['reason']}" for shard in manifest["skipped"]}
        details = f"tokenizer {config.tokenizer}, val_fraction {config.val_fraction}, {config.shards} files"
        if config.splits != "names" or config.token_dtype is not None:
            details += f", splits by {config.splits}, token_dtype {config.token_dtype}"
        descriptions[f"{config.corpus} ({details})"] = dict(sorted((intact | skipped).items()))
    return descriptions


def check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compares the data descriptions of the existing results (`before`) and of this run (`now`).

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


def check_not_edited(config: DataConfig, before: Mapping[str, Any]) -> None:
    """Raises ConfigError if a corpus is not the one that `before` describes any more, while the campaign runs."""
    if (now := fingerprint(config)) != (then := before["fingerprint"]):
        text = f"the corpus {config.corpus} has changed since this run began ({then} then, {now} now)"
        raise ConfigError(f"{text}; restore it and run the same command again, or choose another --out")


def changed_shards(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Returns one line per shard that differs between two results of `check_all`, for the corpora in both."""
    return [
        f"{corpus}: {name}: {before[corpus].get(name, 'missing')} -> {now[corpus].get(name, 'missing')}"
        for corpus in sorted(before.keys() & now.keys())
        for name in sorted(before[corpus].keys() | now[corpus].keys())
        if before[corpus].get(name) != now[corpus].get(name)
    ]


def data_configs(campaign: Campaign) -> list[DataConfig]:
    """The corpora that the campaign is known to use before its first phase has a winner."""
    trials = {trial.config.data for phase in preview(campaign) for trial in phase.trials}
    return sorted({campaign.base.data} | trials, key=str)


def describe_data(config: TrainConfig) -> dict[str, Any]:
    """Returns names, sizes and hashes of a trial's tokenizer, training data and evaluation data."""
    dataset, block_size = open_dataset(config.data), config.model.block_size
    validation = eval_set(dataset, tokens=config.eval_tokens, batch_size=config.batch_size, block_size=block_size)
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
