"""Malicious and malformed input: each file is refused within seconds, and nothing is left behind."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import ngpt.convert
import ngpt.data.__main__
import ngpt.evaluate
import ngpt.inspect
import run_campaign
from ngpt.config.base import MAX_MESSAGE_LENGTH, ConfigError
from ngpt.config.overrides import MAX_PROBLEMS
from ngpt.generate import main as generate
from ngpt.train import main as train
from tests.helpers.hostile_files import HEAD, LARGE, SMALL, SWEEP, TOO_DEEP, TOO_LARGE, listed
from tune.campaign import load_campaign
from tune.storage.journal import line_with_crc

ROOT = Path(__file__).parents[1]
MOST_SECONDS = 10.0  # of CPU time, so that a busy machine does not matter
MOST_MEGABYTES = 70  # above the peak of an empty file, which is 230 with torch for CPUs


def write(folder: Path, content: str | bytes, name: str = "x") -> Path:
    """A file in a folder of its own below `folder`."""
    path = folder / "files" / f"{name}.yaml"
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def answer(path: Path, out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The error text of the command for a hostile file; checks exit code, time and form."""
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    start = time.process_time()
    assert run_campaign.main([str(path), "--inline", "--out", str(out), *options]) == 2
    assert time.process_time() - start < MOST_SECONDS
    printed = capsys.readouterr()
    assert printed.out == ""
    assert (sorted(path.parent.iterdir()) if path.parent.is_dir() else []) == before and not out.exists()
    lines = printed.err.removesuffix("\n").split("\n")
    assert len(lines) <= MAX_PROBLEMS + 1
    for line in lines:
        assert line.isprintable() and len(line) < MAX_MESSAGE_LENGTH + 1000, line
    assert "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize("name", SMALL)
