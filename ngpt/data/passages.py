"""The tokens to score: those of a split of a prepared corpus, or of texts that are tokenized as they are read.

A corpus of texts need not be prepared, and not be large enough to be split. Texts are tokenized as for training.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from ngpt.config.base import ConfigError
from ngpt.data.dataset import Dataset, Source
from ngpt.data.prepare import EMPTY_LINE, default_threads, encode_in_order, split_texts
from ngpt.data.shard_index import choose_shards
from ngpt.data.sources import Corpus, ShardCorpus
from ngpt.data.splits import split_of
from ngpt.data.text.documents import read_documents
from ngpt.data.tokens.tokenizer import Tokenizer
from ngpt.data.windows import CHUNK, Passage

ALL = "all"  # in place of a split


def published_split(source: Source, manifest: dict[str, Any] | None = None) -> str:
    """Returns `val` if files of a corpus are named for it, else `all`. A prepared folder has a `manifest`."""
    if isinstance(source, ShardCorpus):
        return "val"
    if isinstance(source, Corpus):
        return "val" if "val" in source.held_out else ALL
    if manifest is None:
        return "val" if choose_shards(source, "names").val else ALL
    files = manifest.get("files", {}).get("val", [])
    return "val" if files and all(split_of(name) == "val" for name in files) else ALL


class TextPassages:
    """The texts of a split, or all of them, tokenized as they are read. With `by_document`, each starts anew.

    Once they were read, `documents` is their number (None for a text without documents), and `lossless` is whether the
    tokens decode to as many bytes as the text has. Raises ConfigError if a split consists of no whole documents.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, *, split: str, val_fraction: float, by_document: bool
    ) -> None:
        is_drawn = split in ("train", "val") and "val" not in corpus.held_out
        if by_document and is_drawn and corpus.split_by == "position":
            raise ConfigError(f"the {split} split of {corpus.name} is a part of a text: documents need --split all")
        self._corpus, self._tokenizer, self._split, self._by_document = corpus, tokenizer, split, by_document
        self._val_fraction = val_fraction
        self._n_read, self._size = 0, max(1, corpus.size())
        self.lossless = tokenizer.token_bytes() is not None
        self.documents: int | None = 0 if self._separated else None

    @property
    def _separated(self) -> bool:
        return self._corpus.separated or self._by_document

    def __iter__(self) -> Iterator[Passage]:
        starts = True
        texts, threads = self._texts(), default_threads()
        for _, ids, lossless in encode_in_order(texts, self._tokenizer, marked=self._separated, threads=threads):
            self.lossless = self.lossless and lossless
            if self.documents is not None:
                self.documents += 1
            yield Passage(ids, starts or self._by_document)
            starts = False

    def fraction(self) -> float:
        """How much of the text has been read, about."""
        return min(1.0, self._n_read / self._size)

    def _texts(self) -> Iterator[tuple[str, str]]:
        # A document that is scored alone ends with its text, since nothing follows that an empty line would divide.
        ends = self._corpus.separated and not self._by_document and self._tokenizer.document_separator is None
        for text in self._documents():
            yield self._split, text + (EMPTY_LINE if ends else "")

    def _documents(self) -> Iterator[str]:
        files = self._corpus.files
        if self._by_document and not self._corpus.separated and files is not None:  # each file is a document
            by_split = {"train": files.train, "val": files.val, "test": files.test}
            paths = by_split.get(self._split, [*files.train, *files.val, *files.test])
            found = ((self._split, text) for text in read_documents(paths))
        elif self._split == ALL:
            parts = chain([self._corpus.documents], self._corpus.held_out.values())
            found = ((ALL, text) for part in parts for text in part())
        else:
            found = split_texts(self._corpus, self._val_fraction)
        for split, text in found:
            self._n_read += len(text.encode())
            if split == self._split:
                yield text


class TokenPassages:
    """The shards of a split, or all of them; no context reaches from one to the next.

    With `by_document`, each token `separator` starts anew: it starts documents, or ends those of other programs. With
    `whole_windows` of so many tokens, the rest at the end of each shard is left out, as in an evaluation of a run.
    Raises ConfigError if there is no such split, or no whole window.
    """

    lossless = True  # as far as is known; `token_bytes` of the corpus is None otherwise
    documents: int | None = None

    def __init__(
        self,
        dataset: Dataset,
        *,
        split: str,
        separator: int | None = None,
        by_document: bool = False,
        whole_windows: int | None = None,
    ) -> None:
        if by_document and separator is None:
            text = "its tokenizer marks no documents; give their texts with --corpus"
            raise ConfigError(f"{dataset.manifest['corpus']} cannot be scored by document: {text}")
        self._parts = _all_parts(dataset) if split == ALL else _parts(dataset, split)
        if whole_windows is not None and not by_document:
            longest = max(len(part.tokens) for part in self._parts)
            self._parts = [_whole(part, whole_windows) for part in self._parts if len(part.tokens) > whole_windows]
            if not self._parts:
                needed = f"block_size {whole_windows} needs {whole_windows + 1} consecutive tokens"
                raise ConfigError(f"{needed}, the {split} split has {longest} at most; choose a smaller block_size")
        self._separator = separator if by_document else None
        self._n_read, self._size = 0, sum(len(part.tokens) for part in self._parts)

    def __iter__(self) -> Iterator[Passage]:
        for part in self._parts:
            if self._separator is None:
                yield part
            else:
                yield from _documents(part, self._separator)
            self._n_read += len(part.tokens)

    def fraction(self) -> float:
        """How much has been read, by whole shards."""
        return self._n_read / max(1, self._size)


def _parts(dataset: Dataset, split: str) -> list[Passage]:
    shards = {"train": dataset.train, "val": dataset.val, "test": dataset.test}[split]
    if not shards:
        raise ConfigError(f"{dataset.folder} has no {split} split; it has {' and '.join(dataset.manifest['splits'])}")
    return [Passage(shard, True) for shard in shards]


def _all_parts(dataset: Dataset) -> list[Passage]:
    """The tokens of all splits. A file whose end is validation is one text, as it was before it was divided."""
    shards = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    found = [
        (entry["name"], entry["first"], tokens)
        for split, counts in dataset.manifest["splits"].items()
        for entry, tokens in zip(counts["shards"], shards[split], strict=True)
    ]
    parts: list[Passage] = []
    before: tuple[str, int] | None = None  # where the part before ends
    for name, first, tokens in sorted(found, key=lambda part: part[:2]):
        parts.append(Passage(tokens, (name, first) != before))
        before = name, first + len(tokens)
    return parts


def _whole(part: Passage, block_size: int) -> Passage:
    return Passage(part.tokens[: (len(part.tokens) - 1) // block_size * block_size + 1], part.starts)


def _documents(part: Passage, separator: int) -> Iterator[Passage]:
    """Divides a part before each separator."""
    starts = part.starts
    for first in range(0, len(part.tokens), CHUNK):
        chunk = part.tokens[first : first + CHUNK]
        marks = np.flatnonzero(chunk == separator)
        for document in np.split(chunk, marks):
            if len(document):
                yield Passage(document, starts or document[0] == separator)
                starts = False
