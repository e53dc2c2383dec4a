"""Uploads an exported model to the Hugging Face hub.

python -m ngpt.push DIR --to OWNER/NAME             shows files, sizes and target, and sends nothing
python -m ngpt.push DIR --to OWNER/NAME --yes       uploads them, as a private repository
python -m ngpt.push DIR --to OWNER/NAME --public --revision v2 --commit-message "Longer training" --yes

DIR is a folder that `python -m ngpt.export` has written. The token is the one of `hf auth login`, or HF_TOKEN. No
campaign uploads anything.
"""

if __name__ == "__main__":
    from ngpt.system.start import start_command

    start_command()  # the imports below take seconds

import argparse
from pathlib import Path

from ngpt.config.visible import visible
from ngpt.export.upload import MAIN, MESSAGE, plan_upload, upload
from ngpt.system.cli import ArgumentParser, exit_process, print_line, run_command


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _push(options), path=options.folder)


def _push(options: argparse.Namespace) -> int:
    how = {"revision": options.revision, "message": options.commit_message}
    plan = plan_upload(options.folder, options.to, private=not options.public, **how)
    width = max(map(len, plan.files))
    for name, size in plan.files.items():
        print(visible(f"{name:<{width}}  {size:>15,} bytes"))
    branch = "" if plan.revision == MAIN else f"@{plan.revision}"
    visibility = "private" if plan.private else "public"
    print_line(f"{len(plan.files)} files, {plan.size:,} bytes, to {plan.repository}{branch}, {visibility} if it is new")
    if not options.yes:
        print_line("nothing was sent: add --yes to upload them")
        return 0
    print(visible(upload(plan)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m ngpt.push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that python -m ngpt.export has written")
    parser.add_argument("--to", required=True, metavar="OWNER/NAME", help="repository of models on the hub")
    parser.add_argument("--public", action="store_true", help="make a new repository public; default: private")
    branch = "branch of the repository, which is created if it does not exist; default: main"
    parser.add_argument("--revision", default=MAIN, metavar="BRANCH", help=branch)
    parser.add_argument("--commit-message", default=MESSAGE, metavar="TEXT", help=f"default: {MESSAGE}")
    parser.add_argument("--yes", action="store_true", help="upload; without it, only show what would be sent")
    return parser


if __name__ == "__main__":
    exit_process(main())
