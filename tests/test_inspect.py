"""The opened box: what it shows is what happens, in order, and looking changes nothing. The document that uses it."""

import json
import math
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy_gpt import logits as numpy_logits
from tiny_run import run

import run_campaign
from ngpt.config import build
from ngpt.data.corpora import Dataset
from ngpt.diagnostics import divisors
from ngpt.inspect import Inspection, Stage, angles, look_into, main, score_facts, table
from ngpt.model import GPT, ModelConfig
from ngpt.optim import kinds
from ngpt.train_config import TrainConfig

DOCUMENT = Path(__file__).parents[1] / "docs" / "how-it-works.md"
DRAWS = torch.Generator().manual_seed(7)
IDX, TARGETS = (torch.randint(31, (2, 12), generator=DRAWS) for _ in range(2))
ATTENTION = ["q", "k", "v", "q rotated", "k rotated", "q used", "k used", "mixed", "answer"]
TINY = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.block_size=16", "batch_size=2", "eval_tokens=64"]


def model(**changes: object) -> GPT:
    plain = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 31}
    gpt = GPT(build(ModelConfig, plain | changes))
    with torch.no_grad():  # what starts at zero would hide mistakes
        for parameter in gpt.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(3))
    return gpt


def look(gpt: GPT, *, backward: bool = False, dtype: str = "float32") -> Inspection:
    return look_into(gpt, IDX, TARGETS, backward=backward, dtype=dtype)


def stages(found: Inspection) -> dict[str, Stage]:
    assert len({stage.name for stage in found.forward}) == len(found.forward)
    return {stage.name: stage for stage in found.forward}


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_every_stage_of_ngpt_comes_once_and_in_order() -> None:
    mlp = ["up", "into silu", "hidden", "answer"]
    block = [*(f"attention.{name}" for name in [*ATTENTION, "stream"]), *(f"mlp.{name}" for name in [*mlp, "stream"])]
    expected = ["embedding", *(f"{layer}.{name}" for layer in (0, 1) for name in block), "loss", "logits (apart)"]
    assert [stage.name for stage in look(model()).forward] == expected


def test_every_stage_of_the_gpt_comes_once_and_in_order() -> None:
    mlp = ["reads", "up", "into relu", "hidden", "answer", "stream"]
    block = [*(f"attention.{name}" for name in ["reads", *ATTENTION, "stream"]), *(f"mlp.{name}" for name in mlp)]
    found = look(model(residual="add", mlp="relu2", n_layer=1))
    ends = ["final norm", "loss", "logits (apart)"]
    assert [stage.name for stage in found.forward] == [
        "embedding", "embedding normalised", *(f"0.{name}" for name in block), *ends,
    ]  # fmt: skip


@pytest.mark.parametrize("residual", ["lerp", "slerp", "seed"])
def test_the_stream_and_what_attention_compares_are_shown_to_be_on_the_sphere(residual: str) -> None:
    found = stages(look(model(residual=residual)))
    on = {name for name, stage in found.items() if stage.sphere == "1"}
    assert on == {"embedding"} | {
        f"{layer}.{name}"
        for layer in (0, 1)
        for name in ("attention.q used", "attention.k used", "attention.stream", "mlp.stream")
    }
    assert found["0.attention.q"].shape == (2, 12, 2, 8) and found["1.mlp.hidden"].shape == (2, 12, 64)


def test_a_ghost_norm_is_seen_as_a_stream_off_the_sphere() -> None:
    found = stages(look(model(norm_every=2)))
    assert found["0.attention.stream"].sphere == "-" and found["0.mlp.stream"].sphere == "1"


def test_the_gpt_lives_on_spheres_of_another_radius() -> None:
    found = stages(look(model(residual="add", mlp="relu2")))
    assert {name for name, stage in found.items() if stage.sphere == "sqrt"} == {
        "embedding normalised", "final norm",
        *(f"{layer}.{name}" for layer in (0, 1) for name in ("attention.reads", "mlp.reads")),
        *(f"{layer}.attention.{letter} used" for layer in (0, 1) for letter in "qk"),
    }  # fmt: skip
    assert found["final norm"].length[0] == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"residual": "add", "softcap": 5.0}, {"n_kv_head": 1, "norm_mode": "dotprod"}])
