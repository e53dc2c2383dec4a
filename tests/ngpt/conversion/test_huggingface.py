"""Models of Hugging Face's transformers, saved by it, give its logits; what ours cannot express is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ngpt.config.base import ConfigError
from ngpt.conversion.huggingface import from_huggingface
from ngpt.convert import main
from ngpt.generate import main as generate
from ngpt.model.gpt import GPT
from ngpt.train import main as train
from ngpt.training.load_model import load_model
from tests.helpers.vocabularies import ENGLISH, write_llama

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 72}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA31 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 |= {"original_max_position_embeddings": 32}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-eps-all-heads": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    "llama-theta-tied": ("Llama", {"rope_parameters": {"rope_theta": 500.0}, "tie_word_embeddings": True}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA31}),
    "mistral": ("Mistral", {"sliding_window": 48}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_theta": 500.0}, "tie_word_embeddings": True}),
    "nanochat": ("NanoChat", {"rms_norm_eps": 1e-2}),
    "nanochat-no-cap": ("NanoChat", {"final_logit_softcapping": None, "num_key_value_heads": 4}),
}
LENGTH = 48


def original(variant: str = "llama", **changes: Any) -> "transformers.PreTrainedModel":
    """A random model of transformers with clearly different gains, and weights large enough to matter."""
    family, settings = VARIANTS[variant]
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(**SIZES | settings | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            random = torch.rand_like(weight) + 0.5 if name.endswith("norm.weight") else 0.2 * torch.randn_like(weight)
            weight.copy_(random)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(61, (2, LENGTH), generator=torch.Generator().manual_seed(6))


@torch.no_grad()
def difference(model: GPT, right: "transformers.PreTrainedModel") -> float:
    """The largest difference of logits, which have a standard deviation above 0.1."""
    logits = right(tokens()).logits
    assert logits.std() > 0.1
    return (model(tokens()) - logits).abs().max().item()


def converted(folder: Path, *options: str) -> GPT:
    out = folder.with_name(f"{folder.name}-converted")
    assert main([str(folder), "--out", str(out), *options]) == 0
    return load_model(out).model


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path, metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != "-"}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    original().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant: str, tmp_path: Path) -> None:
    original(variant).save_pretrained(tmp_path / "model")
    assert difference(converted(tmp_path / "model"), original(variant)) < 1e-5


def test_comparison_detects_settings_that_the_weights_do_not_tell(folder: Path) -> None:
    state, config = safetensors.torch.load_file(folder / "model.safetensors"), SIZES | {"model_type": "llama"}
    changes = {"num_attention_heads": 8, "num_key_value_heads": 4}, {"rms_norm_eps": 1e-2}, {"rope_theta": 5000.0}
    assert difference(from_huggingface(state, config), original()) < 1e-5
    assert min(difference(from_huggingface(state, config | change), original()) for change in changes) > 1e-3


@pytest.mark.parametrize("safe", [True, False])
def test_shards_and_pickled_weights_are_read(tmp_path: Path, safe: bool) -> None:
    model, folder = original(), tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="10KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len({*index["weight_map"].values()}) > 2
    if not safe:  # as versions before 4 save
        for path in folder.glob("model-*.safetensors"):
            name = path.name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            torch.save(safetensors.torch.load_file(path), folder / name)
            path.unlink()
        text = json.dumps(index).replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        (folder / "model.safetensors.index.json").unlink()
    assert difference(converted(folder), model) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_become_equal_float32_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    original("llama-theta-tied").to(dtype).save_pretrained(tmp_path / "model")
    rounded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert difference(converted(tmp_path / "model"), rounded) < 1e-5


def test_buffers_a_repeated_tied_head_and_missing_prefixes_are_no_obstacle(tmp_path: Path) -> None:
    model, folder = original("llama-theta-tied"), tmp_path / "model"
    model.save_pretrained(folder)

    def older(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state = {name.removeprefix("model."): weight for name, weight in state.items()}  # of LlamaModel
        state |= {"lm_head.weight": state["embed_tokens.weight"].clone()}
        return state | {f"layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(3)}

    rewrite(folder, older)
    configure(folder, rope_parameters="-", rope_theta=500.0, head_dim=None)  # as version 4 writes it
    assert difference(converted(folder), model) < 1e-5
    rewrite(folder, lambda state: state | {"lm_head.weight": state["lm_head.weight"] + 1})
    with pytest.raises(ConfigError, match=r"it states tie_word_embeddings, but lm_head\.weight differs"):
        from_huggingface(
            safetensors.torch.load_file(folder / "model.safetensors"),
            SIZES | {"model_type": "llama", "tie_word_embeddings": True},
        )


def test_version_4_rope_scaling_is_read(tmp_path: Path) -> None:
    model, folder = original("llama-linear"), tmp_path / "model"
    model.save_pretrained(folder)
    configure(folder, rope_parameters="-", rope_theta=100.0, rope_scaling={"type": "linear", "factor": 4.0})
    assert difference(converted(folder), model) < 1e-5


def test_context_of_qwen2_is_limited_where_it_uses_its_sliding_window(tmp_path: Path) -> None:
    windows = {"sliding_window": 40, "max_window_layers": 1}
    for used in (False, True):
        folder = tmp_path / f"model-{used}"
        original("qwen2", **windows, use_sliding_window=used).save_pretrained(folder)
        configure(folder, sliding_window=40)
        assert converted(folder).cfg.block_size == (40 if used else 64)


def test_context_is_that_of_the_sliding_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Within the window, every token sees all before it."""
    folder = tmp_path / "model"
    original("mistral").save_pretrained(folder)
    assert main([str(folder), "--out", str(tmp_path / "no"), "--block-size", "49"]) == 2
    assert "its attention sees the last 48 tokens only: --block-size can be at most that" in capsys.readouterr().err
    assert converted(folder).cfg.block_size == 48
    assert "context of 48 tokens" in capsys.readouterr().err
    assert converted(folder.rename(tmp_path / "again"), "--block-size", "20").cfg.block_size == 20


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"model_type": "qwen3"},
        "type 'qwen3' cannot be converted: GPT and nGPT here have no gains in the norms of queries",
    ),
    (
        {"model_type": "granite"},
        "'granite' cannot be converted, only the types llama, mistral, qwen2, nanochat, ngpt can",
    ),
    ({"model_type": "mixtral"}, "GPT and nGPT here have no mixture of experts"),
    ({"attention_bias": True}, "no biases (attention_bias)"),
    ({"mlp_bias": True, "hidden_act": "gelu"}, "no biases (mlp_bias), activation gelu"),
    ({"head_dim": 16}, "no heads of another width (16) than hidden_size / num_attention_heads (32/4)"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "no RoPE scaling 'yarn' as transformers computes it"),
    ({"rope_parameters": LLAMA31 | {"high_freq_factor": 8.0}}, "'llama3' with frequency factors (1.0, 8.0)"),
    ({"partial_rotary_factor": 0.5}, "no partial rotation"),
    ({"quantization_config": {"bits": 4}}, "no quantized weights"),
    ({"num_attention_heads": "4"}, "num_attention_heads is '4', not a whole number"),
    ({"num_key_value_heads": 3}, "n_kv_head: n_head 4 is not a multiple of n_kv_head 3"),
    ({"num_key_value_heads": 1}, "self_attn.k_proj.weight: shape (16, 32), expected (8, 32)"),
    ({"num_attention_heads": 0}, "n_head: input should be greater than or equal to 1, got 0"),
    ({"rope_parameters": [1]}, "its rope_parameters are not settings by name: [1]"),
    ({"rms_norm_eps": None}, "rms_norm_eps is None, not a number"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_expressed_is_refused_by_name(
    changes: dict[str, Any], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(folder, **changes)
    assert main([str(folder), "--out", str(folder / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in " ".join(lines) and len(lines) <= 11
    assert all(line.startswith(f"{folder}: ") for line in lines)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("layout", ["one", "shards", "bin", "body", "pt"])
def test_gpt2_of_hugging_face_is_refused_in_one_line(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gpt2"
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=12, n_head=4, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    if layout == "body":  # as the original weights on the hub are: `h.0.attn.c_attn.weight`
        model.transformer.save_pretrained(folder)
    else:
        model.save_pretrained(folder, max_shard_size="100KB" if layout == "shards" else "1GB")
    assert len(list(folder.glob("*.safetensors"))) > 1 or layout != "shards"
    if layout in ("bin", "pt"):
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / ("pytorch_model.bin" if layout == "bin" else "model.pt"))
    if layout == "pt":
        (folder / "config.json").unlink()
        folder = folder / "model.pt"
    capsys.readouterr()  # progress bars
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 2
    lacks = "learned positions (wpe), LayerNorm, GELU, biases"
    right = f"Hugging Face's GPT-2 cannot be converted: GPT and nGPT here have no {lacks}"
    assert capsys.readouterr().err.splitlines() == [f"{folder}: {right}"]
    assert not (tmp_path / "out").exists()


def without(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda state: {key: weight for key, weight in state.items() if key != name}


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGED: list[tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = [
    (without("lm_head.weight"), "lm_head.weight: missing weight of Hugging Face's Llama"),
    (without(UP), f"{UP}: missing weight"),
    (lambda state: state | {UP: state[UP][:71]}, f"{UP}: shape (71, 32), expected (72, 32)"),
    (lambda state: state | {UP: state[UP].to(torch.int8)}, f"{UP}: dtype int8, expected float64, float32"),
    (lambda state: state | {UP: state[UP] / 0}, f"{UP}: holds NaN or infinity"),
    (
        lambda state: state | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)},
        "model.layers.0.self_attn.q_proj.bias: unknown weight",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED)
def test_a_weight_that_does_not_fit_is_named(
    damage: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rewrite(folder, damage)
    assert main([str(folder), "--out", str(folder / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{folder}: {message}")


def bpe(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin_of_text|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([ENGLISH], trainer)
    return tokenizer


def test_tokenizer_of_the_folder_is_kept_and_generates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, tokenizer = tmp_path / "model", bpe(300)
    original(vocab_size=310).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    converted(folder)
    (folder / "tokenizer.json").unlink()  # the converted model needs it no more
    out = tmp_path / "model-converted"
    loaded = load_model(out).tokenizer
    assert loaded is not None
    text = "the lazy dog sleeps"
    assert loaded.encode(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    capsys.readouterr()
    assert generate([str(out), "--prompt", text, "--max-tokens", "4", "--temperature", "0"]) == 0
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    right = original(vocab_size=310).generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(right[0, len(ids) :].tolist())


def test_converted_model_is_trained_on_with_its_settings_and_tokenizer(tmp_path: Path) -> None:
    folder, out, text = tmp_path / "model", tmp_path / "model-converted", tmp_path / "text.txt"
    original("llama-3.1", vocab_size=300).save_pretrained(folder)
    bpe(300).save(str(folder / "tokenizer.json"))
    model = converted(folder)
    text.write_text(ENGLISH * 3)
    settings = [f"model={out / 'model.yaml'}", f"data.corpus={text}", f"data.tokenizer=hf:{folder}", "lr=1e-9"]
    settings += ["steps=1", "batch_size=2", "eval_tokens=64", "device=cpu"]
    assert train(["--set", *settings, "--init-from", str(out), "--out", str(tmp_path / "run")]) == 0
    trained = load_model(tmp_path / "run").model
    assert trained.cfg == model.cfg
    with torch.no_grad():
        torch.testing.assert_close(trained(tokens()), model(tokens()), atol=1e-4, rtol=0)


def test_sentencepiece_model_of_the_folder_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    original(vocab_size=330).save_pretrained(folder)
    write_llama(folder / "tokenizer.model")
    converted(folder)
    loaded = load_model(tmp_path / "model-converted")
    assert loaded.tokenizer is not None and loaded.tokenizer.vocab_size == 330
    assert (loaded.checkpoint.path / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_tokenizer_that_does_not_fit_is_left_out_and_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bpe(300).save(str(folder / "tokenizer.json"))
    converted(folder)
    assert "converted without a tokenizer: " in capsys.readouterr().err
    assert load_model(folder.with_name("model-converted")).tokenizer is None
