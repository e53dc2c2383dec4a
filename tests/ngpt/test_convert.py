"""Converted official models give the numbers of the official code, and invalid files are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ngpt.config.base import ConfigError
from ngpt.convert import from_nanochat, from_nvidia_ngpt, main
from ngpt.model.gpt import GPT
from ngpt.optim.optimizers import OptimConfig, build_optimizers
from ngpt.optim.projection import project_weights
from ngpt.training.checkpoint import verify_checkpoint
from ngpt.training.load_model import build_model
from tests.helpers import GOLDEN

Golden = dict[str, np.ndarray]
State = dict[str, torch.Tensor]
FILES = ("nvidia_ngpt", "nvidia_ngpt_true_rotary", "nvidia_gpt_baseline", "nanochat_gpt")
NVIDIA = FILES[:3]


def read(file: str) -> Golden:
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        return dict(arrays)


def official(golden: Golden, prefix: str = "w/") -> State:
    return {name.removeprefix(prefix): torch.tensor(golden[name]) for name in golden if name.startswith(prefix)}


def converted(file: str, state: State) -> GPT:
    """The model converted from `state`. Official gradients in place of weights give a model that holds them."""
    *_, block_size = meta = read(file)["meta_config"].tolist()
    if file == "nanochat_gpt":
        return from_nanochat(state, n_head=meta[1], n_kv_head=meta[2], block_size=block_size)
    rope = {"rope": "rotary"} if file == "nvidia_ngpt_true_rotary" else {}
    return from_nvidia_ngpt(state, n_head=meta[1], block_size=block_size, **rope)


def batch(golden: Golden) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(golden["idx"]), torch.tensor(golden["targets"])


def logits_error(model: GPT, golden: Golden) -> float:
    with torch.no_grad():
        return (model(batch(golden)[0]) - torch.tensor(golden["logits"])).abs().max().item()


@pytest.mark.parametrize("file", FILES)
def test_logits_and_loss_match_the_official_code(file: str) -> None:
    golden = read(file)
    model = converted(file, official(golden))
    assert logits_error(model, golden) < 1e-5
    assert model(*batch(golden)).item() == pytest.approx(float(golden["loss"]), abs=1e-5)


@pytest.mark.parametrize("file", FILES)
def test_gradients_match_the_official_code(file: str) -> None:
    golden = read(file)
    model, expected = (converted(file, official(golden, prefix)) for prefix in ("w/", "grad/"))
    model(*batch(golden)).backward()
    for name, parameter in model.named_parameters():
        right = expected.get_parameter(name).detach()
        assert parameter.grad is not None and right.norm() > 1e-4
        assert (parameter.grad - right).norm() / right.norm() < 1e-4, name


@pytest.mark.parametrize(("file", "weight_decay"), [*zip(NVIDIA, (0.0, 0.0, 0.1), strict=True)])
def test_step_of_adamw_and_projection_matches_the_official_code(file: str, weight_decay: float) -> None:
    golden = read(file)
    model, gradients, expected = (converted(file, official(golden, prefix)) for prefix in ("w/", "grad/", "after/"))
    (optimizer,) = build_optimizers(model, OptimConfig(lr=1e-3, weight_decay=weight_decay))
    model(*batch(golden)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert float(norm) == pytest.approx(float(golden["grad_norm"]), abs=1e-5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    project_weights(model)
    for name, parameter in model.named_parameters():
        right, gradient = expected.get_parameter(name).detach(), gradients.get_parameter(name).detach().abs()
        assert (right - before[name]).abs().max() > 1e-4, name
        # The first step of Adam is lr * g / (|g| + 1e-8). For |g| below 1e-8, golden files are wrong by up to 5 %
        # (against float64), so the step is wrong by as much of lr.
        noisy = (gradient > 0) & (gradient < 1e-8)
        error = (parameter.detach() - right).abs()
        assert (error < torch.where(noisy, 3e-5, 1e-5)).all(), name


@pytest.mark.parametrize("file", FILES)
def test_comparison_detects_a_change_of_any_weight(file: str) -> None:
    golden = read(file)
    generator = torch.Generator().manual_seed(0)
    for name, weight in official(golden).items():
        noise = torch.randn(weight.shape, generator=generator) * weight.std() * 0.3
        changed = converted(file, official(golden) | {name: weight + noise})
        assert logits_error(changed, golden) > 1e-4, name


def test_comparison_detects_another_rope_variant() -> None:
    for file, rope in (("nvidia_ngpt", "rotary"), ("nvidia_gpt_baseline", "rotary"), (FILES[1], "nvidia")):
        golden = read(file)
        model = from_nvidia_ngpt(official(golden), n_head=4, block_size=16, rope=rope)
        assert logits_error(model, golden) > 1e-3


@pytest.mark.parametrize("file", FILES)
def test_sizes_are_inferred_from_weight_shapes(file: str) -> None:
    golden = read(file)
    state = official(golden)
    narrow = {}  # a hidden width of 50 instead of 128, a vocabulary of 40
    for name, weight in state.items():
        gated = weight.shape[0] == 256
        rows = torch.cat((weight[:50], weight[128:178])) if gated else weight[: {128: 50, 61: 40}.get(len(weight))]
        narrow[name] = rows[:, :50] if weight.shape[-1] == 128 else rows
    for sizes, cfg in (((61, 128), converted(file, state).cfg), ((40, 50), converted(file, narrow).cfg)):
        assert (cfg.n_layer, cfg.n_embd, cfg.n_head, cfg.block_size) == (2, 32, 4, 16)
        assert (cfg.vocab_size, cfg.hidden) == sizes
        assert cfg.kv_heads == (2 if file == "nanochat_gpt" else 4)


@pytest.mark.parametrize("file", FILES)
def test_bfloat16_weights_become_equal_float32_weights(file: str) -> None:
    state = {name: weight.bfloat16() for name, weight in official(read(file)).items()}
    model = converted(file, state)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    total = sum(parameter.detach().double().sum() for parameter in model.parameters())
    assert float(total) == pytest.approx(float(sum(weight.double().sum() for weight in state.values())), rel=1e-12)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("file", FILES)
def test_prefixes_of_compile_and_ddp_are_removed(file: str, prefix: str) -> None:
    golden = read(file)
    state = {prefix + name: weight for name, weight in official(golden).items()}
    assert logits_error(converted(file, state), golden) < 1e-5


def without(*parts: str) -> Callable[[State], State]:
    return lambda state: {name: weight for name, weight in state.items() if not any(part in name for part in parts)}


def renamed(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {name.replace(old, new): weight for name, weight in state.items()}


def shaped(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: state | {name: torch.zeros(shape)}


WRONG: list[tuple[str, Callable[[State], State], list[str]]] = [
    ("nvidia_ngpt", without("sz"), ["sz: missing weight of NVIDIA's nGPT"]),
    ("nvidia_ngpt", without("h.1.sqk"), ["transformer.h.1.sqk: missing weight of NVIDIA's nGPT"]),
    ("nvidia_ngpt", without("wte"), ["transformer.wte.weight: missing weight of NVIDIA's nGPT"]),
    ("nvidia_gpt_baseline", without("rmsnorm_f"), ["rmsnorm_f.weight: missing weight of NVIDIA's GPT baseline"]),
    ("nanochat_gpt", without("1.attn.c_k"), ["transformer.h.1.attn.c_k.weight: missing weight of nanochat's GPT"]),
    (
        "nanochat_gpt",
        shaped("resid_lambdas", 2),
        ["resid_lambdas: unknown weight, nanochat's GPT has no weight of this name"],
    ),
    (
        "nvidia_ngpt",
        renamed("h.1.query", "h.1.querry"),
        [
            "transformer.h.1.querry.weight: unknown weight, NVIDIA's nGPT has no weight of this name, "
            "did you mean 'transformer.h.1.query.weight'?",
            "transformer.h.1.query.weight: missing weight of NVIDIA's nGPT",
        ],
    ),
    (
        "nvidia_ngpt",
        shaped("module.sz", 61),
        ["sz: is given twice, with and without a prefix"],
    ),
    ("nvidia_ngpt", renamed("h.1.", "h.2."), ["transformer.h.1: missing layer; present layers: 0, 2"]),
    ("nanochat_gpt", renamed("h.0.", "h.7."), ["transformer.h.0: missing layer; present layers: 1, 7"]),
    ("nanochat_gpt", without(".h."), ["no layer of nanochat's GPT found: its names start with transformer.h.0."]),
    ("nvidia_ngpt", shaped("sz", 60), ["sz: shape (60,), expected (61,)"]),
    (
        "nvidia_ngpt",
        shaped("transformer.wte.weight", 61, 33),
        ["transformer.wte.weight: shape (61, 33), expected (61, 32)"],
    ),
    ("nvidia_ngpt", shaped("transformer.h.0.suv", 255), ["transformer.h.0.suv: shape (255,), expected (256,)"]),
    ("nvidia_ngpt", shaped("transformer.h.0.sqk", 4, 8), ["transformer.h.0.sqk: shape (4, 8), expected (32,)"]),
    (
        "nvidia_gpt_baseline",
        shaped("transformer.h.1.mlp_c_proj.weight", 128, 32),
        ["transformer.h.1.mlp_c_proj.weight: shape (128, 32), expected (32, 128)"],
    ),
    (
        "nanochat_gpt",
        shaped("transformer.h.0.attn.c_v.weight", 32, 32),
        ["transformer.h.0.attn.c_v.weight: shape (32, 32), expected (16, 32)"],
    ),
]


@pytest.mark.parametrize(("file", "spoil", "problems"), WRONG)
def test_invalid_state_dict_is_refused_with_the_name_of_the_weight(
    file: str, spoil: Callable[[State], State], problems: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        converted(file, spoil(official(read(file))))
    assert str(caught.value).splitlines() == problems


def test_all_problems_are_reported_at_once() -> None:
    state = official(read("nvidia_ngpt"))
    del state["transformer.h.0.attn_alpha"]
    state |= {"lm_head.bias": torch.zeros(61), "sz": torch.zeros(1), "transformer.h.3.sqk": torch.zeros(32)}
    with pytest.raises(ConfigError) as caught:
        from_nvidia_ngpt(state, n_head=3, block_size=16, rope="rotrary")
    message = str(caught.value)
    assert "transformer.h.2: missing layer; present layers: 0, 1, 3" in message
    assert "lm_head.bias: unknown weight" in message
    assert "transformer.h.0.attn_alpha: missing weight" in message
    assert "transformer.h.3.suv: missing weight" in message
    assert "sz: shape (1,), expected (61,)" in message
    assert "rope: unknown rope 'rotrary', did you mean 'rotary'?" in message
    assert "n_head: n_embd 32 cannot be divided into n_head 3 heads" in message


@pytest.mark.parametrize(
    ("n_head", "n_kv_head", "problem"),
    [
        (4, 3, "n_head 4 is not a multiple of n_kv_head 3"),
        (5, 5, "n_embd 32 cannot be divided into n_head 5 heads"),
        (0, 2, "n_head: input should be greater than or equal to 1"),
        (4, 4, r"0.attn.c_k.weight: shape \(16, 32\), expected \(32, 32\)"),
        (8, 2, r"0.attn.c_k.weight: shape \(16, 32\), expected \(8, 32\)"),
    ],
)
def test_invalid_numbers_of_heads_are_refused(n_head: int, n_kv_head: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        from_nanochat(official(read("nanochat_gpt")), n_head=n_head, n_kv_head=n_kv_head, block_size=16)


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """The tokenizer setting for a vocabulary of 61 tokens in GPT-2's format."""
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    (folder / "encoder.json").write_text(json.dumps({str(n): n for n in range(60)} | {"<|endoftext|>": 60}))
    return f"gpt2:{folder}"


