"""Run a campaign of training runs, resume it, or look at its results.

    python run_campaign.py experiments/quickstart.yaml              run, or resume after an interruption
    python run_campaign.py experiments/quickstart.yaml --plan       show the trials and how long they take
    python run_campaign.py status results/quickstart                progress of a campaign, also while it runs
    python run_campaign.py report results/quickstart                rebuild every derived file from the journal
    python run_campaign.py compare results/one results/other        compare two campaigns, arm by arm
    python run_campaign.py claims results/one results/other         collect the tested claims on one page
    python run_campaign.py verify results/quickstart                check every file against its checksum
    python run_campaign.py judge table.csv                          compare arms in a table of your own
    python run_campaign.py doctor                                   check this machine for problems

Exit codes: 0 all trials finished; 1 internal error, or Ray died too often; 2 usage or configuration; 3 another run
holds the results; 4 finished, but some trials failed, diverged or were left out by the budget; 74 input or output;
129 terminal closed; 130 interrupted; 138, 140 SIGUSR1, SIGUSR2 of a batch system; 143 terminated.
"""

import argparse
import json
import os
import shlex
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ngpt.config.visible import visible
from ngpt.system.cli import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_UNSUCCESSFUL,
    ArgumentParser,
    encode_stdout,
    print_line,
    run_command,
)

SMOKE = "-smoke"  # suffix of the results directory of --smoke


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
    options = verb_parser(arguments[0]).parse_args(arguments[1:]) if verb else run_parser().parse_args(arguments)

    from tune.format import PORTABLE

    options.command = shlex.join(["python", "run_campaign.py", *arguments])
    options.stop, options.owns_process = stop, owns_process
    resume = "" if verb else "run the same command again to resume"
    with encode_stdout(PORTABLE):  # for terminals that cannot print characters such as the minus sign
        return run_command(
            lambda: (verb or run)(options),
            path=getattr(options, "out", None),
            prints_only=verb is not None,
            interrupted=f"interrupted; {resume}" if resume else "interrupted",
            crashed=f"internal error; finished trials are saved: {resume}" if resume else "internal error",
        )


def run_parser() -> argparse.ArgumentParser:
    """Returns the parser of `run_campaign.py CAMPAIGN.yaml`."""
    parser = ArgumentParser(
        prog="run_campaign.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("campaign", type=Path, help="campaign file, or a verb: " + ", ".join(VERBS))
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting under `base`; repeatable"
    )
    parser.add_argument("--plan", action="store_true", help="print trials, tokens, disk and time; start nothing")
    parser.add_argument("--measure", action="store_true", help="with --plan: time a few real steps first")
    parser.add_argument("--inline", action="store_true", help="run in this process, without Ray; same numbers")
    parser.add_argument("--smoke", action="store_true", help="same campaign with a tiny model and a few steps")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="folder for all results")
    parser.add_argument("--address", help="join a running Ray cluster; default: a private one on this machine")
    allow = "resume even if the file changes the meaning of existing results: metric, confidence, data, ..."
    parser.add_argument("--allow-change", action="store_true", help=allow)
    retrain = "train these arms anew if other code trained them; without names, all such trials"
    parser.add_argument("--retrain", nargs="*", metavar="ARM", help=retrain)
    keep = "reuse results although the code has changed since, and mark it in the report"
    parser.add_argument("--keep", action="store_true", help=keep)
    parser.add_argument("--json", action="store_true", help="print the summary, or the plan, as JSON on stdout")
    return parser


