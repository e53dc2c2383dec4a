"""Completion of the command in a shell, by scripts that shtab writes from the options of all verbs."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ngpt.code.version import PROGRAM

SHELLS = ("bash", "zsh", "fish")
CAMPAIGNS = ("*.yaml", "*.yml")
FOLDERS = ("results", "other", "out")
TABLES = ("*.csv", "*.tsv")
PREFIX = f"_shtab_{PROGRAM.replace('-', '_')}"  # of the names in a script
# What shtab has no word for: the first argument is a verb or a campaign file, and options may follow that file.
EXTRAS = {
    "bash": f"{PREFIX}_pos_0_COMPGEN={{campaigns}}",
    "zsh": f"""\
functions[{PREFIX}_commands]+=$'\\n_files -g "*.(yaml|yml)"'
{PREFIX}_run_options=("${{{{{PREFIX}_options[@]}}}}")
functions[{PREFIX}_verbs]=$functions[{PREFIX}]
{PREFIX}() {{{{
  if (( CURRENT > 2 )) && [[ $words[2] == *.(yaml|yml) ]]; then
    _arguments -s "${{{{{PREFIX}_run_options[@]}}}}" '*:file:_files -g "*.(yaml|yml)"'
  else
    {PREFIX}_verbs "$@"
  fi
}}}}""",
    "fish": f"complete -c {PROGRAM} -n '{PREFIX}_using; and test ${PREFIX}_npos -eq 0' -k -a '{{campaigns}}'",
}


def completion_script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script that `shell` sources; `parser` has the options of a run, and a subparser for each verb."""
    import shtab

    campaigns = shtab.glob(*CAMPAIGNS)
    for each in _parsers(parser):
        for action in each._actions:
            if (completer := _completer(action)) is not None:
                setattr(action, "complete", completer)  # noqa: B010  the attribute that shtab reads
    extra = EXTRAS[shell].format(campaigns=campaigns[shell])
    if shell == "fish":  # the script starts by removing what is there
        return f"{shtab.complete(parser, shell)}\n{extra}"
    return shtab.complete(parser, shell, preamble=extra)


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def _completer(action: argparse.Action) -> Any:
    """How the values of an argument are completed; None if they are its choices or anything."""
    import shtab

    from tune.spec.shipped import shipped

    if action.dest == "name":
        action.choices = [each.name for each in shipped()]
        return None
    if action.dest == "table":
        return shtab.glob(*TABLES)
    if action.dest == "plugin":
        return shtab.glob("*.py")
    if action.dest == "claims":
        return shtab.glob(*CAMPAIGNS)
    if action.dest in FOLDERS:
        return shtab.DIRECTORY
    return shtab.FILE if action.type is Path else None
