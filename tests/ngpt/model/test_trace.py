"""The trace of a pass shows every stage in order with correct values, and does not change the model."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ngpt.config.base import build
from ngpt.inspect import Inspection, inspect_model
from ngpt.model.config import ModelConfig
from ngpt.model.diagnostics import divisors
from ngpt.model.gpt import GPT
from ngpt.model.trace import Stage, angles, score_facts
from ngpt.optim.optimizers import parameters_by_kind
from tests.helpers.numpy_gpt import logits as numpy_logits

DRAWS = torch.Generator().manual_seed(7)
IDX, TARGETS = (torch.randint(31, (2, 12), generator=DRAWS) for _ in range(2))
ATTENTION = ["q", "k", "v", "q rotated", "k rotated", "q used", "k used", "mixed", "answer"]


def model(**changes: object) -> GPT:
    plain = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 31}
    gpt = GPT(build(ModelConfig, plain | changes))
    with torch.no_grad():  # weights that start at zero would hide errors
        for parameter in gpt.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(3))
    return gpt


def trace(gpt: GPT, *, backward: bool = False, dtype: str = "float32") -> Inspection:
    return inspect_model(gpt, IDX, TARGETS, backward=backward, dtype=dtype)


def stages(found: Inspection) -> dict[str, Stage]:
    assert len({stage.name for stage in found.forward}) == len(found.forward)
    return {stage.name: stage for stage in found.forward}


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_ngpt_trace_has_every_stage_once_and_in_order() -> None:
    mlp = ["up", "into silu", "hidden", "answer"]
    block = [*(f"attention.{name}" for name in [*ATTENTION, "stream"]), *(f"mlp.{name}" for name in [*mlp, "stream"])]
    expected = ["embedding", *(f"{layer}.{name}" for layer in (0, 1) for name in block), "loss", "logits (apart)"]
    assert [stage.name for stage in trace(model()).forward] == expected


def test_gpt_trace_has_every_stage_once_and_in_order() -> None:
    mlp = ["reads", "up", "into relu", "hidden", "answer", "stream"]
    block = [*(f"attention.{name}" for name in ["reads", *ATTENTION, "stream"]), *(f"mlp.{name}" for name in mlp)]
    found = trace(model(residual="add", mlp="relu2", n_layer=1))
    ends = ["final norm", "loss", "logits (apart)"]
    assert [stage.name for stage in found.forward] == [
        "embedding", "embedding normalised", *(f"0.{name}" for name in block), *ends,
    ]  # fmt: skip


@pytest.mark.parametrize("residual", ["lerp", "slerp", "add_normalize"])
def test_trace_shows_stream_queries_and_keys_on_the_sphere(residual: str) -> None:
    found = stages(trace(model(residual=residual)))
    on = {name for name, stage in found.items() if stage.sphere == "1"}
    assert on == {"embedding"} | {
        f"{layer}.{name}"
        for layer in (0, 1)
        for name in ("attention.q used", "attention.k used", "attention.stream", "mlp.stream")
    }
    assert found["0.attention.q"].shape == (2, 12, 2, 8) and found["1.mlp.hidden"].shape == (2, 12, 64)


def test_trace_shows_a_ghost_norm_as_a_stream_off_the_sphere() -> None:
    found = stages(trace(model(norm_every=2)))
    assert found["0.attention.stream"].sphere == "-" and found["0.mlp.stream"].sphere == "1"


def test_trace_shows_gpt_activations_on_spheres_of_another_radius() -> None:
    found = stages(trace(model(residual="add", mlp="relu2")))
    assert {name for name, stage in found.items() if stage.sphere == "sqrt"} == {
        "embedding normalised", "final norm",
        *(f"{layer}.{name}" for layer in (0, 1) for name in ("attention.reads", "mlp.reads")),
        *(f"{layer}.attention.{letter} used" for layer in (0, 1) for letter in "qk"),
    }  # fmt: skip
    assert found["final norm"].length[0] == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"residual": "add", "softcap": 5.0}, {"n_kv_head": 1, "norm_mode": "dotprod"}])
def test_traced_loss_and_logits_match_an_independent_model(changes: dict[str, object]) -> None:
    gpt = model(**changes)
    found = trace(gpt)
    expected = numpy_logits(gpt.cfg, {name: value.numpy() for name, value in gpt.state_dict().items()}, IDX.numpy())
    wide = torch.from_numpy(expected)
    assert found.summary["loss"] == pytest.approx(
        float(F.cross_entropy(wide.flatten(0, 1), TARGETS.flatten())), rel=1e-4
    )
    facts = stages(found)["logits (apart)"].facts
    assert facts["sd"] == pytest.approx(expected.std(ddof=1), rel=1e-3)
    assert facts["peak"] == pytest.approx(np.abs(expected).max(), rel=1e-3)


def test_traced_angle_of_a_scalar_lerp_matches_trigonometry() -> None:
    """If x and f are at an angle a, lerp turns x by atan2(alpha sin a, 1 - alpha + alpha cos a)."""
    gpt = model(n_layer=1, alpha=0.3, alpha_kind="scalar")
    x = gpt.wte(IDX).detach()
    with torch.no_grad():
        answer = gpt.blocks[0].attention(x, gpt.cos, gpt.sin)  # pyright: ignore[reportCallIssue,reportArgumentType]
    cosine = (F.normalize(answer, dim=-1) * x).sum(-1).double()
    angle = torch.arccos(cosine)
    expected = torch.rad2deg(torch.atan2(0.3 * angle.sin(), 0.7 + 0.3 * angle.cos()))
    facts = stages(trace(gpt))["0.attention.stream"].facts
    assert facts["alpha"] == pytest.approx(0.3)
    shown = [facts["degrees"], facts["degrees_min"], facts["degrees_max"]]
    assert shown == pytest.approx([float(expected.mean()), float(expected.min()), float(expected.max())], rel=1e-4)


def test_angles_are_accurate_from_tiny_to_180_degrees() -> None:
    degrees = torch.tensor([0.0, 1e-6, 0.5, 90.0, 179.9], dtype=torch.float64)
    radians = torch.deg2rad(degrees)
    turned = torch.stack([radians.cos(), radians.sin()], dim=-1) * 3
    assert angles(torch.tensor([2.0, 0.0]).expand(5, 2), turned).tolist() == pytest.approx(degrees.tolist(), rel=1e-6)


@pytest.mark.parametrize("mode", ["dotprod", "ema"])
def test_traced_divisors_match_those_reported_in_training(mode: str) -> None:
    gpt = model(norm_mode=mode)
    found = stages(trace(gpt))
    for name, r in divisors(gpt, IDX).items():
        sublayer, layer = name.removeprefix("r/").split(".")
        assert found[f"{layer}.{sublayer}.r"].facts["r"] == pytest.approx(float(r.mean()))


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_attention_score_statistics_match_a_plain_loop() -> None:
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


def test_equal_keys_share_attention_and_a_matching_key_gets_all_of_it() -> None:
    eye = torch.eye(4).view(1, 1, 4, 4)
    assert score_facts(eye, torch.zeros(1, 1, 4, 4), 1.0)["reads"] == pytest.approx(2.5)
    assert score_facts(eye, eye, 100.0)["reads"] == pytest.approx(1)


# ---- no side effects -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"residual": "add"}, {"norm_mode": "dotprod", "residual": "add_normalize"}])
def test_tracing_leaves_the_model_unchanged(changes: dict[str, object]) -> None:
    gpt, untouched = model(**changes).eval(), model(**changes).eval()
    turning = [block.attention.rotate for block in gpt.blocks]  # pyright: ignore[reportAttributeAccessIssue]
    trace(gpt)
    assert torch.equal(gpt(IDX), untouched(IDX))
    assert [block.attention.rotate for block in gpt.blocks] == turning  # pyright: ignore[reportAttributeAccessIssue]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in gpt.modules())
    assert all(parameter.grad is None for parameter in gpt.parameters())


def test_failed_pass_leaves_no_hooks() -> None:
    gpt = model()
    with pytest.raises(ValueError, match="do not fit the model's block_size"):
        inspect_model(gpt, torch.zeros(1, 13, dtype=torch.int64), torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(IndexError):
        inspect_model(gpt, torch.full((1, 4), 99), torch.zeros(1, 4, dtype=torch.int64))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in gpt.modules())


# ---- backward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"residual": "add", "mlp": "relu2"}, {"norm_mode": "ema"}])
def test_traced_gradients_come_in_reverse_order_and_match_autograd(changes: dict[str, object]) -> None:
    gpt, plain = model(**changes), model(**changes).eval()
    found = trace(gpt, backward=True)
    arrived = [stage.name for stage in found.backward]
    streams = [stage.name for stage in found.forward if stage.name.endswith("stream")]
    assert [name for name in arrived if name.endswith("stream")] == streams[::-1]
    assert arrived[0] == "loss" and arrived[-1] == "embedding" and "0.attention.q" in arrived
    F.cross_entropy(plain(IDX).flatten(0, 1), TARGETS.flatten()).backward()
    for kind, members in parameters_by_kind(plain).items():
        gradients = [p.grad.flatten() for p in members if p.grad is not None]
        if gradients:
            expected = float(torch.cat(gradients).norm())
            assert found.summary[f"grad_norm/{kind}"] == pytest.approx(expected, rel=1e-4)


def test_gradient_of_the_embedding_stage_matches_that_of_its_rows() -> None:
    gpt = model()
    idx = torch.arange(12).view(1, 12)  # each token once, so that every row collects a single gradient
    found = {stage.name: stage for stage in inspect_model(gpt, idx, TARGETS[:1], backward=True).backward}
    assert gpt.wte.weight.grad is not None
    rows = gpt.wte.weight.grad[:12].norm(dim=1)
    assert found["embedding"].length == pytest.approx([float(rows.mean()), float(rows.min()), float(rows.max())])


def test_trace_of_half_precision_shows_its_dtypes_and_a_float32_stream() -> None:
    found = stages(trace(model(), dtype="bfloat16"))
    assert found["0.attention.q"].dtype == "bfloat16" and found["0.mlp.stream"].dtype == "float32"