def verb_parser(verb: str) -> argparse.ArgumentParser:
    """Returns the parser of `run_campaign.py VERB`."""
    parser = ArgumentParser(prog=f"run_campaign.py {verb}", description=VERBS[verb].__doc__)
    results = "a results directory, such as results/quickstart"
    if verb == "judge":
        parser.add_argument("table", type=Path, help="CSV or TSV file with the columns arm, seed and value")
        parser.add_argument("--baseline", metavar="ARM", help="default: the arm named baseline or base, or the first")
        parser.add_argument("--goal", default="minimize", help="minimize (default) or maximize")
        parser.add_argument("--confidence", type=float, default=0.95, help="default: 0.95")
        effect = "smallest difference that matters, in units of the value; default: 0.005"
        parser.add_argument("--min-effect", type=float, default=0.005, help=effect)
    elif verb == "doctor":
        parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="folder for all results")
    elif verb == "compare":
        parser.add_argument("results", type=Path, help=results)
        parser.add_argument("other", type=Path, help="the results directory to compare it with")
        parser.add_argument("--metric", help="metric to compare by; default: the metric of the campaigns")
    elif verb == "claims":
        parser.add_argument("results", type=Path, nargs="+", help="results directories, such as results/quickstart")
        parser.add_argument("--out", type=Path, metavar="FILE", help="write the page to this file")
    else:
        parser.add_argument("results", type=Path, help=results)
    if verb in ("claims", "report"):
        text = "judge the `claims:` of this file instead of those in the results"
        parser.add_argument("--claims", type=Path, metavar="FILE", help=text)
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    return parser


def run(options: argparse.Namespace) -> int:
    """Runs a campaign, or resumes it."""
    refuse_second_run(options)

    from tune.campaign import load_campaign
    from tune.planning.smoke import shrink_campaign

    campaign = load_campaign(options.campaign, options.set)
    root = (options.out / campaign.name).absolute()
    if options.smoke:
        campaign, root = shrink_campaign(campaign), root.with_name(root.name + SMOKE)
    if options.plan:
        return plan(campaign, root, options)

    from tune.executors.signals import exit_on_signals
    from tune.launch import launch

    with exit_on_signals():
        summary, signal_number = launch(
            campaign,
            root,
            command=options.command,
            inline=options.inline,
            address=options.address,
            allow_change=options.allow_change,
            retrain=options.retrain,
            keep=options.keep,
            stop=options.stop,
            owns_process=options.owns_process,
        )
        return show_end(summary, signal_number, root, options)


def refuse_second_run(options: argparse.Namespace) -> None:
    """Checks the lock of the campaign before importing torch, which takes seconds.

    Raises:
        ResultsLocked: another process runs the campaign.
        ConfigError: the campaign file cannot be read.
    """
    from ngpt.config.yaml_reader import read_yaml
    from tune.storage.lock import refuse_if_running

    data = read_yaml(options.campaign).data
    name = data.get("campaign") if isinstance(data, dict) else None
    is_valid = isinstance(name, str) and Path(name).name == name  # otherwise load_campaign reports the error
    if is_valid and not options.plan:
        refuse_if_running((options.out / f"{name}{SMOKE if options.smoke else ''}").absolute())


def show_end(summary: Any, signal_number: int, root: Path, options: argparse.Namespace) -> int:
    """Prints the final screen and returns the exit code."""
    from ngpt.system.signals import HANGUP
    from tune.terminal.final_screen import final_screen

    report = root / "report.html"
    if report.is_relative_to(Path.cwd()):
        report = report.relative_to(Path.cwd())
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
    if signal_number:
        return 128 + signal_number
    if summary.status == "interrupted":  # by another thread
        return EXIT_INTERRUPTED
    # Trials left out by the budget count too: exit code 0 promises that every trial finished.
    unsuccessful = summary.trials.failed + summary.trials.diverged + len(summary.left_out)
    return EXIT_UNSUCCESSFUL if unsuccessful else 0


def show(options: argparse.Namespace, data: Any, view: Callable[[], Any]) -> None:
    """Prints `data` as JSON with --json, otherwise as text for the terminal."""
    from rich.console import Console

    from ngpt.system.atomic_files import naming
    from tune.storage.summaries import to_json

    if options.json:
        print(json.dumps(to_json(data), indent=1, allow_nan=False))
        return
    with naming("stdout"):
        Console(highlight=False).print(view())


def plan(campaign: Any, root: Path, options: argparse.Namespace) -> int:
    """Prints the plan without starting any trial."""
    from tune.machine.estimate import estimate
    from tune.terminal.plan_view import plan_view

    estimated = estimate(campaign, root, measure=options.measure, retrain=options.retrain, keep=options.keep)
    show(options, estimated, lambda: plan_view(estimated))
    return 0


