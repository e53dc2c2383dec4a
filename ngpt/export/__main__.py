"""Exports a model to Hugging Face's transformers.

python -m ngpt.export results/quickstart quickstart-hf              the best trial of the campaign's winner
python -m ngpt.export results/quickstart/trials/ID --to hf DIR      one trial
python -m ngpt.export runs/first --best --to hf DIR                 a run, its checkpoint with the lowest loss

Writes DIR with model.safetensors, config.json, generation_config.json, the tokenizer and a model card. A nanochat-style
GPT becomes transformers' NanoChat, a Llama-like one its Llama or Qwen2. nGPT has no class there: DIR then has its code,
modeling_ngpt.py, which transformers runs with trust_remote_code=True only. DIR appears once its logits have been
compared with the model's. `python -m ngpt.push DIR --to OWNER/NAME` uploads it; `python -m ngpt.convert DIR` reads it.
"""

if __name__ == "__main__":
    from ngpt.system.start import start_command

    start_command()  # the imports below take seconds

import argparse
from pathlib import Path

from ngpt.config.visible import visible
from ngpt.export.campaign import best_trial
from ngpt.export.families import REMOTE_CODE, import_transformers
from ngpt.export.folder import check_free, export_model
from ngpt.system.cli import (
    ArgumentParser,
    add_plugin_option,
    add_set_option,
    exit_process,
    print_line,
    run_command,
    use_plugins,
)
from ngpt.training.load_model import load_model, parse_model_changes

FORMATS = ("hf",)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _export(options), path=options.out)


def _export(options: argparse.Namespace) -> int:
    use_plugins(options.plugin)
    check_free(options.out)
    import_transformers()  # before the model is loaded, which may take long
    path = options.checkpoint
    if (found := best_trial(path)) is not None:
        path, text = found
        print_line(text)
    loaded = load_model(path, best=options.best, tokenizer=options.tokenizer, **parse_model_changes(options.set))
    exported = export_model(loaded, options.out, tokenizer=options.tokenizer, verify=not options.no_verify)
    print_line(f"{loaded.checkpoint.path} as {exported.family.model_class} of transformers")
    print_line(exported.checked)
    if exported.family.is_remote_code:
        print_line(f"load it with trust_remote_code=True: that runs {REMOTE_CODE} of this folder, so read it first")
    if exported.missing:
        print_line(f"the folder lacks {exported.missing}")
    print(visible(options.out))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m ngpt.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = "folder of a checkpoint, of a run or trial (its newest intact checkpoint), or the results of a campaign"
    parser.add_argument("checkpoint", type=Path, metavar="RUN", help=folder)
    parser.add_argument("out", type=Path, metavar="DIR", help="output folder, which must not exist or be empty")
    parser.add_argument("--to", choices=FORMATS, default="hf", help="format; default: hf")
    parser.add_argument("--best", action="store_true", help="use the checkpoint with the lowest validation loss")
    parser.add_argument("--tokenizer", metavar="SPEC", help="as for ngpt.data, if the checkpoint does not have its own")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the logits")
    add_plugin_option(parser)
    add_set_option(parser, help="change settings of the model, such as rope_scaling=yarn rope_factor=4 block_size=512")
    return parser


if __name__ == "__main__":
    exit_process(main())
