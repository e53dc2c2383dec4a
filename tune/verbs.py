"""The verbs of `run_campaign.py`: commands that read results, or this machine, and train nothing.

Each is a function (options) -> exit code. They import what they need when they run, so that the command starts quickly.
"""

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ngpt.config.visible import visible
from ngpt.system.cli import EXIT_ERROR, print_line, print_lines
from tune.remote.places import report_path


def show(options: argparse.Namespace, data: Any, view: Callable[[], Any]) -> None:
    """Prints `data` as JSON with --json, otherwise as text for the terminal."""
    from rich.console import Console

    from ngpt.system.atomic_files import naming
    from tune.storage.summaries import to_json

    if options.json:
        print(json.dumps(to_json(data), indent=1, allow_nan=False))
        return

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # Rich would exit with 1

    with naming("stdout"):
        Output(highlight=False).print(view())


def status(options: argparse.Namespace) -> int:
    """Shows the progress of a campaign, from any terminal, while it runs or later."""
    from tune.results.status import read_snapshot
    from tune.terminal.live import live_view

    snapshot = read_snapshot(options.results)
    show(options, snapshot, lambda: live_view(snapshot))
    if snapshot.resume and not options.json:
        print_line(f"to resume: {snapshot.resume}")
    return 0


def report(options: argparse.Namespace) -> int:
    """Rebuilds every derived file of a results directory from its journal; with --claims, prints the claims ledger."""
    from tune.results.summary import rebuild
    from tune.terminal.final_screen import final_screen

    other_claims = load_claims_option(options)
    summary = rebuild(options.results, other_claims)
    if other_claims is not None:
        return show_ledger([options.results], other_claims, options)
    show(options, summary, lambda: final_screen(summary, report=report_path(options.shown["results"])))
    return 0


def claims(options: argparse.Namespace) -> int:
    """Collects the tested claims of several campaigns on one Markdown page; changes no results."""
    return show_ledger(options.results, load_claims_option(options), options, out=options.out)


def load_claims_option(options: argparse.Namespace) -> Any:
    """Returns the claims from --claims FILE, or None without this option."""
    if options.claims is None:
        return None
    from tune.claims.reader import load_claims
    from tune.storage.state import read_state

    places = options.results if isinstance(options.results, list) else [options.results]
    results = (result for place in places for result in read_state(place).results.values())
    return load_claims(options.claims, {name for result in results for name in result["metrics"]})


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
    from dataclasses import replace

    from ngpt.config.base import ConfigError
    from tune.results import compare as comparing
    from tune.terminal import comparison as views

    if options.by == "name" and options.metric is not None:
        raise ConfigError("--by name shows the effects that the campaigns have judged: leave out --metric")
    first, second = (str(options.shown[name]) for name in ("results", "other"))
    if options.by == "name":
        effects = comparing.compare_effects(options.results, options.other)
        effects = replace(effects, a={**effects.a, "results": first}, b={**effects.b, "results": second})
        show(options, effects, lambda: views.effects_view(effects))
        return 0
    comparison = comparing.compare(options.results, options.other, metric=options.metric)
    comparison = replace(comparison, a={**comparison.a, "results": first}, b={**comparison.b, "results": second})
    show(options, comparison, lambda: views.comparison_view(comparison))
    return 0


def verify(options: argparse.Namespace) -> int:
    """Checks every file of a results directory and lists those that can be rebuilt; exits with 1 if any is wrong."""
    from dataclasses import replace

    from tune.results import verify as checks
    from tune.storage.summaries import to_json

    findings = replace(checks.verify(options.results), results=str(options.shown["results"]))
    if options.json:
        print(json.dumps(to_json(findings), indent=1, allow_nan=False))
    else:
        print(visible(checks.verify_text(findings), keep="\n"))
    return 0 if findings.intact else EXIT_ERROR


