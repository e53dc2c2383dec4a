"""python -m ngpt.data CORPUS [--tokenizer T] [--from PATH] [--out DIR]: prepares a corpus and counts its tokens."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

EXIT_USAGE = 2
EXIT_IO = 74  # EX_IOERR of sysexits.h


def main(arguments: list[str] | None = None) -> int:
    """Prepares what the command line names; returns the exit code."""
    options = _parser().parse_args(arguments)
    # After parsing, so that --help does not wait for numpy and pydantic.
    from ngpt.config import ConfigError, build
    from ngpt.data.corpora import DataConfig, open_dataset, prepare
    from ngpt.data.shards import CorruptShardError

    given = {
        "corpus": options.corpus,
        "tokenizer": options.tokenizer,
        "path": options.source,
        "val_fraction": options.val_fraction,
    }
    try:
        config = build(DataConfig, {name: value for name, value in given.items() if value is not None})
        folder = prepare(config, out=options.out, log=_progress)
        dataset = open_dataset(DataConfig(corpus=str(folder)))
    except (ConfigError, CorruptShardError) as error:
        print(f"ngpt.data: {'; '.join(str(error).splitlines())}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"ngpt.data: {error}", file=sys.stderr)
        return EXIT_IO
    _progress(f"in {folder}")
    print(json.dumps(dataset.manifest | {"folder": str(folder)}) if options.json else _table(dataset.manifest))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ngpt.data", description="Prepare a corpus: tokenize it once, write shards and a manifest."
    )
    corpora = "python-docs, shakespeare, a text file, or a folder of text files or of .bin shards"
    tokenizers = "sentencepiece:SIZE (default sentencepiece:2048), PATH.model, gpt2, gpt2:DIR"
    parser.add_argument("corpus", metavar="CORPUS", help=corpora)
    parser.add_argument("--tokenizer", metavar="T", help=tokenizers)
    parser.add_argument("--from", dest="source", metavar="PATH", help="local copy of a corpus that is downloaded")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: $NGPT_CACHE or ~/.cache/ngpt")
    parser.add_argument("--val-fraction", type=float, metavar="F", help="share of the validation split (default 0.1)")
    parser.add_argument("--json", action="store_true", help="print the manifest as one JSON object")
    return parser


def _table(manifest: dict[str, Any]) -> str:
    lines = [f"{split} has {counts['tokens']:,} tokens" for split, counts in manifest["splits"].items()]
    return "\n".join([*lines, f"vocabulary has {manifest['vocab_size']:,} tokens"])


def _progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
