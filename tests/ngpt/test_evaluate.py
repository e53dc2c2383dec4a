"""Validation loss and bits per byte equal a float64 computation from the logits, also on a longer context."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ngpt.config.base import build, flatten, override
from ngpt.data.dataset import Dataset, open_dataset
from ngpt.data.loader import EvalSet, eval_set
from ngpt.data.tokens.shards import write_shard
from ngpt.evaluate import main
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from ngpt.optim.projection import project_weights
from ngpt.training.checkpoint import save_checkpoint
from ngpt.training.config import TrainConfig
from ngpt.training.evaluation import evaluate
from ngpt.training.load_model import load_model
from tests.helpers import numpy_gpt, tiny_run
from tests.helpers.vocabularies import write_gpt2


def no_autocast() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


@pytest.fixture
def model(dataset: Dataset) -> GPT:
    size = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": dataset.vocab_size}
    return GPT(build(ModelConfig, size | {"logit_scale": 8.0}))


def test_the_loss_is_the_mean_over_tokens_even_if_the_last_batch_is_smaller(model: GPT, dataset: Dataset) -> None:
    data = eval_set(dataset, tokens=16 * 11, batch_size=4, block_size=16)
    assert [len(idx) for idx, _ in data.batches] == [4, 4, 3]
    nats = []
    for idx, targets in data.batches:
        logits = model(idx).detach().double().numpy()
        log_total = np.log(np.exp(logits).sum(-1))
        nats.append(log_total - np.take_along_axis(logits, targets.numpy()[..., None], -1)[..., 0])
    assert dataset.token_bytes is not None
    n_bytes = sum(int(dataset.token_bytes[targets.numpy()].sum()) for _, targets in data.batches)
    total = sum(float(part.sum()) for part in nats)
    scores = evaluate(model, data, autocast=no_autocast())
    assert scores == {
        "val_loss": pytest.approx(total / (16 * 11), rel=1e-6),
        "val_bpb": pytest.approx(total / n_bytes / math.log(2), rel=1e-6),
    }


class Fixed(nn.Module):
    """Returns a given loss for each batch."""

    def __init__(self, *losses: float) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.losses = iter(losses)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return torch.tensor(next(self.losses))


def fixed(*losses: float) -> Any:
    return Fixed(*losses)


def batches(*rows: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.zeros(n, 5, dtype=torch.long), torch.zeros(n, 5, dtype=torch.long)) for n in rows]


def test_bits_per_byte_equal_a_count_by_hand() -> None:
    data = EvalSet(batches=batches(3, 1), n_tokens=20, n_bytes=60, sha256="")
    scores = evaluate(fixed(2.0, 4.0), data, autocast=no_autocast())
    assert scores["val_loss"] == (15 * 2.0 + 5 * 4.0) / 20
    assert scores["val_bpb"] == pytest.approx(50 / math.log(2) / 60)


def test_bits_per_byte_need_a_tokenizer() -> None:
    data = EvalSet(batches=batches(1), n_tokens=5, n_bytes=None, sha256="")
    scores = evaluate(fixed(2.0), data, autocast=no_autocast())
    assert scores == {"val_loss": 2.0, "val_bpb": None}


def test_a_nan_in_one_batch_makes_the_mean_nan() -> None:
    data = EvalSet(batches=batches(1, 1), n_tokens=10, n_bytes=10, sha256="")
    scores = evaluate(fixed(2.0, math.nan), data, autocast=no_autocast())
    assert all(math.isnan(score) for score in scores.values() if score is not None)


def test_the_loss_of_a_uniform_guess_is_the_log_of_the_vocabulary(dataset: Dataset) -> None:
    size = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": dataset.vocab_size}
    model = GPT(build(ModelConfig, size | {"residual": "add"}))  # its head starts at zero
    data = eval_set(dataset, tokens=160, batch_size=4, block_size=16)
    assert evaluate(model, data, autocast=no_autocast())["val_loss"] == pytest.approx(math.log(dataset.vocab_size))


def test_bfloat16_is_close_to_float32(model: GPT, dataset: Dataset) -> None:
    data = eval_set(dataset, tokens=160, batch_size=4, block_size=16)
    full = evaluate(model, data, autocast=no_autocast())["val_loss"]
    low = evaluate(model, data, autocast=torch.autocast("cpu", dtype=torch.bfloat16))["val_loss"]
    assert low != full and low == pytest.approx(full, abs=0.02)


def test_evaluation_restores_the_mode_of_the_model(model: GPT, dataset: Dataset) -> None:
    data = eval_set(dataset, tokens=16, batch_size=1, block_size=16)
    for training in (True, False):
        evaluate(model.train(training), data, autocast=no_autocast())
        assert model.training == training


# ---- a longer context ------------------------------------------------------------------------------------------------

KEYS, VALUES = 8, 8


def recall(rows: int, time: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of eight keys with a random value each, followed by questions: (idx, targets), both (rows, time).

    The answer to a key is the value that it has at the start of the row, however far back that is.
    """
    words = KEYS + torch.arange(KEYS) * VALUES + torch.randint(VALUES, (rows, KEYS), generator=draw)
    shown = words.gather(1, torch.rand(rows, KEYS, generator=draw).argsort(1))
    asked = torch.randint(KEYS, (rows, time - KEYS), generator=draw)
    return torch.cat([shown, asked], 1), torch.cat([shown, words.gather(1, asked)], 1)


