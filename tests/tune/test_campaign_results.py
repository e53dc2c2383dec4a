"""`load_results`: what the files say, of campaigns in every state, without a change to any file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from ngpt.config.base import ConfigError
from ngpt.training.evaluation import METRICS, EvalMetric
from tests.helpers.object_store import environment, make_bucket, s3_server
from tests.helpers.other_user import read_only_copy
from tests.helpers.tiny_campaign import begun, drive, pretend, session_on, train_all, write_file
from tune import load_results, run
from tune.storage.lock import ResultsLock
from tune.trials.trial import TrialResult, TrialSpec

pytestmark = pytest.mark.usefixtures("no_report")
ROOT = Path(__file__).parents[2]
CLAIM = "claims: [{id: longer, says: longer is better, relation: less, left: {alpha: 0.4}, right: {alpha: 0.05}}]\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The results of a campaign with two phases that has been trained."""
    folder = tmp_path_factory.mktemp("results")
    file = write_file(folder, corpus, steps=2, every=1)
    file.write_text(CLAIM + file.read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tune.report.html.write_report", lambda *_: None)
        train_all(file, folder / "tiny")
    return folder / "tiny"


@pytest.fixture
def unfinished(tmp_path: Path, corpus: Path) -> Path:
    """The results of a campaign that was killed: one trial failed, one finished, one has begun."""

    def result(spec: TrialSpec) -> TrialResult:
        return pretend(spec, status="finished" if spec.seed == 1 else "failed")

    file, root = write_file(tmp_path, corpus), tmp_path / "tiny"
    with session_on(file, root) as session:
        drive(begun(session), result, most=3)
        (spec,) = session.ask()
        rows = [{"step": step, "tokens": step * 64, "train_loss": 5.0 - step} for step in (1, 2)]
        spec.folder.mkdir(parents=True, exist_ok=True)
        (spec.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return root


def files(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [root, *root.rglob("*")]}


def test_results_are_read_without_torch(unfinished: Path) -> None:
    code = """
import sys
from tune import load_results

results = load_results(sys.argv[1])
print(len(results.trials), len(results.arms), len(results.curves), len(results.claims), results.answer.sentence)
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, str(unfinished)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 2 2 0 ")


def test_the_rows_are_those_of_the_files(finished: Path) -> None:
    results = load_results(str(finished))
    folders = [finished / name for name in ("alpha", "projection")]
    tables = {"summary.parquet": results.arms, "curves.parquet": results.curves}
    for name, rows in tables.items():
        kept = pyarrow.concat_tables([pyarrow.parquet.read_table(folder / name) for folder in folders])
        differing = [name for name in rows.columns if not rows.to_arrow()[name].equals(kept[name])]
        assert differing == [] and len(rows) == len(kept) > 0
    kept = [json.loads(line) for folder in folders for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert [json.loads(json.dumps(vars(trial))) for trial in results.trials] == kept
    claim = json.loads((finished / "summary.json").read_text())["claims"][0]
    assert results.claims.to_arrow().to_pylist()[0] == {name: claim[name] for name in results.claims.columns}


def test_a_metric_of_a_plugin_is_a_column_of_arms_and_curves_as_in_the_files(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, "width", EvalMetric(lambda model, _: float(model.cfg.n_embd)))
    phases = "\n  - name: alpha\n    vary: {alpha: [0.05, 0.4]}\n"
    train_all(write_file(tmp_path, corpus, phases=phases, seeds="[1, 2]", steps=2, every=1), tmp_path / "tiny")
    results = load_results(tmp_path / "tiny")
    for name, rows in {"summary.parquet": results.arms, "curves.parquet": results.curves}.items():
        kept = pyarrow.parquet.read_table(tmp_path / "tiny/alpha" / name)
        assert sorted(rows.columns) == sorted(kept.column_names)
        assert all(rows.to_arrow()[column].equals(kept[column]) for column in rows.columns)
    assert results.arms[0].metrics["width"].mean == 16.0 == results.curves[0].metrics["width"]


def test_trials_have_a_column_for_each_setting_that_arms_change_and_for_each_metric(finished: Path) -> None:
    frame = load_results(finished).trials.to_pandas()
    assert frame["config.model.alpha"].tolist()[:4] == [0.05, 0.4, 0.05, 0.4]
    assert set(frame["config.project_every"]) == {1, 3}
    assert {"val_loss", "val_bpb", "initial_val_loss", "skipped_steps"} <= set(frame.columns)
    assert frame["val_loss"].notna().all() and frame["seed"].tolist()[:4] == [1, 1, 2, 2]


def test_a_phase_can_be_read_alone(finished: Path) -> None:
    whole, phase = load_results(finished), load_results(finished / "alpha")
    assert [*whole.phases] == ["alpha", "projection"] and [*phase.phases] == ["alpha"]
    for rows, all_rows in ((phase.arms, whole.arms), (phase.trials, whole.trials), (phase.curves, whole.curves)):
        assert list(rows) == [row for row in all_rows if row.phase == "alpha"]
    assert [claim.id for claim in phase.claims] == ["longer"]


def test_a_campaign_that_was_killed_shows_what_it_has(unfinished: Path) -> None:
    before = files(unfinished)
    results = load_results(unfinished)
    assert (results.status, results.progress.done) == ("incomplete", 3)
    assert sorted(trial.status for trial in results.trials) == ["failed", "finished", "finished"]
    assert [(row.step, row.train_loss, row.val_loss) for row in results.curves] == [(1, 4.0, None), (2, 3.0, None)]
    assert results.trials.to_pandas()["error"].notna().sum() == 1
    text, page = repr(results), results._repr_html_()
    assert text.startswith(f"tiny: incomplete, 3 of 6 or more trials, in {unfinished}\n")
    assert "not written yet" in text and "incomplete, 3 of 6 or more trials" in page
    assert files(unfinished) == before
    with ResultsLock(unfinished):
        running = load_results(unfinished)
        assert running.status == "running" and "3/6" in repr(running)


def test_a_campaign_that_has_planned_nothing_yet_is_shown(tmp_path: Path, corpus: Path) -> None:
    with session_on(write_file(tmp_path, corpus), tmp_path / "tiny") as session:
        begun(session)
    results = load_results(tmp_path / "tiny")
    assert [len(rows) for rows in (results.trials, results.arms, results.curves, results.claims)] == [0] * 4
    assert results._repr_html_() and repr(results) and len(results.trials.to_pandas()) == 0


def test_results_stay_what_they_were_when_the_working_directory_changes(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(finished.parent)
    results = load_results("tiny")
    monkeypatch.chdir(tmp_path)
    assert len(results.curves) and os.fspath(results) == results.path == str(finished)


def test_results_of_an_older_version_are_read() -> None:
    """The journal of the flagship campaign, with `trials` in the place of a folder for each."""
    folder = ROOT / "docs" / "measured" / "flagship"
    kept = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    results = load_results(folder)
    assert len(results.trials) == sum(1 for trial in results.trials if trial.metrics) > 200
    assert {trial.status for trial in results.trials} <= {"finished", "diverged", "failed", "stopped"}
    assert [*results.trials.to_pandas()["phase"].unique()] == [
        phase["phase"] for phase in kept["phases"] if phase["trials"]["finished"]
    ]
    assert len(results.curves) == 0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "{root} has the results of tiny: give one of them, such as {root}/tiny"),
        ("nowhere", "{root}/nowhere: no such folder"),
        ("tiny/trials", "{root}/tiny: unknown phase 'trials'; choose one of alpha, projection"),
        ("tiny/alhpa", "{root}/tiny: unknown phase 'alhpa', did you mean 'alpha'?"),
        ("tiny/alpha/deeper", "{root}/tiny/alpha/deeper: no such folder"),
    ],
)
def test_what_is_no_campaign_is_refused_with_what_to_give(finished: Path, path: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_results(finished.parent / path)
    assert str(error.value) == message.format(root=finished.parent)


def test_an_empty_folder_and_a_bad_address_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a results directory"):
        load_results(tmp_path)
    with pytest.raises(ConfigError, match="not at s4://; did you mean s3://"):
        load_results("s4://bucket/results/tiny")


def test_results_that_this_user_cannot_write_are_read(finished: Path) -> None:
    expected = len(load_results(finished).curves)
    with read_only_copy(finished) as copy:
        results = load_results(copy)
        assert len(results.curves) == expected and results.trials.to_pandas().shape[0] == 8
        assert repr(results) and results._repr_html_()


@pytest.mark.slow
def test_results_at_an_address_are_read_as_a_whole_and_by_phase(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server(tmp_path) as port:
        for name, value in environment(port).items():
            monkeypatch.setenv(name, value)
        make_bucket("bucket")
        ended = run(write_file(tmp_path, corpus, steps=1), out="s3://bucket/runs", inline=True)
        assert (ended.exit_code, ended.path) == (0, "s3://bucket/runs/tiny")
        whole, phase = ended.results, load_results("s3://bucket/runs/tiny/alpha")
        assert (whole.status, whole.path, phase.phase) == ("finished", ended.path, "alpha")
        assert list(phase.curves) == [row for row in whole.curves if row.phase == "alpha"]
        assert len(phase.curves) and phase.arms == load_results("s3://bucket/runs/tiny/alpha/").arms
        with pytest.raises(ConfigError, match="s3://bucket/runs/other is not a results directory"):
            load_results("s3://bucket/runs/other")
        with pytest.raises(ConfigError, match="unknown phase 'alhpa'"):
            load_results("s3://bucket/runs/tiny/alhpa")