def test_a_hostile_file_is_refused_with_its_place(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content, expected = SMALL[name]
    path = write(tmp_path, content, name)
    monkeypatch.chdir(path.parent)
    first = answer(Path(path.name), tmp_path / "results", capsys).splitlines()[0]
    assert first.removeprefix(f"{path.name}:").lstrip().startswith(expected)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if at % 12 else name for at, name in enumerate(LARGE)]
)
def test_a_large_or_binary_file_is_refused_within_seconds(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, expected = LARGE[name]
    path = write(tmp_path, content)
    error = answer(path, tmp_path / "results", capsys)
    assert expected in error and error.startswith(f"{path}:")


def test_the_list_of_problems_is_cut_at_a_hundred(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, f"{HEAD}base: {{{listed(150, 'kN: 1')}}}\n{SWEEP}")
    lines = answer(path, tmp_path / "results", capsys).splitlines()
    assert len(lines) == MAX_PROBLEMS + 1 and lines[99].startswith(f"{path}:3:")
    assert lines[-1] == f"{path}: only the first {MAX_PROBLEMS} problems are listed; the rest was not checked"


# ---- not a regular file ----------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Path]:
    """A folder with a pipe, devices, links and a sparse file, all named *.yaml."""
    folder = tmp_path / "places"
    folder.mkdir()
    os.mkfifo(folder / "fifo.yaml")
    (folder / "folder.yaml").mkdir()
    for name, target in {
        "zero": "/dev/zero",
        "terminal": "/dev/ptmx",
        "null": "/dev/null",
        "loop": "loop.yaml",
    }.items():
        (folder / f"{name}.yaml").symlink_to(target)
    with (folder / "sparse.yaml").open("wb") as file:
        file.truncate(1 << 40)
    yield folder


REFUSALS = {
    "fifo": "not a regular file",
    "folder": "Is a directory",
    "zero": "not a regular file",
    "terminal": "not a regular file",
    "null": "not a regular file",
    "loop": "Too many levels of symbolic links",
    "sparse": TOO_LARGE,
    "missing": "No such file or directory",
    "n" * 300: "File name too long",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_pipe_or_device_is_refused_without_waiting(
    name: str, places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = places / f"{name}.yaml"
    error = answer(path, tmp_path / "results", capsys)
    assert error.startswith(f"{places}/{name[:20]}") and error.endswith(f".yaml: {REFUSALS[name]}\n")
    naming = places / "naming.yaml"
    naming.write_text(f"{HEAD}base: {{model: {name}.yaml}}\n{SWEEP}")
    error = answer(naming, tmp_path / "results", capsys)
    assert error.startswith(f"{naming}:3:8: base.model: ") and error.endswith(f": {REFUSALS[name]}\n")


def test_an_endless_tokenizer_file_is_not_read(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, expected in {
        "fifo": "no such file",
        "zero": "no such file",
        "sparse": "is too large: ",
    }.items():
        (places / f"{name}.yaml").rename(places / f"{name}.model")
        file = places / "naming.yaml"
        file.write_text(f"{HEAD}base: {{data: {{tokenizer: {places}/{name}.model}}}}\n{SWEEP}")
        assert expected in answer(file, tmp_path / "results", capsys)


def test_a_damaged_journal_of_another_campaign_is_a_reported_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    file = write(tmp_path, f"{HEAD}phases: [{{name: p, inherit: {other}/p, vary: {{alpha: [0.1]}}}}]\n")
    event = {"seq": 1, "time": "2026-11-30T00:00:00+00:00", "event": "campaign_started", "expected_trials": {"p": 1}}
    (other / "journal.jsonl").write_text(line_with_crc(event) + "\n")
    assert "campaign: field required" in answer(file, tmp_path / "results", capsys)
    (other / "journal.jsonl").write_bytes(b"[" * 100_000 + b"\n")
    assert "does not match its CRC" in answer(file, tmp_path / "results", capsys)


# ---- --set -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("", "--set : expected NAME=VALUE"),
        ("steps", "--set steps: expected NAME=VALUE"),
        ("\x1b[2J", r"--set \x1b[2J: expected NAME=VALUE"),
        ("\x1b[2J=3", r"--set \x1b[2J=3: unknown setting"),
        ("a\nb=3", r"--set a\nb=3: unknown setting"),
        ("../steps=3", "--set ../steps=3: unknown setting"),
        ("__class__=3", "--set __class__=3: unknown setting"),
        ("\u0430lpha=3", "did you mean 'alpha'? (it contains CYRILLIC SMALL LETTER A, U+0430)"),
        ("steps=!!python/object/apply:os.system [id]", "is not supported, only plain data"),
        ("steps=" + "9" * 5000, "is too large, a whole number"),
        ("steps=" + "[" * 5000, TOO_DEEP),
        ("steps=\udcff", "not valid YAML"),
        ("steps=\x00", "not valid YAML"),
        ("alpha=.nan", "should be a finite number, got nan"),
        ("model=/dev/zero", "must be a mapping of settings or the path of a .yaml file"),
        ("model={n_layer: 2, n_layer: 3}", "duplicate key 'n_layer'"),
        ("seed=3", "--set cannot change seeds"),
        ("data.corpus=" + "a" * 5000, "File name too long"),
        ("k" * 100_000 + "=3", "unknown setting"),
    ],
)
def test_a_hostile_option_is_refused_like_a_hostile_file(
    option: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, HEAD + SWEEP)
    assert expected in answer(path, tmp_path / "results", capsys, f"--set={option}")


# ---- what is printed -------------------------------------------------------------------------------------------------

NASTY = "\x1b[2J\x1b]0;t\x07\r\u202e\u200b\udcff"
SHOWN = r"\x1b[2J\x1b]0;t\x07\r\u202e\u200b\udcff"


def text_files(folder: Path) -> dict[str, Path]:
    """Corpora whose names, keys and columns act on a terminal."""
    import pyarrow
    import pyarrow.parquet

    nasty = NASTY[:-1]  # without the surrogate, which is in no valid Unicode
    files = {"key": folder / "key.jsonl", "value": folder / "value.jsonl", "column": folder / "column.parquet"}
    files["key"].write_text(json.dumps({nasty: "a"}) + "\n")
    files["value"].write_text(json.dumps(["x" + nasty]) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({nasty: ["a"]}), files["column"])
    files["name"] = folder / f"{NASTY}.txt"
    files["name"].write_bytes(b"\xff\xfe\x00")
    return files


@pytest.mark.parametrize("kind", ["key", "value", "column", "name"])
def test_a_corpus_is_refused_in_visible_form(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = text_files(tmp_path)[kind]
    assert ngpt.data.__main__.main([str(corpus), "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.replace("\n", "").isprintable()
    expected = {"name": SHOWN, "value": r"\x1b[2J"}.get(kind, SHOWN.removesuffix(r"\udcff"))
    assert expected in printed.err


COMMANDS: dict[str, Callable[[str], int]] = {
    "train": lambda name: train(["--config", f"{name}.yaml"]),
    "evaluate": lambda name: ngpt.evaluate.main([name]),
    "generate": lambda name: generate([name]),
    "inspect": lambda name: ngpt.inspect.main(["--checkpoint", name]),
    "convert": lambda name: ngpt.convert.main(["nvidia", name, "--out", f"{name}-out"]),
    "run": lambda name: run_campaign.main([f"{name}.yaml"]),
    "plan": lambda name: run_campaign.main([f"{name}.yaml", "--plan"]),
    "judge": lambda name: run_campaign.main(["judge", f"{name}.csv"]),
    "compare": lambda name: run_campaign.main(["compare", name, name]),
    "claims": lambda name: run_campaign.main(["claims", name]),
} | {verb: lambda name, verb=verb: run_campaign.main([verb, name]) for verb in ("status", "report", "verify")}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_prints_a_name_that_acts_on_the_terminal(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{NASTY}.yaml").write_text(f'"{NASTY[1:3]}\\x1b": 1\n', errors="surrogateescape")
    (tmp_path / f"{NASTY}.csv").write_text("arm,seed\na\x1b[2J,1\n")
    assert COMMANDS[command](NASTY) in (2, 74)
    printed = capsys.readouterr()
    assert printed.out == "" and SHOWN in printed.err
    assert printed.err.replace("\n", "").isprintable()


# ---- as a process ----------------------------------------------------------------------------------------------------


def peak(path: Path, out: Path) -> tuple[int, str, float, float]:
    """Exit code, stderr, peak memory in MB and CPU seconds of a run in its own process."""
    errors = path.with_suffix(".err")
    with errors.open("wb") as file:
        arguments = [sys.executable, str(ROOT / "run_campaign.py"), str(path), "--out", str(out)]
        redirect = [(os.POSIX_SPAWN_DUP2, file.fileno(), 2)]
        child = os.posix_spawn(sys.executable, arguments, os.environ, file_actions=redirect)
        _, status, used = os.wait4(child, 0)
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return os.waitstatus_to_exitcode(status), errors.read_text(), used.ru_maxrss / unit, used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_the_worst_files_cost_hardly_more_than_an_empty_one(tmp_path: Path) -> None:
    figures = {}
    for name in ("nothing", "just_as_many_values", "list_of_strings", "a_chain_of_sweeps"):
        content, expected = LARGE[name]
        path = tmp_path / f"{name}.yaml"
        path.write_text(str(content))
        code, error, *figures[name] = peak(path, tmp_path / "results")
        assert code == 2 and expected in error and "Traceback" not in error
    base_memory, base_seconds = figures["nothing"]
    for memory, seconds in figures.values():
        assert memory - base_memory < MOST_MEGABYTES and seconds - base_seconds < MOST_SECONDS
    assert not (tmp_path / "results").exists()


# ---- random input ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the shipped experiments."""
    folder = tmp_path_factory.mktemp("shipped") / "experiments"
    shutil.copytree(ROOT / "experiments", folder)
    return folder


EXPERIMENTS = sorted((path.name, path.read_text()) for path in (ROOT / "experiments").glob("*.yaml"))
WORDS = re.compile(r"[\w./-]+|[^\w\s]")
VALUES = [
    "",
    "~",
    "[]",
    "{}",
    "-1",
    "0",
    "1e999",
    ".nan",
    "true",
    "'",
    '"',
    "&a",
    "*a",
    "- ",
    ": ",
    "\t",
    "\n",
    "[",
    "}",
]
VALUES += ["9" * 400, "0x" + "f" * 20, "[[1]]", "{a: {b: c}}", "!!set {}", "fresh 3", "auto", "../x", "x/y", "alpha"]
VALUES += [
    "baseline",
    "winner",
    "combine",
    "search",
    "\u0000",
    "\u202e",
    "\U0001f600",
    "<<",
    "? ",
    "...",
    "---\n",
    "|\n",
]
edits = st.lists(st.tuples(st.floats(0, 1), st.sampled_from(VALUES) | st.text(max_size=4)), min_size=1, max_size=4)


def only_problems(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        load_campaign(path)
    except ConfigError as error:
        assert str(error).startswith(f"{path}:")


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.sampled_from(EXPERIMENTS), edits, st.booleans())
def test_a_shipped_file_with_random_edits_is_a_campaign_or_a_list_of_problems(
    shipped: Path, source: tuple[str, str], edits: list[tuple[float, str]], whole: bool
) -> None:
    """Replaces words, or inserts at single characters."""
    name, text = source
    for place, value in edits:
        words = list(WORDS.finditer(text))
        word = words[int(place * (len(words) - 1))].span() if words and whole else (int(place * len(text)),) * 2
        text = text[: word[0]] + value + text[word[1] :]
    only_problems(shipped / f"edited-{name}", text)


KEYS = "campaign seeds base phases vary grid zip runs search combine claims metric name inherit set arm alpha optim lr"
KEYS += " model n_head data corpus steps from method trials space log uniform choice id relation left right budget hold"
keys = st.sampled_from(KEYS.split())
leaves = st.sampled_from(
    ["x", "a", "0.1", "3", "-1", "true", "~", ".inf", "'3'", "less", "arithmetic", "baseline", "9**9"]
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(keys, inner, max_size=5).map(
            lambda items: "{" + ", ".join(f"{key}: {value}" for key, value in items.items()) + "}"
        )
    ),
    max_leaves=25,
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.dictionaries(keys, trees, max_size=6))
@example({"campaign": "x", "phases": "[{name: a, runs: [{arm: b, inherit: a}]}]"})
@example({"campaign": "x", "search": "{trials: 3, space: {alpha: {log: [true, 3]}}}"})
def test_any_arrangement_of_keys_and_values_is_a_campaign_or_a_list_of_problems(
    shipped: Path, tree: dict[str, str]
) -> None:
    only_problems(shipped / "any.yaml", "".join(f"{key}: {value}\n" for key, value in tree.items()))
