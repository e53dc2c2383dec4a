"""What an evaluation scores: a split that a run is known by, or any corpus, with the tokenizer of the model."""

import os
from typing import Any, NamedTuple

import numpy as np

from ngpt.config.base import ConfigError, build
from ngpt.data.dataset import DataConfig, Dataset, fingerprint, locate, open_dataset, prepare, prepared_manifest
from ngpt.data.passages import ALL, TextPassages, TokenPassages, published_split
from ngpt.data.sources import CORPORA, Corpus
from ngpt.data.splits import NoTrainingFilesError
from ngpt.data.text.progress import Log
from ngpt.data.tokens.tokenizer import Tokenizer, parse_spec
from ngpt.system.cli import print_line
from ngpt.training.checkpoint import Checkpoint
from ngpt.training.load_model import checkpoint_tokenizer, saved_tokenizer, tokenizer_origin

EVAL_TOKENS = 16_384  # if neither the command line nor the checkpoint sets a number


class Text(NamedTuple):
    """What is scored: its tokens, and what they mean in bytes and words (None where unknown)."""

    name: str
    split: str
    passages: TextPassages | TokenPassages
    by_document: bool
    limit: int | None  # tokens that are scored
    token_bytes: np.ndarray | None
    tokenizer: Tokenizer | None
    trained_on: bool

    def describe(self) -> str:
        part = f"all of {self.name}" if self.split == ALL else f"the {self.split} split of {self.name}"
        return part if self.limit is None else f"the start of {part}"


