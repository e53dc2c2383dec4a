"""Times and traffic on paper against a count by hand."""

import json
from pathlib import Path

import pytest

from ngpt.sizing.__main__ import main
from ngpt.sizing.hardware import GPUS
from ngpt.sizing.step_time import Message, message_seconds, messages, step_time
from ngpt.training.config import TrainConfig, read_config

MODEL = Path(__file__).parents[3] / "experiments" / "models" / "0.5B.yaml"
MATRICES = 24 * 16 * 1024**2  # query, key, value and output of 1,024 x 1,024; three of the MLP with 4,096 hidden units
TABLES = 32_000 * 1024  # embedding, and head
ENTRIES = MATRICES + 2 * TABLES + 24 * (2 * 1024 + 1024 + 8192) + 32_000  # with alphas, s_qk, s_uv and s_z


def config(*settings: str) -> TrainConfig:
    return read_config(None, [f"model={MODEL}", "batch_size=64", "micro_batch_size=1", "dtype=bfloat16", *settings])


def sent(ranks: int, *settings: str, strategy: str = "ddp") -> float:
    return sum(each.sent(ranks) for each in messages(config(*settings), ranks, strategy=strategy))


def test_one_gpu_takes_the_flops_of_a_step_at_the_assumed_share_of_its_peak() -> None:
    flops = 6 * (MATRICES + TABLES) + 12 * 24 * 1024 * 1024  # for each token
    found = step_time(config(), GPUS["h100"], 1, strategy="", recompute=False, mfu=0.5)
    assert found.tokens_per_second == pytest.approx(989e12 * 0.5 / flops)
    assert (found.efficiency, found.sent) == (1, 0)


def test_ddp_sends_what_a_ring_sends() -> None:
    assert sent(8) == pytest.approx(2 * 7 / 8 * 4 * ENTRIES)
    assert sent(8, "distributed.gradient_dtype=bfloat16") == pytest.approx(2 * 7 / 8 * 2 * ENTRIES)
    assert sent(8, "distributed.gradient_dtype=float8") == pytest.approx(7 * ENTRIES)
    assert sent(8, "optim.name=muon") == pytest.approx(7 / 8 * 4 * (2 * ENTRIES + MATRICES))


def test_fsdp_gathers_weights_for_each_micro_batch_and_scatters_gradients_once() -> None:
    blocks, whole = 4 * (ENTRIES - 2 * TABLES - 32_000), 4 * ENTRIES
    assert sent(8, "micro_batch_size=8", strategy="fsdp") == pytest.approx(7 / 8 * (whole + blocks + whole))
    assert sent(8, "micro_batch_size=4", strategy="fsdp") == pytest.approx(7 / 8 * (2 * (whole + blocks) + whole))


def test_the_network_between_nodes_is_slower_than_links_within() -> None:
    gigabyte = Message("all_reduce", 1e9, 1, "backward")
    eight, sixteen = (message_seconds(gigabyte, GPUS["h100"], ranks) for ranks in (8, 16))
    assert eight == pytest.approx(8.4e-6 + 14 * 3.4e-6 + 2 * 7 / 8 * 1e9 / (0.8 * 450e9))
    assert sixteen == pytest.approx(8.4e-6 + 28 * 3.4e-6 + 2 * 9.6e-6 + 2 * 15 / 16 * 1e9 / (0.8 * 400e9))


def test_the_command_says_which_gpus_hold_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--set", f"model={MODEL}", "dtype=bfloat16", "batch_size=16", "--ranks", "1", "2", "3", "--json"]
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["gpus"] for row in rows] == [1, 1, 2, 2, 2, 2]  # three ranks cannot share 16 sequences
    whole, recomputed = rows[:2]
    assert "a100-40gb" not in whole["fits"] and "a100-40gb" in recomputed["fits"]
    assert main([*arguments[:-1], "--gpu", "h10"]) == 2
    assert "unknown GPU 'h10', did you mean 'h100'?" in capsys.readouterr().err