def test_loss_and_logits_are_those_of_an_independent_model(changes: dict[str, object]) -> None:
    gpt = model(**changes)
    found = look(gpt)
    expected = numpy_logits(gpt.cfg, {name: value.numpy() for name, value in gpt.state_dict().items()}, IDX.numpy())
    wide = torch.from_numpy(expected)
    assert found.summary["loss"] == pytest.approx(
        float(F.cross_entropy(wide.flatten(0, 1), TARGETS.flatten())), rel=1e-4
    )
    facts = stages(found)["logits (apart)"].facts
    assert facts["sd"] == pytest.approx(expected.std(ddof=1), rel=1e-3)
    assert facts["peak"] == pytest.approx(np.abs(expected).max(), rel=1e-3)


def test_a_scalar_lerp_turns_the_stream_by_the_angle_that_trigonometry_gives() -> None:
    """In the plane of x and f at an angle a, lerp ends at atan2(alpha sin a, 1 - alpha + alpha cos a)."""
    gpt = model(n_layer=1, alpha=0.3, alpha_kind="scalar")
    x = gpt.wte(IDX).detach()
    with torch.no_grad():
        answer = gpt.blocks[0].attention(x, gpt.cos, gpt.sin)  # pyright: ignore[reportCallIssue,reportArgumentType]
    cosine = (F.normalize(answer, dim=-1) * x).sum(-1).double()
    angle = torch.arccos(cosine)
    expected = torch.rad2deg(torch.atan2(0.3 * angle.sin(), 0.7 + 0.3 * angle.cos()))
    facts = stages(look(gpt))["0.attention.stream"].facts
    assert facts["alpha"] == pytest.approx(0.3)
    shown = [facts["degrees"], facts["degrees_min"], facts["degrees_max"]]
    assert shown == pytest.approx([float(expected.mean()), float(expected.min()), float(expected.max())], rel=1e-4)


def test_angles_are_exact_from_the_tiniest_to_the_straight() -> None:
    degrees = torch.tensor([0.0, 1e-6, 0.5, 90.0, 179.9], dtype=torch.float64)
    radians = torch.deg2rad(degrees)
    turned = torch.stack([radians.cos(), radians.sin()], dim=-1) * 3
    assert angles(torch.tensor([2.0, 0.0]).expand(5, 2), turned).tolist() == pytest.approx(degrees.tolist(), rel=1e-6)