@pytest.fixture(scope="module")
def trained_at_32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": KEYS * (1 + VALUES)}
    # With this base the slowest channels make at most half a turn within 32 tokens, so larger angles are unseen.
    cfg = build(ModelConfig, size | {"mlp_ratio": 1.0, "logit_scale": 10.0, "rope_base": 100.0})
    model, draw, steps = GPT(cfg), torch.Generator().manual_seed(0), 200
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        optimizer.zero_grad()
        model(*recall(16, 32, draw)).backward()
        optimizer.step()
        project_weights(model)
    identity = {f"model.{name}": value for name, value in flatten(cfg).items()}
    root = tmp_path_factory.mktemp("recall")
    save_checkpoint(
        root, weights=model.state_dict(), state={}, step=steps, val_loss=None, identity=identity, keep_last=1
    )
    return root


def test_scaled_positions_extend_the_context_and_plain_ones_do_not(trained_at_32: Path) -> None:
    """Over eight seeds, loss plain 2.1 to 2.9, ntk 0.28 to 0.81, linear and yarn below 0.02."""
    draw = torch.Generator().manual_seed(99)

    def loss(time: int, **changes: Any) -> float:
        batch = recall(60, time, draw)
        data = EvalSet([batch], n_tokens=batch[1].numel(), n_bytes=None, sha256="")
        model = load_model(trained_at_32, block_size=time, **changes).model
        return evaluate(model, data, autocast=no_autocast())["val_loss"] or 0.0

    plain = loss(128)
    scaled = {kind: loss(128, rope_scaling=kind, rope_factor=4.0) for kind in ("linear", "ntk", "yarn")}
    assert loss(32) < 0.02
    assert plain > 1.5  # a guess costs log(8) = 2.1
    assert scaled["ntk"] < plain / 2
    assert scaled["linear"] < 0.1 and scaled["yarn"] < 0.1


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny: TrainConfig, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run and its final metrics."""
    out = tmp_path_factory.mktemp("evaluate") / "run"
    return out, tiny_run.run(override(tiny, {"steps": 20, "eval_every": 20}), out, dataset).metrics


def figures(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code = main([*map(str, arguments), "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return json.loads(printed.out, parse_constant=pytest.fail)


def test_a_checkpoint_scores_what_its_run_reported(
    run: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, metrics = run
    found = figures(capsys, out)
    assert found["val_loss"] == pytest.approx(metrics["val_loss"], abs=1e-6)
    assert found["val_bpb"] == pytest.approx(metrics["val_bpb"], abs=1e-6)
    assert found["perplexity"] == pytest.approx(np.exp(metrics["val_loss"]))
    assert (found["step"], found["block_size"], found["trained_on_corpus"]) == (20, 16, True)
    assert main([str(out)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines.keys() == found.keys() and float(lines["val_loss"]) == pytest.approx(found["val_loss"], rel=1e-5)


def test_eval_tokens_and_block_size_can_be_changed(
    run: tuple[Path, dict[str, Any]], dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run
    changes = {"block_size": 64, "rope_scaling": "ntk", "rope_factor": 4.0}
    setting = [f"{name}={value}" for name, value in changes.items()]
    found = figures(capsys, out, "--eval-tokens", 1000, "--set", *setting)
    data = eval_set(dataset, tokens=1000, batch_size=2, block_size=64)
    expected = evaluate(load_model(out, **changes).model, data, autocast=no_autocast())
    assert found["eval_sha256"] == data.sha256 and found["eval_tokens"] == 15 * 64
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-6)
    assert {name: found[name] for name in changes} == changes
    low = figures(capsys, out, "--dtype", "bfloat16")["val_loss"]
    assert low != found["val_loss"] and low == pytest.approx(run[1]["val_loss"], abs=0.05)


def test_another_corpus_is_read_with_the_models_tokenizer(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run
    text = tmp_path / "other.txt"
    text.write_text("What is written here is no documentation. " * 200)
    alone = shutil.copytree(out / "checkpoints" / "step_0000020", tmp_path / "alone")
    found = figures(capsys, alone, "--corpus", text)
    assert found["trained_on_corpus"] is False and 0 < found["val_bpb"] < 8
    assert main([str(alone), "--corpus", str(text), "--tokenizer", "sentencepiece:300"]) == 2
    assert f"sentencepiece:300 would be trained on {text}" in capsys.readouterr().err


def test_the_runs_corpus_is_recognized_under_any_spelling_of_its_path(
    tiny: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its text would be split again, and most of the validation split would be training data."""
    text = tmp_path / "own.txt"
    text.write_text("Another text, which is split like the corpus of the run. " * 200)
    data = {"data.corpus": str(text), "data.tokenizer": "sentencepiece:300", "data.val_fraction": 0.3}
    config = override(tiny, data | {"steps": 1})
    tiny_run.run(config, tmp_path / "run", open_dataset(config.data))
    monkeypatch.chdir(tmp_path)
    found = [figures(capsys, tmp_path / "run", "--corpus", name) for name in (text, "own.txt", "run/../own.txt")]
    assert found[0]["trained_on_corpus"] and found[1] == found[0] == found[2]


