"""The corpora of a campaign on the nodes of a cluster: prepared once on each, with the same checksums everywhere.

A node whose cache folder is shared with the host, or with a node that was faster, finds them prepared. Two processes
never prepare the same corpus: the first holds a lock in the cache folder, with flock, which Linux passes on to the
server of an NFS mount (unless mounted with `nolock`), and which ends with its process or host.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ngpt.code.plugins import Source
from ngpt.config.base import ConfigError
from ngpt.data.dataset import DataConfig, open_dataset, prepare
from ngpt.data.tokens.shards import CorruptShardError
from ngpt.plugins.load import load_sources
from ngpt.system.cgroups import usable_cpus


@dataclass(frozen=True)
class ExpectedCorpus:
    """A corpus and the checksums of its tokens, which every node must have."""

    config: DataConfig
    checksums: dict[str, Any]


def expected_corpora(configs: Iterable[DataConfig]) -> list[ExpectedCorpus]:
    """The corpora as this host has them; raises the errors of `open_dataset`."""
    return [ExpectedCorpus(config, checksums(open_dataset(config).manifest)) for config in configs]


def checksums(manifest: dict[str, Any]) -> dict[str, Any]:
    """Content, vocabulary, size and CRC32 of every shard of a prepared corpus, and the tokens of it that are used."""
    shards = {split: entry["shards"] for split, entry in manifest["splits"].items()}
    names = ("fingerprint", "vocab_size", "token_bytes_crc32", "content_sha256")
    return {name: manifest[name] for name in names} | {"shards": shards}


def prepare_corpora(corpora: Sequence[ExpectedCorpus], plugins: Sequence[Source] = ()) -> str | None:
    """Prepares the corpora on this node, where they are not yet; returns what is wrong with one, or None.

    `plugins` may have added some of them.
    """
    load_sources(plugins)
    for corpus in corpora:
        try:
            prepare(corpus.config, workers=usable_cpus())
            dataset = open_dataset(corpus.config)
        except (ConfigError, CorruptShardError, OSError) as error:
            return f"cannot prepare the corpus {corpus.config.corpus}: {error}"
        if checksums(dataset.manifest) != corpus.checksums:
            return f"has another corpus {corpus.config.corpus} (in {dataset.folder}; its checksums differ)"
    return None
