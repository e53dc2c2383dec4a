"""From a campaign to a folder that a program without our package loads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import run_campaign
from ngpt.export.__main__ import main
from ngpt.generate import generate_tokens
from ngpt.training.load_model import load_model

QUICKSTART = Path(__file__).parents[3] / "experiments" / "quickstart.yaml"
PROMPT = "The object is"
READER = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
how = {"trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **how)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **how)
ids = tokenizer(sys.argv[2], return_tensors="pt")
print(*model.generate(**ids, max_new_tokens=10, do_sample=False)[0].tolist())
assert not {"ngpt", "tune"} & sys.modules.keys()
"""


@pytest.mark.slow
def test_a_campaign_is_exported_and_read_without_our_package(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = ["--smoke", "--inline", "--out", str(tmp_path)]
    assert run_campaign.main([str(QUICKSTART), *out]) == 0
    capfd.readouterr()
    assert main([str(tmp_path / "quickstart-smoke"), "--to", "hf", str(tmp_path / "hf")]) == 0
    lines = capfd.readouterr().err.splitlines()
    trial = Path(lines[0].partition(": ")[0])
    assert "in phase confirm" in lines[0] and "trust_remote_code=True" in "".join(lines)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "hf"), PROMPT],
        env=environment | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    loaded = load_model(trial)
    assert loaded.tokenizer is not None
    ids = torch.tensor([loaded.tokenizer.encode(PROMPT).tolist()])
    tokens = list(generate_tokens(loaded.model, ids, 10, temperature=0, vocab_size=loaded.tokenizer.vocab_size))
    assert [int(word) for word in done.stdout.split()] == [*ids[0].tolist(), *torch.cat(tokens).tolist()]
