"""The one command: read a campaign, run it or go on with it, and say what came out.

    python run_campaign.py experiments/quickstart.yaml              run, or resume where it stopped
    python run_campaign.py experiments/quickstart.yaml --plan       what would run, and how long it would take
    python run_campaign.py status results/quickstart                where a campaign stands, also while it runs
    python run_campaign.py report results/quickstart                rebuild every derived file from the journal
    python run_campaign.py compare results/one results/other        two campaigns side by side, arm by arm
    python run_campaign.py claims results/one results/other         every claim that they tested, on one page
    python run_campaign.py verify results/quickstart                whether its files are as they were written
    python run_campaign.py doctor                                   what would go wrong on this machine

Exit codes: 0 all trials finished; 1 internal error; 2 usage or configuration; 3 another run holds the results;
4 finished, but some trials failed or diverged, or stopped by the budget; 74 input or output; 130 interrupted;
143 terminated; 129 its terminal was closed.
"""

import argparse
import io
import json
import os
import shlex
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

SMOKE = "-smoke"  # end of the name of the results directory of --smoke
EXIT_ERROR, EXIT_USAGE, EXIT_BUSY, EXIT_UNSUCCESSFUL, EXIT_IO, EXIT_INTERRUPTED = 1, 2, 3, 4, 74, 130


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code; user errors are one message on stderr."""
    given = sys.argv[1:] if arguments is None else arguments
    verb = VERBS.get(given[0] if given else "")
    options = verb_parser(given[0]).parse_args(given[1:]) if verb else run_parser().parse_args(given)

    from ngpt.config.base import ConfigError
    from ngpt.data.tokens.shards import CorruptShardError
    from tune.format import PORTABLE

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=PORTABLE)  # a terminal without a minus sign is no internal error
    try:
        return (verb or run)(options)
    except (ConfigError, CorruptShardError) as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"{error.filename}: {error.strerror}" if error.filename else error, file=sys.stderr)
        return EXIT_IO
    except (
        KeyboardInterrupt
    ):  # before or after the trials; while they run, a signal is a request (tune/executors/local.py)
        print("interrupted; the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:  # a mistake of ours; the journal of a campaign has it as `crash`
        from ngpt.config.secrets import redacted

        print(redacted("".join(traceback.format_exception(error))), file=sys.stderr, end="")
        print("internal error; what is finished is safe, and the same command goes on", file=sys.stderr)
        return EXIT_ERROR


def run_parser() -> argparse.ArgumentParser:
    """Options of `run_campaign.py CAMPAIGN.yaml`."""
    parser = argparse.ArgumentParser(
        prog="run_campaign.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("campaign", type=Path, help="campaign file, or a verb: " + ", ".join(VERBS))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting of the base")
    parser.add_argument("--plan", action="store_true", help="print trials, tokens, disk and time; start nothing")
    parser.add_argument("--measure", action="store_true", help="with --plan: time a few real steps first")
    parser.add_argument("--inline", action="store_true", help="run in this process, without Ray; same numbers")
    parser.add_argument("--smoke", action="store_true", help="same campaign with a tiny model and few steps")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="where results go")
    parser.add_argument("--address", help="join a running Ray cluster; default is a private one on this machine")
    allow = "go on although the file now says otherwise what the results mean: metric, confidence, data, ..."
    parser.add_argument("--allow-change", action="store_true", help=allow)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON on stdout")
    return parser


def verb_parser(verb: str) -> argparse.ArgumentParser:
    """Options of a verb."""
    parser = argparse.ArgumentParser(prog=f"run_campaign.py {verb}", description=VERBS[verb].__doc__)
    if verb == "doctor":
        parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="where results would go")
    elif verb == "compare":
        parser.add_argument("results", type=Path, help="a results directory, such as results/quickstart")
        parser.add_argument("other", type=Path, help="the results directory to hold against it")
        parser.add_argument("--metric", help="compare by this one; default is the metric of the campaigns")
    elif verb == "claims":
        parser.add_argument("results", type=Path, nargs="+", help="results directories, such as results/quickstart")
        parser.add_argument("--out", type=Path, metavar="FILE", help="write the page there, as docs/claims.md was")
    else:
        parser.add_argument("results", type=Path, help="a results directory, such as results/quickstart")
    if verb in ("claims", "report"):
        text = "judge the `claims:` of this file, instead of those that the campaign was run with"
        parser.add_argument("--claims", type=Path, metavar="FILE", help=text)
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    return parser


def run(options: argparse.Namespace) -> int:
    """Runs a campaign, or goes on with it."""
    from tune.storage.lock import ResultsLocked

    try:
        refuse_second_run(options)
    except ResultsLocked as busy:
        print(busy, file=sys.stderr)
        return EXIT_BUSY

    from tune.campaign import load_campaign
    from tune.planning.smoke import shrink_campaign

    campaign = load_campaign(options.campaign, options.set)
    root = (options.out / campaign.name).absolute()
    if options.smoke:
        campaign, root = shrink_campaign(campaign), root.with_name(root.name + SMOKE)
    if options.plan:
        return plan(campaign, root, options)

    from tune.launch import launch
    from tune.session.session import ExecutorLost

    terminate_in_order()
    command = shlex.join(["python", "run_campaign.py", *sys.argv[1:]])
    try:
        summary, number = launch(
            campaign,
            root,
            command=command,
            inline=options.inline,
            address=options.address,
            allow_change=options.allow_change,
        )
    except ResultsLocked as busy:
        print(busy, file=sys.stderr)
        return EXIT_BUSY
    except ExecutorLost as lost:
        print(lost, file=sys.stderr)
        return EXIT_ERROR
    return show_end(summary, number, root, options)


def refuse_second_run(options: argparse.Namespace) -> None:
    """Looks at the lock of the file's campaign before anything is loaded that takes seconds.

    Raises:
        ResultsLocked: another process runs it.
        ConfigError: the file cannot be read.
    """
    from ngpt.config.yaml_reader import read_yaml
    from tune.storage.lock import refuse_if_running

    data = read_yaml(options.campaign).data
    name = data.get("campaign") if isinstance(data, dict) else None
    if isinstance(name, str) and Path(name).name == name and not options.plan:  # else it is told what is wrong with it
        refuse_if_running((options.out / (name + SMOKE * options.smoke)).absolute())


def terminate_in_order() -> None:
    """SIGTERM and SIGHUP unwind the stack: no Ray and no lock is left behind. Only the main thread may say so."""
    from tune.executors.local import stop_signals

    if threading.current_thread() is threading.main_thread():
        for number in {*stop_signals()} - {signal.SIGINT}:
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def show_end(summary: dict[str, Any], number: int, root: Path, options: argparse.Namespace) -> int:
    """The last screen, and the exit code: a budget that left trials out is 4, since not every trial has finished."""
    from rich.console import Console

    from tune.executors.local import HANGUP
    from tune.terminal.final_screen import final_screen

    try:
        if options.json:
            print(json.dumps(summary, indent=1, allow_nan=False))
        else:
            report = root / "report.html"
            shown = report.relative_to(Path.cwd()) if report.is_relative_to(Path.cwd()) else report
            Console(highlight=False).print(final_screen(summary, report=shown))
        if number:
            print(f"interrupted; to go on: {summary['command']}", file=sys.stderr)
    except OSError:
        if number != HANGUP:
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)  # the terminal is gone; Python would write the rest to it at its end
        for stream in (1, 2):
            os.dup2(nowhere, stream)
    if number:
        return 128 + number
    # 0 says that all the file asks for was trained: what comes next in a script may count on it.
    unsuccessful = summary["trials"]["failed"] + summary["trials"]["diverged"] + len(summary["left_out"])
    return EXIT_UNSUCCESSFUL if unsuccessful else 0


def plan(campaign: Any, root: Path, options: argparse.Namespace) -> int:
    """Prints what would run; starts nothing."""
    from dataclasses import asdict

    from rich.console import Console

    from tune.machine.estimate import estimate
    from tune.terminal.plan_view import plan_view

    estimated = estimate(campaign, root, measure=options.measure)
    if options.json:
        print(json.dumps(asdict(estimated), indent=1, allow_nan=False))
    else:
        Console(highlight=False).print(plan_view(estimated))
    return 0


def status(options: argparse.Namespace) -> int:
    """Shows where a campaign stands, from any terminal, while it runs or after."""
    from dataclasses import asdict

    from rich.console import Console

    from tune.results.status import read_snapshot
    from tune.terminal.live import live_view

    snapshot = read_snapshot(options.results)
    if options.json:
        print(json.dumps(asdict(snapshot), indent=1, allow_nan=False))
    else:
        Console(highlight=False).print(live_view(snapshot))
    return 0


def report(options: argparse.Namespace) -> int:
    """Rebuilds every derived file of a results directory from its journal; with --claims, prints their ledger."""
    from rich.console import Console

    from tune.results.summary import rebuild
    from tune.terminal.final_screen import final_screen

    given = given_claims(options)
    summary = rebuild(options.results, given)
    if given is not None:
        return show_ledger([options.results], given, options)
    if options.json:
        print(json.dumps(summary, indent=1, allow_nan=False))
    else:
        Console(highlight=False).print(final_screen(summary, report=options.results / "report.html"))
    return 0


def claims(options: argparse.Namespace) -> int:
    """Collects what campaigns found about the claims of their files into one Markdown page; changes no results."""
    return show_ledger(options.results, given_claims(options), options, out=options.out)


def given_claims(options: argparse.Namespace) -> Any:
    """The claims of --claims FILE, or None."""
    from tune.claims.reader import load_claims

    return None if options.claims is None else load_claims(options.claims)


def show_ledger(results: list[Path], claims: Any, options: argparse.Namespace, *, out: Path | None = None) -> int:
    """Prints the ledger of some results directories as Markdown or JSON, or writes the Markdown to `out`."""
    from ngpt.system.atomic_files import write_atomic
    from tune.results.claims_ledger import collect, ledger_markdown, total

    ledger = collect(results, claims)
    command = shlex.join(["python", "run_campaign.py", *sys.argv[1:]])
    page = ledger_markdown(ledger, command=command)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, page)
        print(f"{out}: {total(ledger)}", file=sys.stderr)
    if options.json:
        print(json.dumps(ledger, indent=1, allow_nan=False))
    elif out is None:
        print(page, end="")
    return 0


def compare(options: argparse.Namespace) -> int:
    """Holds two results directories against each other: environment, data, settings, and each arm that both have."""
    from rich.console import Console

    from tune.results.compare import compare as compare_results
    from tune.terminal.comparison import comparison_view

    comparison = compare_results(options.results, options.other, metric=options.metric)
    if options.json:
        print(json.dumps(comparison, indent=1, allow_nan=False))
    else:
        Console(highlight=False).print(comparison_view(comparison))
    return 0


def verify(options: argparse.Namespace) -> int:
    """Checks every file of a results directory; exits with 1 if any is wrong, and says which can be rebuilt."""
    from tune.results import verify as checks

    found = checks.verify(options.results)
    print(json.dumps(found, indent=1, allow_nan=False) if options.json else checks.verify_text(found))
    return 0 if found["intact"] else EXIT_ERROR


def doctor(options: argparse.Namespace) -> int:
    """Checks versions, devices, disk and limits, and says what would go wrong."""
    from dataclasses import asdict

    from tune.machine.doctor import run_checks

    checks = run_checks(options.out)
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        for check in checks:
            print(f"{'problem' if check.problem else 'ok':8}{check.name:16}{check.value}")
            if check.problem:
                print(f"{'':24}{check.problem}")
    return 1 if any(check.problem for check in checks) else 0


VERBS = {"status": status, "report": report, "compare": compare, "claims": claims, "verify": verify, "doctor": doctor}

if __name__ == "__main__":
    sys.exit(main())
