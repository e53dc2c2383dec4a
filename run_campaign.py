"""Run a campaign of training runs, resume it, or look at its results.

    python run_campaign.py experiments/quickstart.yaml              run, or resume after an interruption
    python run_campaign.py experiments/quickstart.yaml --plan       show the trials and how long they take
    python run_campaign.py status results/quickstart                progress of a campaign, also while it runs
    python run_campaign.py report results/quickstart                rebuild every derived file from the journal
    python run_campaign.py compare results/one results/other        compare two campaigns, arm by arm
    python run_campaign.py claims results/one results/other         collect the tested claims on one page
    python run_campaign.py verify results/quickstart                check every file against its checksum
    python run_campaign.py prune results/quickstart                 free what finished trials no longer need
    python run_campaign.py judge table.csv                          compare arms in a table of your own
    python run_campaign.py settings learning rate                   find a setting: type, default, meaning
    python run_campaign.py new quickstart                           copy a shipped experiment, or list all
    python run_campaign.py serve results                            show all campaigns in a browser, live
    python run_campaign.py doctor                                   check this machine for problems
    python run_campaign.py completion bash                          print a script that completes this command

Exit codes: 0 all trials finished; 1 internal error, or Ray died too often; 2 usage or configuration; 3 another run
holds the results; 4 finished, but some trials failed, diverged or were left out by the budget; 74 input or output;
129 terminal closed; 130 interrupted; 138, 140 SIGUSR1, SIGUSR2 of a batch system; 141 nobody reads the output any
more (`| head`); 143 terminated.
"""

if __name__ == "__main__":
    from ngpt.system.start import check_installation

    check_installation()

import argparse
import contextlib
import os
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ngpt.code.version import PROGRAM, SCRIPT, command
from ngpt.system.cli import (
    ArgumentParser,
    add_plugin_option,
    add_set_option,
    encode_stdout,
    erase_status,
    has_status_line,
    plugins_for_help,
    print_line,
    run_command,
    show_status,
    whole_number,
)
from tune.remote.places import entry, local_results, location, recordable, report_path, results_name
from tune.terminal.completion import SHELLS
from tune.verbs import VERBS, show


def main(arguments: list[str] | None = None, *, stop: threading.Event | None = None) -> int:
    """Runs one command and returns its exit code; prints user errors on stderr without a traceback.

    Args:
        arguments: those of the command line; None takes them from `sys.argv`. Another program, such as a notebook,
            passes a list; its process then goes on after a second signal, which raises KeyboardInterrupt.
        stop: once another thread sets it, a running campaign saves and stops, and the exit code is 130.
    """
    owns_process = arguments is None
    arguments = sys.argv[1:] if arguments is None else arguments
    verb = VERBS.get(arguments[0] if arguments else "")
    if not verb and arguments and is_word(arguments[0]):
        return run_command(lambda: refuse_word(arguments[0]))
    plugins_for_help(arguments, load_plugins)
    options = verb_parser(arguments[0]).parse_args(arguments[1:]) if verb else run_parser().parse_args(arguments)

    from tune.format import PORTABLE

    options.command = shlex.join([*command().split(), *map(recordable, arguments)])
    options.stop, options.owns_process = stop, owns_process
    resume = "" if verb else "run the same command again to resume"
    out = getattr(options, "out", None)
    with encode_stdout(PORTABLE):  # for terminals that cannot print characters such as the minus sign
        return run_command(
            lambda: run_verb(verb, options) if verb else run(options),
            path=out if isinstance(out, Path) else None,
            interrupted=f"interrupted; {resume}" if resume else "interrupted",
            crashed=f"internal error; finished trials are saved: {resume}" if resume else "internal error",
        )


def is_word(argument: str) -> bool:
    """Whether the first argument can only be meant as a verb: neither an option nor a path."""
    return argument.replace("-", "").isalpha() and not argument.startswith("-") and not os.path.lexists(argument)


def refuse_word(word: str) -> int:
    """Raises ConfigError with the verb or the campaign file that is nearest to `word`."""
    from ngpt.config.base import ConfigError, unknown_message
    from tune.spec.shipped import missing_file_message

    message = unknown_message("verb", word, VERBS)
    raise ConfigError(message if "did you mean" in message else missing_file_message(Path(word)) or message)


def refuse_missing_file(path: Path) -> None:
    """Raises ConfigError with the nearest campaign file if there is none at `path`."""
    from ngpt.config.base import ConfigError
    from tune.spec.shipped import missing_file_message

    if not os.path.lexists(path) and (message := missing_file_message(path)):
        raise ConfigError(message)


def program() -> str:
    """The name of this command in its usage lines."""
    return command().split()[-1]


