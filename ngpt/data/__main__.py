"""python -m ngpt.data CORPUS [--tokenizer T] [--from PATH] [--out DIR]: prepares a corpus and counts its tokens."""

if __name__ == "__main__":
    from ngpt.system.start import start_command

    start_command()  # the imports below take seconds

import argparse
import json
from pathlib import Path

from ngpt.config.visible import visible
from ngpt.system.cache import cache_folder
from ngpt.system.cli import (
    ArgumentParser,
    add_plugin_option,
    exit_process,
    print_line,
    run_command,
    use_plugins,
    whole_number,
)

EXPLANATION = """\
CORPUS
  python-docs   the documentation inside this Python, 2 MB of technical English; needs no network
  shakespeare   tiny Shakespeare, 1.1 MB, from karpathy/char-rnn, or --from FILE
  fineweb       FineWeb10B, tokenized with GPT-2's BPE: --shards N files of 100 million tokens (200 MB each, 103 in
                all) and one for validation, from kjj0/fineweb10B-gpt2 on the hub, or --from DIR
  openwebtext   --shards N Parquet files of the hub's Skylion007/openwebtext, or --from a file or folder of documents
                as below, or .txt (a document each)
  hf://OWNER/NAME[@REVISION][/SUBSET][:SPLIT]
                a data set of the Hugging Face hub: Parquet, Arrow, JSON, CSV or text files, with the subsets and splits
                that it declares, else by the names of its files; it stays the commit that it was at the first use
  PATH          documents: Parquet, Arrow (also a data set saved by save_to_disk), JSON lines, a JSON array of objects,
                recognised whatever the suffix, or .csv or .tsv, with the text in the column "text" or --text-column;
                a text file; a folder of text files; token files, see below; a folder that this command has filled.
                JSON, CSV and text may be .gz, .zst, .bz2 or .xz

SPLITS
  Files and folders are assigned to splits by the words of their names: train, training; val, valid, validation, dev;
  test. So train.bin, wiki.valid.txt, train-00000-of-00005.parquet and data/test/0.jsonl are read as published. The
  test split is never trained on; python -m ngpt.evaluate --split test scores it. Files that are named for no split
  are trained on. Without files for validation, val_fraction takes it from what is trained on. --splits fraction
  ignores the names.

TOKEN FILES
  .bin of llm.c (versions 1 and 7), of modded-nanogpt and of Megatron (with its .idx), .npy, and bare uint16 as nanoGPT
  writes it. Bare files that look wider, or like 8-bit tokens, are refused unless --token-dtype says what they hold.

TOKENIZER
  sentencepiece:SIZE   trained on the train split, once; byte-level fallback, loses nothing
  PATH.model           a sentencepiece model, such as LLaMA's
  tokenizer.json       a tokenizer of Hugging Face's tokenizers (extra hf); hf:DIR is the tokenizer.json in DIR, or its
                       vocab.json with merges.txt
  gpt2, gpt2:DIR       GPT-2's BPE through tiktoken (extra gpt2), downloaded, or DIR with encoder.json and vocab.bpe
  tiktoken:NAME        an encoding of tiktoken, downloaded: r50k_base, p50k_base, cl100k_base, o200k_base
  tiktoken:NAME:FILE   the same, or llama3 or qwen, from a file of ranks; FILE.tiktoken alone if it is a published one

Documents start with the tokenizer's mark: <|endoftext|> of GPT-2, a model's start of text, or what its post-processor
puts before a text. A tokenizer without one ends them with an empty line. Special tokens in a text are plain text.
Whole documents go to either split by their hash; of a plain text, the end is validation.

Downloads from the hub need huggingface_hub (extra hf). They are kept in $NGPT_CACHE/downloads (default ~/.cache/ngpt),
resumed after an interruption, and checked against the published SHA-256. HF_ENDPOINT names another hub. An interrupted
preparation continues with the first unfinished shard: run the same command again.

Corrupt shards (damaged, truncated, of another format, with tokens outside the vocabulary) are found before training.
--on-corrupt skip logs them and leaves them out of every trial; fail names all of them and stops.

exit codes: 0 prepared; 2 usage, missing files, no network; 74 disk full or not writable; 130 interrupted
"""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    again = "interrupted; run the same command again to continue"
    return run_command(lambda: _prepare(options), path=options.out or cache_folder(), interrupted=again)


def _prepare(options: argparse.Namespace) -> int:
    # Imported after parsing, so that --help does not wait for numpy and pydantic.
    from ngpt.config.base import build
    from ngpt.data.dataset import DataConfig, open_dataset, prepare
    from ngpt.data.text.progress import TerminalLog

    use_plugins(options.plugin)
    given = vars(options)
    settings = {name: given[name] for name in DataConfig.model_fields if given.get(name) is not None}
    config = build(DataConfig, settings)
    log = TerminalLog(quiet=options.json)
    folder = prepare(config, out=options.out, log=log, workers=options.workers)
    manifest = open_dataset(DataConfig(corpus=str(folder))).manifest
    print_line(f"in {folder}")
    if options.json:
        print(json.dumps(manifest | {"folder": str(folder)}))
        return 0
    for split in sorted(manifest["splits"], key=("train", "val", "test").index):
        print(f"{visible(split)} has {manifest['splits'][split]['tokens']:,} tokens")
    print(f"vocabulary has {manifest['vocab_size']:,} tokens")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m ngpt.data",
        description="Prepare a corpus: get it, tokenize it once, write shards and a manifest, count its tokens.",
        epilog=EXPLANATION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("corpus", metavar="CORPUS", help="a name or a path, see below")
    parser.add_argument("--tokenizer", metavar="T", help="see below (default sentencepiece:2048; fineweb has its own)")
    parser.add_argument("--from", dest="path", metavar="PATH", help="local copy of a corpus that is downloaded")
    parser.add_argument("--text-column", metavar="C", help="column of the documents (default text); a.b is b inside a")
    of_shards = "files to take of a corpus in parts (default 1)"
    parser.add_argument("--shards", type=whole_number(1, 10**6), metavar="N", help=of_shards)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: $NGPT_CACHE or ~/.cache/ngpt")
    parser.add_argument("--val-fraction", type=float, metavar="F", help="share of the validation split (default 0.1)")
    parser.add_argument("--splits", metavar="S", help="names (default) or fraction, see above")
    widths = "width of token files without a header: uint16, uint32, int32, int64, ..."
    parser.add_argument("--token-dtype", metavar="D", help=widths)
    of_workers = "threads that tokenize (default: one per core)"
    parser.add_argument("--workers", type=whole_number(1, 1024), metavar="N", help=of_workers)
    parser.add_argument("--on-corrupt", metavar="P", help="skip (default) or fail")
    add_plugin_option(parser)
    parser.add_argument("--json", action="store_true", help="print the manifest as one JSON object")
    return parser


if __name__ == "__main__":
    exit_process(main())
