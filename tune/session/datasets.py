"""The corpora of a campaign: prepared before the first trial, and described in what it leaves behind."""

from collections.abc import Callable, Mapping
from typing import Any

from ngpt.data.dataset import DataConfig, open_dataset, prepare
from ngpt.data.loader import eval_set
from ngpt.training.config import TrainConfig
from tune.planning.plan import preview
from tune.spec.schema import Campaign


def prepare_all(campaign: Campaign, log: Callable[[str], None]) -> None:
    """Prepares every corpus that a trial of the campaign will use, as far as can be known before the first winner."""
    for config in sorted({campaign.base.data} | _configs(campaign), key=str):
        prepare(config, log=log)


def check_all(campaign: Campaign) -> dict[str, Any]:
    """Reads every shard of every corpus of the campaign once more, and says which there are, for `changed_shards`.

    By corpus, tokenizer and split as the file has them: size and CRC32 of each shard, or why it is left out. Of
    corpora that the program makes itself, shards say nothing that the fingerprint does not.

    Raises:
        CorruptShardError: a shard is not as it was when the corpus was prepared.
    """
    found = {}
    for config in sorted({campaign.base.data} | _configs(campaign), key=str):
        manifest = open_dataset(config, again=True).manifest
        if manifest["shard_folder"] is None:
            continue
        entries = [entry for counts in manifest["splits"].values() for entry in counts["shards"]]
        sound = {entry["name"]: f"{entry['size']} bytes, CRC32 {entry['crc32']:08x}" for entry in entries}
        left_out = {shard["name"]: f"left out, {shard['reason']}" for shard in manifest["skipped"]}
        how = f"tokenizer {config.tokenizer}, val_fraction {config.val_fraction}, {config.shards} files"
        found[f"{config.corpus} ({how})"] = dict(sorted((sound | left_out).items()))
    return found


def changed_shards(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What is different in the shards of corpora that two calls of `check_all` both know, a line each."""
    lines = []
    for corpus in sorted(before.keys() & now.keys()):
        one, other = before[corpus], now[corpus]
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name):
                lines.append(f"{corpus}: {name}: {one.get(name, 'not there')} -> {other.get(name, 'not there')}")
    return lines


def _configs(campaign: Campaign) -> set[DataConfig]:
    return {trial.config.data for phase in preview(campaign) for trial in phase.trials}


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
