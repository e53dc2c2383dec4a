"""Serves a trained model to clients of OpenAI's API.

python -m ngpt.serve results/quickstart      the best trial of the campaign's winner
python -m ngpt.serve runs/first
curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "first", "prompt": "The iterator", "max_tokens": 20}'

The address goes to stdout, everything else to stderr.
"""

if __name__ == "__main__":
    from ngpt.system.start import start_command

    start_command()  # the imports below take seconds

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

from ngpt.config.base import ConfigError
from ngpt.config.visible import visible
from ngpt.export.campaign import best_trial
from ngpt.system.cli import ArgumentParser, exit_process, print_line, run_command, use_plugins, whole_number
from ngpt.training.load_model import add_model_arguments, parse_model_changes

DEFAULT_PORT = 8000
EXTRA = ("uvicorn", "starlette", "prometheus_client")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _serve(options), path=options.checkpoint)


def _serve(options: argparse.Namespace) -> int:
    if missing := [name for name in EXTRA if find_spec(name) is None]:
        raise ConfigError(f"ngpt.serve needs {missing[0]}: pip install 'ngpt-campaign[serve]'")
    from ngpt.serve.access import address_of, check_address, read_token
    from ngpt.serve.app import Service
    from ngpt.serve.chat import ChatTemplate
    from ngpt.serve.engine import Engine
    from ngpt.serve.metrics import Metrics
    from ngpt.serve.server import Server, ended_early, listen, url_of
    from ngpt.serve.work import Limits

    if not options.checkpoint.is_dir():  # before anybody is told an address
        raise ConfigError(f"{options.checkpoint}: no such folder")
    token = read_token(options.token_file)
    address = address_of(options.host)
    check_address(address, token)
    name = options.model_name or options.checkpoint.resolve().name
    path = options.checkpoint
    if (found := best_trial(path)) is not None:
        path, text = found
        print_line(text)
    changes = parse_model_changes(options.set)
    template = None if options.chat_template is None else ChatTemplate(options.chat_template)

    def load() -> Engine:
        use_plugins(options.plugin)
        source = {"best": options.best, "tokenizer": options.tokenizer, "device": options.device}
        how = {"slots": options.slots, "dtype": options.dtype, "changes": changes}
        return Engine(path, name=name, **source, **how)

    limits = Limits(options.max_prompt, options.max_tokens, options.max_body, options.timeout)
    service = Service(name, limits, Metrics(), template)
    opened = listen(address, options.port)
    url = f"{url_of(opened)}/v1"

    def announce() -> None:
        line = json.dumps({"url": url, "model": name}) if options.json else f"{name}: {url} (Ctrl-C ends)"
        print(visible(line), flush=True)

    server = Server(service, token, load=load, queue=options.queue, grace=options.grace, announce=announce)
    return ended_early(server.run_until_signal(opened))


def _seconds(text: str) -> float:
    """The argparse type of a duration."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, above 0 and at most 86,400, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python -m ngpt.serve", description="Serve a trained model with OpenAI's API.")
    add_model_arguments(parser)
    add = parser.add_argument
    tokenizers = "as for python -m ngpt.data, if the checkpoint does not have its own"
    add("--tokenizer", metavar="SPEC", help=tokenizers)
    add("--model-name", metavar="NAME", help="as requests name the model; default: the name of the folder")
    add("--chat-template", type=Path, metavar="FILE", help="Jinja template that turns a chat into a prompt")
    add("--host", default="127.0.0.1", help="address to listen on, default 127.0.0.1; any other machine needs a token")
    add("--port", type=whole_number(0, 65_535), default=DEFAULT_PORT, help=f"default {DEFAULT_PORT}; 0: any free one")
    token = "file with the token that requests need; default: $NGPT_SERVE_TOKEN, if it is set"
    add("--token-file", type=Path, metavar="FILE", help=token)
    add("--slots", type=whole_number(1, 4096), default=16, metavar="N", help="choices that run at a time, default 16")
    add("--queue", type=whole_number(0, 100_000), default=64, metavar="N", help="that wait; default 64; others get 429")
    most = whole_number(1, 2**31 - 1)
    add("--max-prompt", type=most, metavar="N", help="tokens of a prompt; default: the context")
    add("--max-tokens", type=most, metavar="N", help="tokens of an answer; default: the context")
    add("--max-body", type=most, default=1 << 20, metavar="BYTES", help="of a request, default 1 MiB")
    add("--timeout", type=_seconds, default=600.0, metavar="S", help="seconds of a request, default 600")
    grace = "seconds that running requests have to finish after SIGTERM or Ctrl-C, default 30"
    add("--grace", type=_seconds, default=30.0, metavar="S", help=grace)
    add("--json", action="store_true", help="print the address as JSON")
    return parser


if __name__ == "__main__":
    exit_process(main())
