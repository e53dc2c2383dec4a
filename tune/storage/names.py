"""Names that become files and folders, of campaigns, phases and trials.

They are checked when a campaign file is read, and again when a journal is read, since it may come from somebody else.
"""

import re

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # of a phase or trial; names are extended, as by `-confirm`
ELSEWHERE = ".checkpoints-elsewhere"  # marks the folder of a trial whose checkpoints are only in an object store
MAX_SEED = 2**31 - 1

# Files and folders of a results directory that no phase may be named like. Some file systems ignore case.
RESERVED = re.compile(r"(?i)trials|discarded|(campaign|manifest|journal|derived|summary|report)\.\w+")
# Files beside the results directories that no campaign may be named like.
RESERVED_BESIDE = re.compile(r"(?i)seeds\.\w+")


def folder_problem(name: str, *, is_phase: bool = False) -> str | None:
    """Why `name` cannot be the folder of a trial, or of a phase, in a results directory; None if it can."""
    if not FOLDER.fullmatch(name) or ".." in name:
        return "a name has 1 to 100 letters, digits, '.', '_' and '-', the first a letter or digit, and no '..'"
    if is_phase and RESERVED.fullmatch(name):
        return "the results directory uses this name itself"
    return None