def status(options: argparse.Namespace) -> int:
    """Shows the progress of a campaign, from any terminal, while it runs or later."""
    from tune.results.status import read_snapshot
    from tune.terminal.live import live_view

    snapshot = read_snapshot(options.results)
    show(options, snapshot, lambda: live_view(snapshot))
    return 0


def report(options: argparse.Namespace) -> int:
    """Rebuilds every derived file of a results directory from its journal; with --claims, prints the claims ledger."""
    from tune.results.summary import rebuild
    from tune.terminal.final_screen import final_screen

    other_claims = load_claims_option(options)
    summary = rebuild(options.results, other_claims)
    if other_claims is not None:
        return show_ledger([options.results], other_claims, options)
    show(options, summary, lambda: final_screen(summary, report=options.results / "report.html"))
    return 0


def claims(options: argparse.Namespace) -> int:
    """Collects the tested claims of several campaigns on one Markdown page; changes no results."""
    return show_ledger(options.results, load_claims_option(options), options, out=options.out)


def load_claims_option(options: argparse.Namespace) -> Any:
    """Returns the claims from --claims FILE, or None without this option."""
    from tune.claims.reader import load_claims

    return None if options.claims is None else load_claims(options.claims)


def show_ledger(results: list[Path], claims: Any, options: argparse.Namespace, *, out: Path | None = None) -> int:
    """Prints the ledger of several results directories as Markdown or JSON, or writes the Markdown to `out`."""
    from ngpt.system.atomic_files import write_atomic
    from tune.results.claims_ledger import collect, ledger_markdown, total
    from tune.storage.summaries import to_json

    ledger = collect(results, claims)
    page = ledger_markdown(ledger, command=options.command)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, page)
        print_line(f"{out}: {total(ledger)}")
    if options.json:
        print(json.dumps(to_json(ledger), indent=1, allow_nan=False))
    elif out is None:
        print(visible(page, keep="\n"), end="")
    return 0


def compare(options: argparse.Namespace) -> int:
    """Compares two results directories: environment, data, settings, and each arm that both have."""
    from tune.results.compare import compare as compare_results
    from tune.terminal.comparison import comparison_view

    comparison = compare_results(options.results, options.other, metric=options.metric)
    show(options, comparison, lambda: comparison_view(comparison))
    return 0


def verify(options: argparse.Namespace) -> int:
    """Checks every file of a results directory and lists those that can be rebuilt; exits with 1 if any is wrong."""
    from tune.results import verify as checks
    from tune.storage.summaries import to_json

    findings = checks.verify(options.results)
    if options.json:
        print(json.dumps(to_json(findings), indent=1, allow_nan=False))
    else:
        print(visible(checks.verify_text(findings), keep="\n"))
    return 0 if findings.intact else EXIT_ERROR


def judge(options: argparse.Namespace) -> int:
    """Compare the arms of a table with its baseline over seeds, as campaigns do."""
    from tune.api import default_baseline, judge, read_values

    values = read_values(options.table)
    baseline = options.baseline or default_baseline(list(values))
    limits = {"goal": options.goal, "confidence": options.confidence, "min_effect": options.min_effect}
    judged = judge(values, baseline=baseline, **limits)
    if options.json:
        show(options, judged, lambda: None)
    else:
        print(visible(judged, keep="\n"))
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Checks versions, devices, disk and limits of this machine; exits with 1 if there is a problem."""
    from dataclasses import asdict

    from tune.machine.doctor import run_checks

    checks = run_checks(options.out)
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        for check in checks:
            print(visible(f"{'problem' if check.problem else 'ok':8}{check.name:16}{check.value}"))
            if check.problem:
                print(visible(f"{'':24}{check.problem}"))
    return EXIT_ERROR if any(check.problem for check in checks) else 0


VERBS = {
    "status": status,
    "report": report,
    "compare": compare,
    "claims": claims,
    "verify": verify,
    "judge": judge,
    "doctor": doctor,
}

if __name__ == "__main__":
    sys.exit(main())