def prune(options: argparse.Namespace) -> int:
    """Frees the optimizer state of finished trials, from which nothing continues; weights and results stay."""
    from dataclasses import asdict

    from tune.results import prune as pruning

    done = pruning.prune(options.results, dry_run=options.dry_run)
    if options.json:
        print(json.dumps(asdict(done), indent=1, allow_nan=False))
    else:
        print(visible(pruning.pruning_text(done), keep="\n"))
    return 0


def judge(options: argparse.Namespace) -> int:
    """Compare the arms of a table with its baseline over seeds, as campaigns do."""
    from tune.judged import default_baseline, judge, read_values

    values = read_values(options.table)
    baseline = options.baseline or default_baseline(list(values))
    limits = {"goal": options.goal, "confidence": options.confidence, "min_effect": options.min_effect}
    judged = judge(values, baseline=baseline, **limits)
    if options.json:
        show(options, judged, lambda: None)
    else:
        print(visible(judged, keep="\n"))
    return 0


def settings(options: argparse.Namespace) -> int:
    """Lists the settings that have all words in their name or meaning, with type, default and meaning."""
    from tune.spec.settings_page import find_settings, settings_page, settings_text

    found = find_settings(options.words)
    if options.json:
        print(json.dumps([setting._asdict() for setting in found], indent=1))
    elif options.markdown:
        print(visible(settings_page(), keep="\n"), end="")
    else:
        print(visible(settings_text(found, options.words), keep="\n"))
    return 0


def new(options: argparse.Namespace) -> int:
    """Copies a shipped experiment, with the model sizes that it names, into this folder; without NAME, lists all."""
    from dataclasses import asdict

    from ngpt.code.version import command
    from ngpt.config.base import ConfigError
    from tune.spec.shipped import copy_experiment, find_shipped, shipped, shipped_text

    if options.name is None:
        if options.json:
            print(json.dumps([asdict(each) | {"path": str(each.path)} for each in shipped()], indent=1))
        else:
            print(visible(shipped_text(), keep="\n"))
        return 0
    try:
        chosen = find_shipped(options.name)
    except ConfigError:
        print_lines(f"{shipped_text()}\n")
        raise
    files = copy_experiment(chosen, options.out)
    if options.json:
        print(json.dumps([str(path) for path in files]))
    else:
        print(visible("\n".join(map(str, files)), keep="\n"))
    if chosen.is_campaign:
        print_line(f"next: {shlex.join([*command().split(), str(files[0]), '--plan'])}")
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Checks versions, devices, disk and limits of this machine; exits with 1 if there is a problem."""
    from dataclasses import asdict

    from tune.machine.doctor import run_checks
    from tune.remote.places import store_checks, working_folder

    checks = [*run_checks(working_folder(options.out)), *store_checks(options.out)]
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        for check in checks:
            print(visible(f"{'problem' if check.problem else 'ok':8}{check.name:16}{check.value}"))
            if check.problem:
                print(visible(f"{'':24}{check.problem}"))
    return EXIT_ERROR if any(check.problem for check in checks) else 0


def completion(options: argparse.Namespace) -> int:
    """Prints a script with which a shell completes verbs, options, files and the names of experiments."""
    from tune.terminal.completion import completion_script

    print(visible(completion_script(options.shell, options.whole_parser()), keep="\n\t"))
    return 0


def serve(options: argparse.Namespace) -> int:
    """Shows the campaigns of a results folder as web pages on this machine, live while they run; changes nothing."""
    from tune.campaign_pages import CampaignPages
    from tune.report.server import open_in_browser, open_server

    pages = CampaignPages(options.results)
    with open_server(pages, options.port) as server:
        if options.json:
            print(json.dumps({"url": server.url}), flush=True)
        else:
            print(visible(f"{options.shown['results']}: {server.url} (Ctrl-C ends)"), flush=True)
        if options.open:
            open_in_browser(server.url)
        server.serve_forever()
    return 0


VERBS = {
    "status": status,
    "report": report,
    "compare": compare,
    "claims": claims,
    "verify": verify,
    "prune": prune,
    "judge": judge,
    "settings": settings,
    "new": new,
    "doctor": doctor,
    "completion": completion,
    "serve": serve,
}