def test_a_corpus_that_was_edited_since_the_training_is_said(
    tiny: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "own.txt"
    text.write_text("A text that is still being written. " * 300)
    data = {"data.corpus": str(text), "data.tokenizer": f"gpt2:{write_gpt2(tmp_path / 'gpt2')}"}
    config = override(tiny, data | {"steps": 1})
    tiny_run.run(config, tmp_path / "run", open_dataset(config.data))
    assert main([str(tmp_path / "run")]) == 0
    assert "warning" not in capsys.readouterr().err
    text.write_text(text.read_text() + "Here it goes on. " * 300)
    assert main([str(tmp_path / "run")]) == 0
    assert f"warning: {text} has changed since the training: this is another text" in capsys.readouterr().err


# ---- all of a text, in sliding windows -------------------------------------------------------------------------------

TEXT = "The loss of  a text\nis a sum over its tokens, caf\xe9 \u3000 and \U0001f600 included.\n" * 3


def reference_nats(folder: Path, ids: np.ndarray, stride: int) -> list[float]:
    """-log p of each token but the first, in float64, from the context that its window leaves it."""
    model = load_model(folder).model
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    nats, block_size = [], model.cfg.block_size
    for at in range(1, len(ids)):
        start = max(0, -(-(at - block_size) // stride)) * stride
        logits = numpy_gpt.logits(model.cfg, weights, ids[None, start:at].astype(np.int64))[0, -1]
        nats.append(float(np.log(np.exp(logits).sum()) - logits[ids[at]]))
    return nats


def assert_scores(found: dict[str, Any], nats: float, tokens: int, n_bytes: int, words: int) -> None:
    """The definitions of lm-evaluation-harness."""
    assert (found["eval_tokens"], found["eval_bytes"], found["eval_words"]) == (tokens, n_bytes, words)
    assert found["val_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["val_bpb"] == found["bits_per_byte"] == pytest.approx(nats / n_bytes / math.log(2), rel=1e-5)
    assert found["byte_perplexity"] == pytest.approx(math.exp(nats / n_bytes), rel=1e-4)
    assert found["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-3)


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_all_of_a_file_is_scored_as_a_float64_reference_scores_it(
    stride: int, run: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_model(run[0]).tokenizer
    assert tokenizer is not None
    path = tmp_path / "own.txt"
    path.write_text(TEXT)
    ids = tokenizer.encode(TEXT)
    found = figures(capsys, run[0], "--corpus", path, "--stride", stride)
    nats = reference_nats(run[0], ids, stride)
    first = len(tokenizer.decode(ids[:1]).encode())
    assert_scores(found, sum(nats), len(ids) - 1, len(TEXT.encode()) - first, len(tokenizer.decode(ids[1:]).split()))
    assert (found["split"], found["stride"], found["by_document"]) == ("all", stride, False)
    assert found["eval_documents"] is None
    assert figures(capsys, run[0], "--corpus", path)["val_loss"] == pytest.approx(
        sum(reference_nats(run[0], ids, 16)) / len(nats), rel=1e-5
    )


def test_documents_are_scored_each_from_its_own_start(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_model(run[0]).tokenizer
    assert tokenizer is not None
    documents = [TEXT[:number] for number in (1, 20, 40, 7, 90)]
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in documents))
    found = figures(capsys, run[0], "--corpus", path, "--text-column", "body", "--by-document", "--stride", 4)
    encoded = [tokenizer.encode(text) for text in documents]
    nats = sum(sum(reference_nats(run[0], ids, 4)) for ids in encoded)
    rests = [tokenizer.decode(ids[1:]) for ids in encoded]
    words = sum(len(rest.split()) for rest in rests)
    assert_scores(found, nats, sum(map(len, encoded)) - 5, sum(len(rest.encode()) for rest in rests), words)
    assert found["eval_documents"] == sum(map(bool, rests)) == 4  # the first one is a single token
    assert figures(capsys, run[0], "--corpus", path, "--text-column", "body")["eval_documents"] == 5


def test_all_tokens_of_a_token_file_are_scored(
    run: tuple[Path, dict[str, Any]], dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = dataset.val[0][:203]
    write_shard(tmp_path / "tokens.bin", ids, vocab_size=dataset.vocab_size)
    found = figures(capsys, run[0], "--corpus", tmp_path / "tokens.bin", "--stride", 8)
    assert (found["split"], found["eval_tokens"]) == ("all", 202)
    assert found["val_loss"] == pytest.approx(sum(reference_nats(run[0], ids, 8)) / 202, rel=1e-5)


def test_the_command_says_what_it_scored(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.txt"
    path.write_text(TEXT)
    for arguments, said in ((["--corpus", str(path)], f"all of {path}"), ([], "the start of the val split of ")):
        assert main([str(run[0]), *arguments, "--json"]) == 0
        printed = capsys.readouterr()
        found = json.loads(printed.out)
        counts = f"{found['eval_tokens']:,} tokens, {found['eval_bytes']:,} bytes, {found['eval_words']:,} words"
        line = printed.err.splitlines()[-1]
        assert line.startswith(f"scored {said}") and line.endswith(f": {counts}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval-tokens", "0"], "--eval-tokens must be at least 1 and at most 1,000,000,000, got 0"),
        (["--set", "block_sizes=64"], "block_sizes: unknown setting, did you mean 'block_size'?"),
        (["--set", "block_size=100000"], "block_size 100000 needs 100001 consecutive tokens"),
        (["--corpus", "shakespear"], "unknown corpus 'shakespear', did you mean 'shakespeare'?"),
        (["--stride", "17"], "--stride must be at most the block_size of 16, got 17"),
        (["--set", "rope_factor=4"], "rope_factor: rope_factor 4.0 needs a rope_scaling"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, run: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run[0]), *arguments]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(message) and printed.out == ""


def test_a_checkpoint_that_names_no_corpus_needs_one(trained_at_32: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trained_at_32)]) == 2
    assert "does not say what it was trained on: name it with --corpus" in capsys.readouterr().err
