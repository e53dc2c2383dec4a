"""Searches all settings, of trials and of campaigns, and writes docs/settings.md from their types."""

import difflib
from collections.abc import Iterable, Sequence
from itertools import groupby

from ngpt.config.base import ConfigError, printable
from ngpt.config.peer_words import PEER_WORDS, our_word, peer_word
from ngpt.config.reference import Setting, reference
from ngpt.training.config import TrainConfig
from tune.spec.schema import Header

COMMAND = "python run_campaign.py settings --markdown > docs/settings.md"
PAGE = """\
# Settings

Every setting with its type, default and meaning. `python run_campaign.py settings WORD` searches them, also for words
of other programs. This page is generated from the types, by `{command}`.

A trial's settings are written in `base:`, `set:`, `vary:` and arms of a [campaign file](campaign-file.md), after
`--set`, and in the files of `python -m ngpt.train`: in full (`optim.lr`), in sections (`optim: {{lr: 1e-3}}`), or by
the last word where only one setting ends in it (`lr`). Settings marked with * do not change what is computed. They
belong in `base:` and cannot vary.

{trial}

## Keys of a campaign

They are written at the top level of a campaign file: `resources: {{workers: 4}}`. The keys that are no settings, such
as `phases:`, are in [campaign-file.md](campaign-file.md#keys-of-the-campaign).

{campaign}

## Words of other programs

An unknown setting that is one of these words is answered with ours.

{words}
"""


def all_settings() -> list[Setting]:
    """Returns the settings of trials, then those of campaigns."""
    return [*reference(TrainConfig), *reference(Header)]


def find_settings(words: Sequence[str]) -> list[Setting]:
    """Returns the settings that have all `words` in their name, type or meaning; all settings without a word.

    A word of another program, such as `learning_rate`, stands for the setting that it means here.

    Raises:
        ConfigError: there is none.
    """
    wanted = [PEER_WORDS.get(peer_word(word), word.lower()) for word in words]
    known = all_settings()
    found = [setting for setting in known if all(word in _text(setting) for word in wanted)]
    exact = [setting for setting in found if setting.name in wanted]
    if found:
        return exact or found
    near = difflib.get_close_matches(wanted[-1], {part for setting in known for part in setting.name.split(".")}, n=1)
    hint = f", did you mean '{near[0]}'?" if near else "; without a word, all settings are listed"
    raise ConfigError(f"no setting has {printable(repr(' '.join(words)))} in its name or meaning{hint}")


def settings_text(found: Iterable[Setting], words: Iterable[str] = ()) -> str:
    """Formats settings for a terminal, after a line for each of `words` that other programs use."""
    peers = [f"{word} is called {ours} here" for word in words if (ours := our_word(word))]
    lines = [f"{setting.name}\n  {setting.type}; default: {setting.default}\n  {setting.meaning}" for setting in found]
    return "\n".join([*peers, *lines])


def settings_page() -> str:
    """Returns the content of docs/settings.md."""
    peers = groupby(PEER_WORDS, PEER_WORDS.__getitem__)
    rows = [f"| `{name}` | {', '.join(f'`{word}`' for word in words)} |" for name, words in peers]
    return PAGE.format(
        command=COMMAND,
        trial=_sections(reference(TrainConfig), "## ", "run"),
        campaign=_sections(reference(Header), "### ", "campaign"),
        words="\n".join(["| setting | words |", "|---|---|", *rows]),
    )


def _sections(settings: Sequence[Setting], level: str, top: str) -> str:
    """Returns a table for each section, those outside of one first, under the name `top`."""
    sections: dict[tuple[str, str], list[Setting]] = {}
    for setting in sorted(settings, key=lambda setting: "." in setting.name):
        sections.setdefault((setting.name.rpartition(".")[0] or top, setting.file), []).append(setting)
    parts = []
    for (section, file), members in sections.items():
        parts += [f"{level}{section}", f"Declared in `{file}`."]
        parts.append("\n".join(["| setting | type | default | meaning |", "|---|---|---|---|", *map(_row, members)]))
    return "\n\n".join(parts)


def _row(setting: Setting) -> str:
    star = " *" if setting.is_runtime else ""
    return f"| `{setting.name}`{star} | {setting.type} | `{setting.default}` | {setting.meaning} |"


def _text(setting: Setting) -> str:
    return f"{setting.name} {setting.type} {setting.meaning}".lower()
