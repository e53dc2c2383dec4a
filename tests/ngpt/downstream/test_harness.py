"""Tasks of lm-evaluation-harness on a run of our own: names of scores, refusals, and the harness's own command."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ngpt.config.base import ConfigError, build, override
from ngpt.downstream import harness
from ngpt.downstream.config import DownstreamTasks
from ngpt.downstream.evaluate import evaluate_checkpoint
from ngpt.downstream.harness import check_tasks, run_tasks, without_stderr
from ngpt.training.config import TrainConfig
from ngpt.training.load_model import load_model
from tests.helpers import tiny_run
from tests.helpers.harness_tasks import write_tasks

pytestmark = pytest.mark.slow  # imports the harness, and needs the extra `lm-eval`


@pytest.fixture(scope="module")
def run(tiny: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny_run.run(override(tiny, {"block_size": 64}), folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), n=6)


def config(tasks: Path, *names: str, **options: object) -> DownstreamTasks:
    return build(DownstreamTasks, {"tasks": names, "include_path": str(tasks), **options})


def test_scores_have_the_names_that_are_known_before_and_their_standard_errors(run: Path, tasks: Path) -> None:
    asked = config(tasks, "endings", "last_word", "texts", "go_on")
    goals = check_tasks(asked)
    assert goals == {
        "endings/acc": True,
        "endings/acc_norm": True,
        "last_word/perplexity": False,
        "last_word/acc": True,
        "texts/word_perplexity": False,
        "texts/bits_per_byte": False,
        "go_on/exact_match": True,
    }
    found = evaluate_checkpoint(run, asked)
    assert {name for name in found.scores if not name.endswith("_stderr")} == goals.keys()
    acc = found.scores["endings/acc"]
    assert acc is not None
    # The standard error of a mean of six answers that are right or wrong.
    assert found.scores["endings/acc_stderr"] == pytest.approx((acc * (1 - acc) / 5) ** 0.5)
    assert found.about["examples"] == dict.fromkeys(asked.tasks, 6)
    assert found.about["checkpoint_step"] == 8
    assert found.about["content"].keys() == set(asked.tasks)


def test_the_digest_of_a_task_follows_its_examples_and_prompts(run: Path, tmp_path: Path) -> None:
    def content(folder: str, n: int, **changes: str) -> str:
        tasks = write_tasks(tmp_path / folder, n=n)
        file = tasks / "last_word.yaml"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return evaluate_checkpoint(run, config(tasks, "last_word", limit=3)).about["content"]["last_word"]

    same = content("one", 5)
    assert content("two", 5) == same
    assert len({same, content("three", 2), content("four", 5, doc_to_text="Go on: {{text}}")}) == 3


def test_scores_of_a_group_are_those_of_its_tasks_under_each_filter(run: Path, tmp_path: Path) -> None:
    """A group gives the mean of the scores that its tasks have, by default under every filter that they have."""
    own = write_tasks(tmp_path / "own", n=3)
    word = {"name": "word", "filter": [{"function": "regex", "regex_pattern": "[a-z]+"}, {"function": "take_first"}]}
    filtered = json.loads((own / "go_on.yaml").read_text()) | {"task": "first_word", "filter_list": [word]}
    (own / "first_word.yaml").write_text(json.dumps(filtered))
    means = [{"metric": "perplexity"}, {"metric": "exact_match"}, {"metric": "acc", "filter_list": ["none", "word"]}]
    group = {"group": "words", "task": ["last_word", "first_word"], "aggregate_metric_list": means}
    (own / "words.yaml").write_text(json.dumps(group))
    goals = check_tasks(config(own, "words"))
    assert {name: is_higher for name, is_higher in goals.items() if name.startswith("words/")} == {
        "words/perplexity": False,
        "words/exact_match/word": True,
        "words/acc": True,
    }
    found = evaluate_checkpoint(run, config(own, "words"))
    assert {name for name in found.scores if "_stderr" not in name} == goals.keys()
    assert "words/exact_match_stderr/word" in found.scores
    assert {without_stderr(name) for name in found.scores} == goals.keys()


def test_a_limit_and_examples_before_each_one_are_those_of_the_harness(run: Path, tasks: Path) -> None:
    loaded = load_model(run)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    found = run_tasks(loaded, config(tasks, "last_word", limit=2, batch_size=1))
    assert found["n-samples"]["last_word"] == {"original": 6, "effective": 2}
    assert harness.scores_of(found)["last_word/acc"] in (0.0, 0.5, 1.0)
    # Whoever trains on in this process draws as if nothing had run.
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_unknown_tasks_and_data_are_refused_in_one_line(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    write_tasks(own)
    (own / "data.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"^the tasks endings cannot be loaded: .*data\.jsonl"):
        check_tasks(config(own, "endings"))
    with pytest.raises(ConfigError, match=r"include_path: .*nowhere: no such folder"):
        check_tasks(config(tmp_path / "nowhere", "endings"))
    with pytest.raises(ConfigError, match="unknown task 'last_wordd', did you mean 'last_word'"):
        check_tasks(config(tasks, "last_wordd"))
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"need the package lm-eval: pip install 'ngpt-campaign\[lm-eval\]'"):
        check_tasks(config(tasks, "endings"))


def test_the_command_of_the_harness_knows_our_model(run: Path, tasks: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ngpt.downstream", "lm_eval", "--model_args", f"pretrained={run},max_length=48"]
    command += ["--tasks", "endings,go_on", "--include_path", str(tasks), "--device", "cpu", "--batch_size", "auto"]
    done = subprocess.run([*command, "--output_path", str(tmp_path / "out.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"ngpt ({{'pretrained': '{run}', 'max_length': 48}})" in done.stdout
    written = json.loads(next(tmp_path.glob("out*.json")).read_text())
    assert 0 <= written["results"]["go_on"]["exact_match,none"] <= 1
    assert written["config"]["model_num_parameters"] > 0


def test_the_bootstrap_ends_in_a_process_that_ignores_sigterm(
    run: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from ngpt.downstream.harness_model import HarnessModel

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # so that it is removed in the end
    monkeypatch.delenv("DISABLE_MULTIPROC")
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        model = HarnessModel(load_model(run))
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        found = simple_evaluate(model=model, tasks=["last_word"], bootstrap_iters=20, task_manager=manager)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found is not None and found["results"]["last_word"]["perplexity_stderr,none"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrained=nowhere", "nowhere: no such folder"),
        ("pretrained=RUN,max_length=65", "max_length must be from 1 to the model's block_size of 64, got 65"),
        ("pretrained=RUN,rope_scalin=ntk", "unknown setting, did you mean 'rope_scaling'?"),
        ("pretrained=RUN,dtype=float16", "unknown dtype 'float16', did you mean 'bfloat16'?"),
        ("pretrained=RUN,batch_size=0", "batch_size must be a whole number of at least 1, or auto, got 0"),
        ("pretrained=RUN,max_gen_toks=64", "max_gen_toks must be less than the context of 64 tokens, got 64"),
    ],
)
def test_a_wrong_argument_is_one_line(run: Path, arguments: str, message: str) -> None:
    from lm_eval.api.instance import Instance

    from ngpt.downstream.harness_model import HarnessModel

    with pytest.raises(ConfigError) as caught:
        model = HarnessModel.create_from_arg_string(arguments.replace("RUN", str(run)), {"device": "cpu"})
        model.generate_until([Instance("generate_until", {}, ("a text", {"until": ["."]}), 0)])
    assert message in str(caught.value)