def nvidia_checkpoint(path: Path, file: str, **changes: Any) -> Path:
    """Saves a checkpoint as train.py of NVIDIA/ngpt does, including NumPy's random state."""
    model = converted(file, official(read(file)))
    args = {"use_nGPT": int("ngpt" in file), "n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16}
    args |= {"base_scale": 1 / 32**0.5, "bias": False, "vocab_size": 61, "dropout": 0.0}
    checkpoint = {
        "model": official(read(file)),
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "model_args": args | changes,
        "iter_num": 1000,
        "config": {"dataset": "openwebtext", "learning_rate": 15e-4, "compile": False},
        "rng_state_pytorch_bytes": torch.get_rng_state().numpy().tobytes(),
        "rng_state_numpy": np.random.get_state(),
    }
    torch.save(checkpoint, path)
    return path


def nanochat_checkpoint(folder: Path, **changes: Any) -> Path:
    config = {"sequence_len": 16, "vocab_size": 61, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    path = folder / "model_000007.pt"
    torch.save({f"_orig_mod.{name}": weight for name, weight in official(read("nanochat_gpt")).items()}, path)
    (folder / "meta_000007.json").write_text(json.dumps({"step": 7, "val_bpb": 1.5, "model_config": config | changes}))
    return path


@pytest.mark.parametrize("recognised", [True, False])
@pytest.mark.parametrize("file", FILES)
def test_command_writes_a_checkpoint_of_the_same_model(
    file: str, recognised: bool, tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--rope", "rotary"] if "true" in file else []
    path = nvidia_checkpoint(tmp_path / "ckpt.pt", file) if file in NVIDIA else nanochat_checkpoint(tmp_path)
    source = [] if recognised else ["nvidia" if file in NVIDIA else "nanochat"]
    assert main([*source, str(path), "--tokenizer", tokenizer, "--out", str(tmp_path / "out"), *extra]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder == tmp_path / "out" / "checkpoints" / "step_0000000"
    assert verify_checkpoint(folder).identity["data.tokenizer"] == tokenizer
    assert logits_error(build_model(verify_checkpoint(folder)), read(file)) < 1e-5


def test_bare_state_dict_requires_head_counts_and_block_size(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "weights.pt", str(tmp_path / "out")
    torch.save(official(read("nanochat_gpt")), path)
    common = ["nanochat", str(path), "--tokenizer", tokenizer, "--out", out]
    assert main([*common, "--n-head", "4"]) == 2
    assert "give --block-size and --n-kv-head" in capsys.readouterr().err
    assert main([*common, "--n-head", "4", "--n-kv-head", "2", "--block-size", "16"]) == 0
    assert (
        logits_error(build_model(verify_checkpoint(Path(capsys.readouterr().out.strip()))), read("nanochat_gpt")) < 1e-5
    )


def test_tokenizer_is_recorded_with_an_absolute_path(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["nanochat", str(nanochat_checkpoint(tmp_path)), "--tokenizer", "gpt2:vocabulary", "--out", "out"]) == 0
    assert verify_checkpoint(Path(capsys.readouterr().out.strip())).identity["data.tokenizer"] == tokenizer


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"n_head": 8}, ["--n-head", "4"], "it states n_head is 8, not 4"),
        ({"n_layer": 3}, [], "it states n_layer is 3, not 2"),
        ({"vocab_size": 50304}, [], "it states vocab_size is 50304, not 61"),
        ({"base_scale": 1 / 1024**0.5}, [], "base_scale is 0.03125, only 1/sqrt(n_embd) = 0.17"),
        ({}, ["--tokenizer", "gpt2"], "gpt2 has 50257 tokens, the model has 61"),
        ({}, ["--tokenizer", "sentencepiece:61"], "sentencepiece:61 would be trained on a corpus"),
        ({}, ["--tokenizer", "gpt-2"], "unknown tokenizer 'gpt-2', did you mean 'gpt2'?"),
    ],
)
def test_inconsistent_file_is_refused_and_nothing_is_written(
    changes: dict[str, Any],
    options: list[str],
    message: str,
    tmp_path: Path,
    tokenizer: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = nvidia_checkpoint(tmp_path / "ckpt.pt", "nvidia_ngpt", **changes)
    out = tmp_path / "out"
    assert main(["nvidia", str(path), "--tokenizer", tokenizer, "--out", str(out), *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_checkpoint_of_a_later_nanochat_is_refused(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = nanochat_checkpoint(tmp_path, window_pattern="SSSL")
    assert main(["nanochat", str(path), "--tokenizer", tokenizer, "--out", str(tmp_path / "out")]) == 2
    assert "nanochat as of November 2025 has no setting window_pattern" in capsys.readouterr().err


def test_folder_with_checkpoints_is_not_overwritten(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["nanochat", str(nanochat_checkpoint(tmp_path)), "--tokenizer", tokenizer, "--out", str(tmp_path / "out")]
    assert main(command) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert main(command) == 2
    assert "already contains checkpoints" in capsys.readouterr().err
    verify_checkpoint(folder)


class FileCreatingPickle:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_file_that_is_not_a_checkpoint_is_refused_and_never_executed(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--tokenizer", tokenizer, "--n-head", "4", "--block-size", "16", "--out", str(tmp_path / "out")]
    path, touched = tmp_path / "ckpt.pt", tmp_path / "touched"
    contents: list[tuple[Callable[[], object], str]] = [
        (lambda: path.write_bytes(b"not a checkpoint"), "not a checkpoint that can be read safely"),
        (lambda: path.write_bytes(b""), "not a checkpoint that can be read safely"),
        (lambda: path.write_bytes(b"junk"), "not a checkpoint that can be read safely"),
        (lambda: path.write_bytes(b"hello world"), "not a checkpoint that can be read safely"),
        (lambda: torch.save({"model": FileCreatingPickle(touched)}, path), "not a checkpoint that can be read safely"),
        (lambda: torch.save([torch.zeros(3)], path), "holds a list, not weights by name"),
    ]
    for write, message in contents:
        write()
        assert main(["nvidia", str(path), *common]) == 2
        assert message in capsys.readouterr().err
    assert not touched.exists()
    assert main(["nvidia", str(tmp_path / "missing.pt"), *common]) == 74
    assert "missing.pt: No such file" in capsys.readouterr().err


def test_state_dict_of_lucidrains_is_converted_and_what_it_does_not_tell_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = read("lucidrains_ngpt_tied")
    path, out = tmp_path / "ngpt.pt", str(tmp_path / "out")
    torch.save({"model": official(golden), "step": 3}, path)
    command = [str(path), "--out", out, "--alpha-init", "0.1", "--no-value-residual"]
    assert main(command) == 2
    assert f"{path}: it does not state all settings of the model: give --block-size" in capsys.readouterr().err
    assert main([*command, "--block-size", "16"]) == 0
    printed = capsys.readouterr()
    assert "does not tell these arguments of nGPT, taken to be the defaults: attn_norm_qk, causal," in printed.err
    model = build_model(verify_checkpoint(Path(printed.out.strip())))
    with torch.no_grad():
        assert (model(torch.tensor(golden["idx"])) - torch.tensor(golden["logits"])).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("nanochat_gpt", ["--rope", "nvidia"], "--rope does not apply to this format, only --n-head, --block-size"),
        ("nvidia_ngpt", ["--no-value-residual"], "--no-value-residual does not apply to this format"),
        ("nanochat_gpt", [], "does not come with its tokenizer: name it with --tokenizer"),
    ],
)
def test_option_of_another_format_and_a_missing_one_are_named(
    file: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = nvidia_checkpoint(tmp_path / "ckpt.pt", file) if file in NVIDIA else nanochat_checkpoint(tmp_path)
    assert main([str(path), "--out", str(tmp_path / "out"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(str(path)) and message in line


def test_of_many_problems_only_some_are_listed(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = official(read("nanochat_gpt"))
    later = {f"value_embeds.{n}.weight": torch.zeros(61, 16) for n in range(30)}  # as in nanochat of 2026
    torch.save(state | later, tmp_path / "model.pt")
    sizes = ["--n-head", "4", "--n-kv-head", "2", "--block-size", "16"]
    assert main([str(tmp_path / "model.pt"), "--tokenizer", tokenizer, "--out", str(tmp_path / "out"), *sizes]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and lines[-1] == f"{tmp_path / 'model.pt'}: 20 more problems like these"
    assert "value_embeds.0.weight: unknown weight, nanochat's GPT has no weight of this name" in lines[0]