def run_parser() -> argparse.ArgumentParser:
    """Returns the parser of `run_campaign.py CAMPAIGN.yaml`."""
    parser = ArgumentParser(
        prog=program(),
        description=(__doc__ or "").replace(SCRIPT, command()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("campaign", type=Path, help="campaign file, or a verb: " + ", ".join(VERBS))
    add_run_options(parser)
    return parser


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a run, in the order of its help."""
    add_set_option(parser, help="change settings under `base`; repeatable")
    add_plugin_option(parser)
    parser.add_argument("--plan", action="store_true", help="print trials, tokens, disk and time; start nothing")
    parser.add_argument("--measure", action="store_true", help="with --plan: time a few real steps first")
    parser.add_argument("--inline", action="store_true", help="run in this process, without Ray; same numbers")
    parser.add_argument("--smoke", action="store_true", help="same campaign with a tiny model and a few steps")
    out = "folder for all results, or an address such as s3://bucket/results"
    parser.add_argument("--out", type=location, default=Path("results"), metavar="DIR", help=out)
    parser.add_argument("--address", help="join a running Ray cluster; default: a private one on this machine")
    allow = "resume even if the file changes the meaning of existing results: metric, confidence, data, ..."
    parser.add_argument("--allow-change", action="store_true", help=allow)
    retrain = "train these arms anew if other code trained them; without names, all such trials"
    parser.add_argument("--retrain", nargs="*", metavar="ARM", help=retrain)
    keep = "reuse results although the code has changed since, and mark it in the report"
    parser.add_argument("--keep", action="store_true", help=keep)
    parser.add_argument("--json", action="store_true", help="print the summary, or the plan, as JSON on stdout")


def verb_parser(verb: str) -> ArgumentParser:
    """Returns the parser of `run_campaign.py VERB`."""
    parser = ArgumentParser(prog=f"{program()} {verb}", description=VERBS[verb].__doc__)
    out = "folder for all results, or an address such as s3://bucket/results"
    results = "a results directory, such as results/quickstart or s3://bucket/results/quickstart"
    if verb == "judge":
        parser.add_argument("table", type=Path, help="CSV or TSV file with the columns arm, seed and value")
        parser.add_argument("--baseline", metavar="ARM", help="default: the arm named baseline or base, or the first")
        parser.add_argument("--goal", default="minimize", help="minimize (default) or maximize")
        parser.add_argument("--confidence", type=float, default=0.95, help="default: 0.95")
        effect = "smallest difference that matters, in units of the value; default: 0.005"
        parser.add_argument("--min-effect", type=float, default=0.005, help=effect)
    elif verb == "settings":
        words = "words of the name or meaning, or of another program, such as learning_rate; default: all settings"
        parser.add_argument("words", nargs="*", metavar="WORD", help=words)
        parser.add_argument("--markdown", action="store_true", help="print the page docs/settings.md")
    elif verb == "new":
        name = "such as quickstart or models/30.5M; default: list all"
        parser.add_argument("name", nargs="?", metavar="NAME", help=name)
        parser.add_argument("--out", type=Path, metavar="PATH", help="file or folder to write; default: NAME.yaml")
    elif verb == "completion":
        parser.add_argument("shell", choices=SHELLS, help="the shell that sources the script")
        parser.set_defaults(whole_parser=whole_parser)
    elif verb == "serve":
        folder = "a folder of campaigns, or the results directory of one; default: results"
        parser.add_argument("results", type=location, nargs="?", default=Path("results"), help=folder)
        port = "port on the loopback address, 0 for any free one; default: 8484, or the next free one"
        parser.add_argument("--port", type=whole_number(0, 65535), metavar="PORT", help=port)
        parser.add_argument("--open", action="store_true", help="open the page in a browser")
    elif verb == "doctor":
        parser.add_argument("--out", type=location, default=Path("results"), metavar="DIR", help=out)
    elif verb == "compare":
        parser.add_argument("results", type=location, help=results)
        parser.add_argument("other", type=location, help="the results directory to compare it with")
        parser.add_argument("--metric", help="metric to compare by; default: the metric of the campaigns")
        by = "settings: arms that computed the same (default); name: the effects of arms with the same name"
        parser.add_argument("--by", choices=("settings", "name"), default="settings", help=by)
    elif verb == "claims":
        parser.add_argument("results", type=location, nargs="+", help="results directories, such as results/quickstart")
        parser.add_argument("--out", type=Path, metavar="FILE", help="write the page to this file")
    else:
        parser.add_argument("results", type=location, help=results)
    if verb in ("claims", "report"):
        text = "judge the `claims:` of this file instead of those in the results"
        parser.add_argument("--claims", type=Path, metavar="FILE", help=text)
    if verb in ("claims", "report", "settings"):
        add_plugin_option(parser)
    if verb == "prune":
        parser.add_argument("--dry-run", action="store_true", help="say how much it would free; remove nothing")
    if verb != "completion":
        parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """Returns a parser with the options of a run and all verbs, as shell completion needs it."""
    parser = ArgumentParser(prog=PROGRAM)
    add_run_options(parser)
    verbs = parser.add_subparsers()
    for verb, function in VERBS.items():
        summary = (function.__doc__ or "").partition(";")[0]
        verbs.add_parser(verb, parents=[verb_parser(verb)], help=summary, conflict_handler="resolve")
    return parser


def run_verb(verb: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Runs a verb; results in an object store are copied for it, and `report` uploads what it has rebuilt."""
    options.shown = {}  # where the results are, for messages
    with contextlib.ExitStack() as stack:
        for name in ("results", "other"):
            if (place := getattr(options, name, None)) is not None:
                options.shown[name] = place
                copy = partial(local_results, stack=stack, verb=verb.__name__)
                setattr(options, name, [*map(copy, place)] if isinstance(place, list) else copy(place))
        if hasattr(options, "plugin"):
            load_plugins(options.plugin)
        return verb(options)


def load_plugins(given: Sequence[str], results: Path | None = None) -> None:
    """Loads plug-ins, which imports torch; messages about unknown names use what the manifest in `results` says."""
    from tune.spec.plugins import use_campaign_plugins

    use_campaign_plugins(given, results)


def run(options: argparse.Namespace) -> int:
    """Runs a campaign, or resumes it."""
    refuse_missing_file(options.campaign)
    folder = refuse_second_run(options)
    if has_status_line():
        show_status(lambda width: f"reading {options.campaign}, loading PyTorch ..."[:width])
    load_plugins(options.plugin, folder)

    from tune.campaign import load_campaign
    from tune.planning.smoke import shrink_campaign

    campaign = load_campaign(options.campaign, options.set)
    name = results_name(campaign.name, smoke=options.smoke)
    if options.smoke:
        campaign = shrink_campaign(campaign)
    if options.plan:
        return plan(campaign, name, options)

    from tune.executors.signals import exit_on_signals
    from tune.launch import launch_at

    with exit_on_signals():
        summary, signal_number = launch_at(
            campaign,
            name,
            options.out,
            command=options.command,
            stop=options.stop,
            inline=options.inline,
            address=options.address,
            allow_change=options.allow_change,
            retrain=options.retrain,
            keep=options.keep,
            owns_process=options.owns_process,
        )
        return show_end(summary, signal_number, report_path(entry(options.out, name)), options)


def refuse_second_run(options: argparse.Namespace) -> Path | None:
    """Checks the lock of the campaign before importing torch, which takes seconds; returns the results on this host.

    Raises:
        ResultsLocked: another process runs the campaign.
        ConfigError: the campaign file cannot be read.
    """
    from ngpt.config.yaml_reader import read_yaml
    from tune.storage.lock import refuse_if_running

    data = read_yaml(options.campaign).data
    name = data.get("campaign") if isinstance(data, dict) else None
    is_valid = isinstance(name, str) and Path(name).name == name  # otherwise load_campaign reports the error
    if not is_valid or not isinstance(options.out, Path):
        return None
    folder = (options.out / results_name(str(name), smoke=options.smoke)).absolute()
    if not options.plan:
        refuse_if_running(folder)
    return folder


def show_end(summary: Any, signal_number: int, report: Any, options: argparse.Namespace) -> int:
    """Prints the final screen, which names the path or address `report`, and returns the exit code."""
    from ngpt.system.signals import HANGUP
    from tune.launch import exit_code
    from tune.terminal.final_screen import final_screen

    try:
        show(options, summary, lambda: final_screen(summary, report=report))
        if signal_number or summary.status == "interrupted":
            print_line(f"interrupted; to resume: {summary.command}")
    except OSError:
        if signal_number != HANGUP:
            raise
        devnull = os.open(os.devnull, os.O_WRONLY)  # the terminal is closed, but Python flushes both streams at exit
        for stream in (1, 2):
            os.dup2(devnull, stream)
    return exit_code(summary, signal_number)


def plan(campaign: Any, name: str, options: argparse.Namespace) -> int:
    """Prints the plan without starting any trial."""
    from tune.api import estimate_at
    from tune.terminal.plan_view import plan_view

    how = {"measure": options.measure, "retrain": options.retrain, "keep": options.keep}
    estimated = estimate_at(campaign, name, options.out, **how)
    erase_status()
    show(options, estimated, lambda: plan_view(estimated))
    return 0


if __name__ == "__main__":
    sys.exit(main())