@pytest.mark.parametrize("mode", ["dotprod", "ema"])
def test_the_divisors_shown_are_those_that_training_reports(mode: str) -> None:
    gpt = model(norm_mode=mode)
    found = stages(look(gpt))
    for name, r in divisors(gpt, IDX).items():
        sublayer, layer = name.removeprefix("r/").split(".")
        assert found[f"{layer}.{sublayer}.r"].facts["r"] == pytest.approx(float(r.mean()))


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_score_facts_are_those_of_a_plain_loop() -> None:
    draws = np.random.default_rng(0)
    q, k = draws.normal(size=(2, 4, 5, 6)), draws.normal(size=(2, 2, 5, 6))  # two heads share a key
    visible, reads = [], []
    for b, h, t in np.ndindex(2, 4, 5):
        scores = [0.7 * float(q[b, h, t] @ k[b, h // 2, s]) for s in range(t + 1)]
        weights = np.exp(scores) / np.exp(scores).sum()
        visible += scores
        reads.append(math.exp(-float(weights @ np.log(weights))))
    facts = score_facts(torch.from_numpy(q), torch.from_numpy(k), 0.7)
    assert facts["sd"] == pytest.approx(np.std(visible), rel=1e-5)
    assert facts["peak"] == pytest.approx(np.abs(visible).max(), rel=1e-5)
    assert facts["reads"] == pytest.approx(np.mean(reads), rel=1e-5) and facts["sees"] == 3


def test_equal_keys_are_all_read_and_a_matching_one_alone() -> None:
    eye = torch.eye(4).view(1, 1, 4, 4)
    assert score_facts(eye, torch.zeros(1, 1, 4, 4), 1.0)["reads"] == pytest.approx(2.5)
    assert score_facts(eye, eye, 100.0)["reads"] == pytest.approx(1)


# ---- looking changes nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"residual": "add"}, {"norm_mode": "dotprod", "residual": "seed"}])
def test_afterwards_the_model_is_as_it_was(changes: dict[str, object]) -> None:
    gpt, untouched = model(**changes).eval(), model(**changes).eval()
    turning = [block.attention.rotate for block in gpt.blocks]  # pyright: ignore[reportAttributeAccessIssue]
    look(gpt)
    assert torch.equal(gpt(IDX), untouched(IDX))
    assert [block.attention.rotate for block in gpt.blocks] == turning  # pyright: ignore[reportAttributeAccessIssue]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in gpt.modules())
    assert all(parameter.grad is None for parameter in gpt.parameters())


def test_a_pass_that_fails_leaves_no_hooks_behind() -> None:
    gpt = model()
    with pytest.raises(ValueError, match="do not fit the model's block_size"):
        look_into(gpt, torch.zeros(1, 13, dtype=torch.int64), torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(IndexError):
        look_into(gpt, torch.full((1, 4), 99), torch.zeros(1, 4, dtype=torch.int64))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in gpt.modules())


# ---- backward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"residual": "add", "mlp": "relu2"}, {"norm_mode": "ema"}])
def test_gradients_arrive_in_reverse_and_are_those_of_the_loss(changes: dict[str, object]) -> None:
    gpt, plain = model(**changes), model(**changes).eval()
    found = look(gpt, backward=True)
    arrived = [stage.name for stage in found.backward]
    streams = [stage.name for stage in found.forward if stage.name.endswith("stream")]
    assert [name for name in arrived if name.endswith("stream")] == streams[::-1]
    assert arrived[0] == "loss" and arrived[-1] == "embedding" and "0.attention.q" in arrived
    F.cross_entropy(plain(IDX).flatten(0, 1), TARGETS.flatten()).backward()
    for kind, members in kinds(plain).items():
        gradients = [p.grad.flatten() for p in members if p.grad is not None]
        if gradients:
            expected = float(torch.cat(gradients).norm())
            assert found.summary[f"grad_norm/{kind}"] == pytest.approx(expected, rel=1e-4)


def test_the_embedding_stage_gets_the_gradient_that_its_rows_collect() -> None:
    gpt = model()
    idx = torch.arange(12).view(1, 12)  # each token once, so that no two gradients meet in a row
    found = {stage.name: stage for stage in look_into(gpt, idx, TARGETS[:1], backward=True).backward}
    assert gpt.wte.weight.grad is not None
    rows = gpt.wte.weight.grad[:12].norm(dim=1)
    assert found["embedding"].length == pytest.approx([float(rows.mean()), float(rows.min()), float(rows.max())])


def test_half_precision_shows_in_the_types_and_not_in_the_stream() -> None:
    found = stages(look(model(), dtype="bfloat16"))
    assert found["0.attention.q"].dtype == "bfloat16" and found["0.mlp.stream"].dtype == "float32"


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def options(corpus: Path) -> list[str]:
    return [*TINY, f"data.corpus={corpus}", "data.tokenizer=sentencepiece:400"]


def test_the_table_fits_a_terminal_and_says_what_the_model_costs(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--backward", "--set", *options, "residual=seed", "norm_mode=dotprod"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert sum(line.startswith("0.mlp.stream") for line in lines) == 2
    figures = dict(line.split(maxsplit=1) for line in lines[-16:] if len(line.split()) == 2)
    # 16 * (2 * 400 + 4 * 16 + 3 * 64) and the scales: alpha 2 * 16, s_qk 16, s_uv 128, s_z 400
    assert figures["n_params"] == f"{16 * (800 + 64 + 192) + 32 + 16 + 128 + 400:,}"
    assert figures["flops_per_token"] == f"{6 * 16 * (400 + 64 + 192) + 12 * 16 * 16:,}"


def test_json_is_one_strict_object(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--set", *options]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["summary"]["ln_V"] == pytest.approx(math.log(400))
    assert found["forward"][0]["shape"] == [2, 16, 16] and found["backward"] == []


def test_a_long_stage_name_does_not_make_the_table_ragged() -> None:
    stage = Stage("11.attention.k rotated", (64, 1024, 50257), "float32", (1e-5, 1.23e-6, 0.123), "sqrt", 123.45)
    header, line = table([stage]).splitlines()
    assert header.index(" ms") + 3 == len(line) and len(line) < 90


def test_a_checkpoint_is_shown_as_it_was_trained(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny, tmp_path, dataset)
    assert main(["--checkpoint", str(tmp_path), "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)["summary"]["loss"]
    assert trained < math.log(400) - 0.05
    assert main(["--checkpoint", str(tmp_path), "--set", "rope_scaling=yarn", "rope_factor=2", "block_size=32"]) == 0
    assert "4x32x16" in capsys.readouterr().out
    assert main(["--checkpoint", str(tmp_path), "--set", "n_embd=32"]) == 2
    assert capsys.readouterr().err.startswith("n_embd=32 does not fit")
    assert main(["--checkpoint", str(tmp_path), "--set", "data.tokenizer=sentencepiece:380"]) == 2
    assert "tokenized with another sentencepiece:380" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "model.alhpa=1"], "did you mean 'model.alpha'?"),
        (["--checkpoint", "no/such/run"], "no/such/run: no such folder"),
        (["--config", "no/such/file.yaml"], "no/such/file.yaml"),
    ],
)
def test_a_mistake_is_one_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) in (2, 74)
    assert message in capsys.readouterr().err


# ---- the document ----------------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    text = DOCUMENT.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line]


def files() -> dict[str, str]:
    """The files at the end of the document; each begins with `# name`."""
    named = [(re.match(r"# (\w+\.\w+)", block), block) for block in [*blocks("yaml"), *blocks("python")]]
    return {match[1]: block for match, block in named if match}


@pytest.fixture
def written(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the document's files, with a smaller corpus and one step of one seed instead of 150 of three."""
    for name, text in files().items():
        short = text.replace("python-docs", str(corpus)).replace("sentencepiece:1024", "sentencepiece:400")
        (tmp_path / name).write_text(short.replace("seeds=(1, 2, 3), steps=150", "seeds=(1,), steps=1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lab", raising=False)
    return tmp_path


def test_the_document_answers_the_twelve_questions_and_what_it_shows_is_tested() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert len(re.findall(r"^### .+\?$", text, flags=re.MULTILINE)) == 12
    assert files().keys() == {"questions.yaml", "sphere.yaml", "lab.py", "changes.py", "facts.py"}
    assert "seeds=(1, 2, 3), steps=150" in files()["lab.py"]
    assert {tuple(command[:3]) for command in commands()} == {
        ("python", "-m", "ngpt.inspect"), ("python", "run_campaign.py", "questions.yaml"),
        ("python", "run_campaign.py", "sphere.yaml"),
    }  # fmt: skip
    mentioned = set(re.findall(r"`(\w+\.(?:py|yaml))`", text))
    assert mentioned <= files().keys() | {"run_campaign.py"}


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_a_command_of_the_document_works(
    command: list[str], written: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of campaigns only the plan is made, which trains nothing; everything else is run, with two sequences."""
    if command[1] == "run_campaign.py":
        assert run_campaign.main([*command[2:], "--plan"]) == 0
    else:
        small = ["--set", f"data.corpus={corpus}", "data.tokenizer=sentencepiece:400", "batch_size=2"]
        assert main([*command[3:], *small]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", ["changes.py", "facts.py"])
def test_a_script_of_the_document_runs(name: str, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(written / name))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == files()[name].count("print(") + {"changes.py": 3, "facts.py": 4}[name]  # loops print again
    assert not any("nan" in line for line in printed)