def open_text(
    config: DataConfig,
    checkpoint: Checkpoint,
    *,
    is_own: bool,
    tokenizer: str | None = None,
    split: str | None = None,
    by_document: bool = False,
    eval_tokens: int | str | None = None,
    block_size: int,
    log: Log = print_line,
) -> Text:
    """Opens what is to be scored of a corpus. ConfigError if the model's tokenizer is not that of the corpus.

    Of the corpus that the model was trained on (`is_own`), the default is the text that the training run evaluated. Any
    other corpus is scored whole, or its validation split if files are named for that. `eval_tokens` limits what is
    scored, unless it is `all`. `tokenizer` overrides the checkpoint's own. `log` shows how a corpus is prepared.
    """
    try:
        source = locate(config)
    except NoTrainingFilesError as error:  # a folder of test files, for example, which is all that is to be scored
        if split != ALL and {split or next(iter(error.splits))} != error.splits:
            found = " and ".join(sorted(error.splits))
            raise ConfigError(
                f"{config.corpus} holds files of {found} only: name one of them, or --split all"
            ) from None
        config, split = config.model_copy(update={"splits": "fraction"}), ALL
        source = locate(config)
    split = split or ("val" if is_own else published_split(source, prepared_manifest(source)))
    if is_own and split == "val" and eval_tokens is None:
        eval_tokens = checkpoint.identity.get("eval_tokens") or EVAL_TOKENS
    limit = eval_tokens if isinstance(eval_tokens, int) else None
    name = config.corpus
    how: dict[str, Any] = {"name": name, "split": split, "by_document": by_document}
    if isinstance(source, Corpus) and (by_document or split == ALL or not is_own):
        loaded = _tokenizer_for_text(checkpoint, tokenizer, name)
        source.fetch(log)
        part: dict[str, Any] = {"split": split, "val_fraction": config.val_fraction, "by_document": by_document}
        passages = TextPassages(source, loaded, **part)
        known = {"token_bytes": loaded.token_bytes(), "tokenizer": loaded}
        return Text(**how, **known, passages=passages, limit=limit, trained_on=_is_trained_on(config, checkpoint))
    prepare(config, log=log)
    dataset = open_dataset(config)
    _check_tokenizer(dataset, checkpoint)
    marks = _tokenizer_of_tokens(checkpoint, tokenizer)
    whole = None if limit is None or by_document else block_size
    tokens = TokenPassages(
        dataset,
        split=split,
        separator=marks.document_separator if marks else None,
        by_document=by_document,
        whole_windows=whole,
    )
    known = {"token_bytes": dataset.token_bytes, "tokenizer": marks}
    if limit is not None and whole is not None:
        limit = max(1, limit // whole) * whole
    trained_on = checkpoint.identity.get("data.fingerprint") == dataset.manifest["fingerprint"]
    return Text(**how, **known, passages=tokens, limit=limit, trained_on=trained_on)


def _check_tokenizer(dataset: Dataset, checkpoint: Checkpoint) -> None:
    corpus_tokenizer = dataset.manifest["tokenizer"]
    hashes = {tokenizer_origin(checkpoint).sha256, corpus_tokenizer["sha256"]} - {None}
    if dataset.vocab_size > checkpoint.identity["model.vocab_size"] or len(hashes) > 1:
        raise _other_tokenizer(str(dataset.folder), corpus_tokenizer["spec"], checkpoint)


def _other_tokenizer(name: str, spec: str, checkpoint: Checkpoint) -> ConfigError:
    return ConfigError(
        f"{name} was tokenized with another {spec} than {checkpoint.path} was trained with; leave out --tokenizer, or "
        "prepare the corpus with the tokenizer in the checkpoint"
    )


def _tokenizer_for_text(checkpoint: Checkpoint, spec: str | None, name: str) -> Tokenizer:
    if spec is not None and parse_spec(spec)[0] == "sentencepiece":  # it would be trained on this text
        raise ConfigError(f"--tokenizer {spec} would be trained on {name}: leave it out, or name the file of a model")
    loaded = checkpoint_tokenizer(checkpoint, spec)
    if loaded is None:
        raise ConfigError(f"{checkpoint.path} has no tokenizer for the text of {name}: name it with --tokenizer")
    return loaded


def _tokenizer_of_tokens(checkpoint: Checkpoint, spec: str | None) -> Tokenizer | None:
    """The tokenizer, if it can be had, of tokens that can be scored without."""
    try:
        is_size = spec is not None and parse_spec(spec)[0] == "sentencepiece"
        return checkpoint_tokenizer(checkpoint, None if is_size else spec)
    except ConfigError as error:
        print_line(f"no words are counted: {error}")
        return None


def _is_trained_on(config: DataConfig, checkpoint: Checkpoint) -> bool:
    """Whether the model was trained on a corpus of this content, with the settings of its run."""
    same = {"corpus": config.corpus, "path": config.path, "text_column": config.text_column}
    try:
        trained = build(DataConfig, dict(checkpoint.data.get("settings") or {}) | same)
        return checkpoint.identity.get("data.fingerprint") == fingerprint(trained)
    except ConfigError:
        return False


def data_config(
    checkpoint: Checkpoint,
    *,
    corpus: str | None,
    source: str | None = None,
    tokenizer: str | None = None,
    **others: Any,
) -> tuple[DataConfig, bool]:
    """Returns the config of `corpus` with the model's tokenizer, and whether it is the corpus of the training run.

    That is the default. `source` is a local copy of it; `others` are further settings of `data`, None for the default.
    """
    settings = dict(checkpoint.data.get("settings") or {})
    if corpus is None and not settings:
        raise ConfigError(f"{checkpoint.path} does not say what it was trained on: name it with --corpus")
    is_own = corpus is None or (bool(settings) and is_same_corpus(corpus, settings["corpus"]))
    if not is_own:
        spec = saved_tokenizer(checkpoint) or tokenizer_origin(checkpoint).spec
        settings = {"corpus": corpus} | ({"tokenizer": spec} if spec else {})
    given = {"path": source, "tokenizer": tokenizer} | others
    return build(DataConfig, settings | {name: value for name, value in given.items() if value is not None}), is_own


def is_same_corpus(name: str, other: str) -> bool:
    """Whether two names mean the same corpus. Paths are resolved first; names in `CORPORA` are compared literally."""
    if CORPORA.keys() & {name, other}:
        return name == other
    return os.path.realpath(os.path.expanduser(name)) == os.path.realpath(os.path.expanduser(other))
