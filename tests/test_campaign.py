"""Campaign files: what they may say, and that every mistake is answered where it stands, with what to do about it."""

import copy
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

import run_campaign
from ngpt.config import ConfigError, flatten
from tune.campaign import Campaign, Fresh, Metric, Resources, load_campaign

HERE = "«"  # in a wrong file, stands before what its messages point at, one mark per message

GOOD = """\
campaign: small
base: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 16, steps: 4, batch_size: 2}
"""
PHASE = """\
phases:
  - name: a
    vary: {alpha: [0.1, 0.2]}
"""
NAMES = "letters, digits, '.', '_' and '-', the first a letter or digit, and no '..'"
ARM_NAMES = f"1 to 80 letters, digits, ' ', '=', ',', ':', '+',{NAMES.removeprefix('letters, digits,')}"
KINDS = "vary, grid, zip, runs"

# What is wrong -> the file, and what is said of it in the order of the marks.
WRONG: dict[str, tuple[str, list[str]]] = {
    # ---- names of settings
    "unknown key at the top": (
        f"{GOOD}«metirc: {{name: val_loss}}\n{PHASE}",
        ["metirc: unknown setting, did you mean 'metric'?"],
    ),
    "unknown key in a phase": (
        f"{GOOD}{PHASE}    «inheirt: a\n",
        ["phases[0].inheirt: unknown setting, did you mean 'inherit'?"],
    ),
    "unknown setting in a sweep": (
        f"{GOOD}phases:\n  - name: a\n    vary:\n      «alhpa: [0.1]\n",
        ["phases[0].vary.alhpa: unknown setting, did you mean 'alpha'?"],
    ),
    "unknown setting in a run": (
        f"{GOOD}phases:\n  - name: a\n    runs: [{{arm: baseline}}, {{arm: x, «alhpa: 0.1}}]\n",
        ["phases[0].runs[1].alhpa: unknown setting, did you mean 'alpha'?"],
    ),
    "unknown setting in set": (
        f"{GOOD}{PHASE}    set: {{«stesp: 3}}\n",
        ["phases[0].set.stesp: unknown setting, did you mean 'steps'?"],
    ),
    "unknown key in metric": (
        f"{GOOD}metric: {{name: val_loss, «gaol: maximize}}\n{PHASE}",
        ["metric.gaol: unknown setting, did you mean 'goal'?"],
    ),
    "unknown key in resources": (
        f"{GOOD}resources:\n  «cpus_per_trail: 2\n{PHASE}",
        ["resources.cpus_per_trail: unknown setting, did you mean 'cpus_per_trial'?"],
    ),
    "unknown dotted setting": (
        f"campaign: small\nbase:\n  «optim.learning: 1\n  «optim.lrr: 1\n{PHASE}",
        [
            "base.optim.learning: unknown setting, did you mean 'optim.lr'?",
            "base.optim.lrr: unknown setting, did you mean 'optim.lr'?",
        ],
    ),
    "unknown bare setting": (
        f"campaign: small\nbase: {{«aplha: 0.3}}\n{PHASE}",
        ["base.aplha: unknown setting, did you mean 'alpha'?"],
    ),
    "unknown setting in a section": (
        f"campaign: small\nbase:\n  optim:\n    «weight_dacay: 1\n{PHASE}",
        ["base.optim.weight_dacay: unknown setting, did you mean 'weight_decay'?"],
    ),
    "unknown section": (
        f"campaign: small\nbase: {{«optimm: {{lr: 1}}}}\n{PHASE}",
        ["base.optimm: unknown section 'optimm', did you mean 'optim'?"],
    ),
    "ambiguous bare name": (
        f"{GOOD}vary: {{«name: [adamw]}}\n",
        ["vary.name: ambiguous setting, write one of optim.name, schedule.name"],
    ),
    "a setting in two spellings": (
        f"{GOOD}vary: {{lr: [1], «optim.lr: [2]}}\n",
        ["vary.optim.lr: optim.lr is given twice"],
    ),
    # ---- values
    "text for a number in base": (
        f"campaign: small\nbase: {{«steps: many}}\n{PHASE}",
        ["base.steps: input should be a valid integer, got 'many'"],
    ),
    "text for a number in a sweep": (
        f'{GOOD}phases:\n  - name: a\n    vary: {{alpha: [0.1, «"0.2"]}}\n',
        ["phases[0].vary.alpha[1]: input should be a valid number, got '0.2'"],
    ),
    "text for a number in set": (
        f"{GOOD}{PHASE}    set: {{«batch_size: big}}\n",
        ["phases[0].set.batch_size: input should be a valid integer, got 'big'"],
    ),
    "wrong item of a list in base": (
        f"campaign: small\nbase:\n  betas: [0.9, «1.5]\n{PHASE}",
        ["base.betas[1]: input should be less than 1, got 1.5"],
    ),
    "a float for a count": (
        f"campaign: small\nbase: {{«steps: 1e3}}\n{PHASE}",
        ["base.steps: input should be a valid integer, got 1000.0; write 1000"],
    ),
    "a fraction for a count": (
        f"campaign: small\nbase: {{«steps: 2.5}}\n{PHASE}",
        ["base.steps: input should be a valid integer, got 2.5"],
    ),
    "not a number": (
        f"campaign: small\nbase: {{«lr: .nan}}\nvary: {{alpha: [0.1, «.inf]}}\n",
        [
            "base.lr: input should be a finite number, got nan",
            "vary.alpha[1]: input should be a finite number, got inf",
        ],
    ),
    "out of range": (
        f"campaign: small\n«confidence: 1.5\n«min_effect: -1\nbase: {{«n_layer: 0}}\n{PHASE}",
        [
            "confidence: input should be less than 1, got 1.5",
            "min_effect: input should be greater than or equal to 0, got -1",
            "base.n_layer: input should be greater than or equal to 1, got 0",
        ],
    ),
    # ---- choices
    "unknown corpus": (
        f"campaign: small\nbase:\n  data:\n    «corpus: shakespear\n{PHASE}",
        [
            "base.data.corpus: unknown corpus 'shakespear', did you mean 'shakespeare'?; nor is there such a file or "
            "folder"
        ],
    ),
    "unknown corpus in a sweep": (
        f"{GOOD}vary: {{corpus: [python-docs, «nowhere/text.txt]}}\n",
        [
            "vary.corpus[1]: unknown corpus 'nowhere/text.txt'; choose one of python-docs, shakespeare; nor is there "
            "such a file or folder"
        ],
    ),
    "local copy that is not there": (
        f"campaign: small\nbase: {{corpus: shakespeare, «data.path: gone.txt}}\n{PHASE}",
        ["base.data.path: no such file: CWD/gone.txt"],
    ),
    "unknown residual rule": (
        f"campaign: small\nbase: {{«residual: slurp}}\n{PHASE}",
        ["base.residual: unknown residual rule 'slurp', did you mean 'slerp'?"],
    ),
    "unknown optimizer in a sweep": (
        f"{GOOD}vary: {{optim.name: [adamw, «moun]}}\n",
        ["vary.optim.name[1]: unknown optimizer 'moun', did you mean 'muon'?"],
    ),
    "unknown tokenizer": (
        f"campaign: small\nbase: {{«tokenizer: gpt3}}\n{PHASE}",
        ["base.tokenizer: unknown tokenizer 'gpt3', did you mean 'gpt2'?"],
    ),
    "tokenizer model that is not there": (
        f"{GOOD}vary: {{tokenizer: [«gone.model, gpt2]}}\n",
        ["vary.tokenizer[0]: no such file: CWD/gone.model"],
    ),
    "unknown schedule": (
        f"{GOOD}{PHASE}    set: {{schedule: {{«name: cosin}}}}\n",
        ["phases[0].set.schedule.name: unknown schedule 'cosin', did you mean 'cosine'?"],
    ),
    "unknown metric, goal and hold": (
        f"{GOOD}metric: {{«name: loss, «goal: minimise}}\n«hold: token\n{PHASE}",
        [
            "metric.name: unknown metric 'loss', did you mean 'val_loss'?",
            "metric.goal: unknown goal 'minimise', did you mean 'minimize'?",
            "hold: unknown quantity to hold 'token', did you mean 'tokens'?",
        ],
    ),
    "unknown share of a GPU": (
        f"{GOOD}resources: {{«gpus_per_trial: atuo, «workers: 0}}\n{PHASE}",
        [
            "resources.gpus_per_trial: expected `auto` or a number above 0, got 'atuo'",
            "resources.workers: input should be greater than or equal to 1, got 0",
        ],
    ),
    "unknown device in base": (
        f"campaign: small\nbase: {{«device: cudda}}\n{PHASE}",
        ["base.device: unknown device 'cudda', did you mean 'cuda'?"],
    ),
    # ---- sweeps
    "nothing varies at the top": (
        f"«{GOOD}",
        [f"nothing varies: give `phases:`, or one of {KINDS}"],
    ),
    "empty sweep": (
        f"{GOOD}phases:\n  - name: a\n    «vary: {{}}\n",
        ["phases[0].vary: nothing varies: give at least one setting with a list of values"],
    ),
    "empty list": (
        f"{GOOD}vary:\n  «alpha: []\n",
        ["vary.alpha: the list of values is empty"],
    ),
    "one value instead of a list": (
        f"{GOOD}grid:\n  lr: [1.0]\n  «alpha: 0.3\n",
        ["grid.alpha: expected a list of values, got 0.3"],
    ),
    "a value twice": (
        f"{GOOD}vary: {{alpha: [1, 0.5, «1.0]}}\n",
        ["vary.alpha[2]: 1 is listed twice"],
    ),
    "a row of zip twice": (
        f"{GOOD}zip: {{alpha: [0.5, 0.1, «0.5], lr: [1.0, 1.0, 1.0]}}\n",
        ["zip.alpha[2]: the arm 'alpha=0.5, lr=1.0' changes the same settings in the same way as 'alpha=0.5, lr=1.0'"],
    ),
    "zip of unequal lengths": (
        f"{GOOD}phases:\n  - name: a\n    «zip: {{alpha: [0.1, 0.2], lr: [1.0]}}\n",
        ["phases[0].zip: zip needs lists of equal length; alpha has 2, lr has 1"],
    ),
    "two sweeps in a phase": (
        f"{GOOD}{PHASE}    «grid: {{lr: [1.0]}}\n",
        [f"phases[0].grid: a phase has exactly one of {KINDS}; got vary and grid"],
    ),
    "no sweep in a phase": (
        f"{GOOD}phases:\n  - «name: a\n",
        [f"phases[0]: a phase has exactly one of {KINDS}; got none"],
    ),
    "seed swept": (
        f"{GOOD}vary: {{«seed: [1, 2]}}\n",
        ["vary.seed: seeds are not swept: every arm runs all of `seeds:`"],
    ),
    "seed in base": (
        f"campaign: small\nbase: {{«seed: 3}}\n{PHASE}",
        ["base.seed: seeds belong to the campaign: write `seeds: [1, 2, 3]` at the top"],
    ),
    "runtime settings swept": (
        f"{GOOD}grid: {{«tracker.log_every: [1, 2], «device: [cpu, cuda]}}\n",
        [
            "grid.tracker.log_every: tracker.log_every does not change what is computed: set it in `base:`, for all",
            "grid.device: device does not change what is computed: set it in `base:`, for all",
        ],
    ),
    "a grid of 10^12 arms": (
        f"{GOOD}«grid: {{{', '.join(f'{name}: {list(range(1, 1001))}' for name in ('lr', 'alpha', 'steps', 'eps'))}}}",
        ["grid: (1000 x 1000 x 1000 x 1000) arms x 3 seeds = 3e+12 trials; a campaign has at most 10000"],
    ),
    "too many trials in two phases": (
        f"{GOOD}phases:\n  - name: a\n    vary: {{lr: {list(range(1, 3001))}}}\n"
        f"  - name: b\n    «vary: {{alpha: {list(range(1, 501))}}}\n",
        ["phases[1].vary: 500 arms x 3 seeds = 1.5e+03 trials after 9000 in other phases; a campaign has at most 10000"],
    ),
    # ---- arms
    "two arms of one name": (
        f"{GOOD}runs: [{{arm: x, alpha: 0.1}}, {{«arm: x, alpha: 0.2}}]\n",
        ["runs[1].arm: two arms are named 'x'"],
    ),
    "two equal arms": (
        f"{GOOD}runs:\n  - {{arm: x, alpha: 1}}\n  - «{{arm: y, model: {{alpha: 1.0}}}}\n",
        ["runs[1]: the arm 'y' changes the same settings in the same way as 'x'"],
    ),
    "a baseline that changes something": (
        f"{GOOD}runs: [{{«arm: baseline, alpha: 0.1}}]\n",
        ["runs[0].arm: the arm `baseline` is the phase's base as it is; give another name to a changed one"],
    ),
    "arms without a name or none at all": (
        f"{GOOD}phases:\n  - {{name: a, runs: [«{{alpha: 0.1}}, «x]}}\n  - {{name: b, «runs: []}}\n",
        [
            "phases[0].runs[0]: a run is a mapping with `arm:`, its name, and the settings it changes",
            "phases[0].runs[1]: a run is a mapping with `arm:`, its name, and the settings it changes",
            "phases[1].runs: `runs:` is a list of arms, such as `- {arm: baseline}`",
        ],
    ),
    "an arm's name with a slash": (
        f"{GOOD}runs: [{{«arm: a/b, alpha: 0.1}}]\n",
        [f"runs[0].arm: 'a/b' cannot be the name of an arm: use {ARM_NAMES}"],
    ),
    # ---- models that cannot be
    "impossible model in base": (
        f"campaign: small\nbase:\n  model:\n    n_embd: 64\n    «n_head: 5\n{PHASE}",
        ["base.model.n_head: n_embd 64 cannot be divided into n_head 5 heads"],
    ),
    "impossible model in a swept value, blamed on the value and not on the base": (
        f"{GOOD}vary: {{n_embd: [32, «33]}}\n",
        ["vary.n_embd[1]: n_embd 33 cannot be divided into n_head 2 heads"],
    ),
    "impossible model in a grid combination only": (
        f"{GOOD}grid:\n  n_embd: [24, 32]\n  n_head: [2, «6]\n",
        ["grid.n_head[1]: n_embd 32 cannot be divided into n_head 6 heads"],
    ),
    "impossible model in set": (
        f"{GOOD}{PHASE}    set: {{«n_head: 3}}\n",
        ["phases[0].set.n_head: n_embd 16 cannot be divided into n_head 3 heads"],
    ),
    "impossible model only if an earlier phase ends so": (
        f"{GOOD}phases:\n  - name: a\n    vary: {{n_head: [1, 4]}}\n"
        "  - name: b\n    inherit: a\n    vary: {n_embd: [32, «18]}\n",
        ["phases[1].vary.n_embd[1]: n_embd 18 cannot be divided into n_head 4 heads (after model.n_head=4 has won)"],
    ),
    "micro-batches that do not fit": (
        f"{GOOD}vary: {{batch_size: [4, «5], alpha: [0.1]}}\n".replace("steps: 4", "steps: 4, micro_batch_size: 2"),
        ["vary.batch_size[1]: batch_size 5 is not a multiple of micro_batch_size 2"],
    ),
    "vocabulary smaller than the tokenizer's": (
        f"campaign: small\nbase: {{vocab_size: 600, tokenizer: 'sentencepiece:500'}}\n"
        "vary: {tokenizer: [«'sentencepiece:700', 'sentencepiece:400']}\n",
        ["vary.tokenizer[0]: model.vocab_size 600 is smaller than the 700 tokens of sentencepiece:700"],
    ),
    # ---- phases
    "two phases of one name": (
        f"{GOOD}{PHASE}  - «name: a\n    vary: {{lr: [1.0]}}\n",
        ["phases[1].name: two phases are named 'a'"],
    ),
    "a phase without a name": (
        f"{GOOD}phases:\n  - «vary: {{lr: [1.0]}}\n",
        ["phases[0]: `name:` is missing: give the phase a name"],
    ),
    "a phase that is not a mapping": (
        f"{GOOD}{PHASE}  - «b\n",
        ["phases[1]: a phase is a mapping, got 'b'"],
    ),
    "no phases": (
        f"{GOOD}«phases: []\n",
        ["phases: expected a list of phases, got []"],
    ),
    "phases as a mapping": (
        f"{GOOD}«phases: {{a: 1}}\n",
        ["phases: expected a list of phases, got {'a': 1}"],
    ),
    "a sweep beside phases": (
        f"{GOOD}«vary: {{lr: [1.0]}}\n{PHASE}",
        ["vary: `vary:` at the top is for files without `phases:`; move it into a phase"],
    ),
    "reserved phase names": (
        f"{GOOD}phases:\n  - {{«name: trials, vary: {{lr: [1.0]}}}}\n  - {{«name: Report.HTML, vary: {{lr: [2.0]}}}}\n",
        [
            "phases[0].name: 'trials' is a name that the results directory needs for itself",
            "phases[1].name: 'Report.HTML' is a name that the results directory needs for itself",
        ],
    ),
    "names that would be paths": (
        f"«campaign: ../small\nphases:\n"
        + "".join(f"  - {{«name: {name}, vary: {{lr: [1.0]}}}}\n" for name in ("a/b", "..", "/tmp", "''", "a..b", "3")),
        [f"campaign: '../small' cannot be the name of a campaign: use 1 to 64 {NAMES}"]
        + [
            f"phases[{i}].name: {name} cannot be the name of a phase: use 1 to 64 {NAMES}"
            for i, name in enumerate(["'a/b'", "'..'", "'/tmp'", "''", "'a..b'", "3"])
        ],
    ),
    "a name of 300 characters": (
        f"«campaign: {'a' * 150}{'b' * 150}\n{PHASE}",
        [f"campaign: '{'a' * 19}…{'b' * 20}' cannot be the name of a campaign: use 1 to 64 {NAMES}"],
    ),
    "no campaign name": (f"«base: {{}}\n{PHASE}", ["`campaign:` is missing: give the campaign a name"]),
    # ---- inheritance
    "missing inherit": (
        f"{GOOD}phases:\n  - {{name: alpha, vary: {{alpha: [0.1]}}}}\n  - {{name: b, «inherit: alhpa, vary: {{lr: [1]}}}}\n",
        ["phases[1].inherit: unknown phase 'alhpa', did you mean 'alpha'?"],
    ),
    "missing inherit of an arm": (
        f"{GOOD}phases:\n  - {{name: alpha, runs: [{{arm: x, «inherit: beta}}]}}\n",
        ["phases[0].runs[0].inherit: unknown phase 'beta'; choose one of alpha"],
    ),
    "inherit that is no name": (
        f"{GOOD}{PHASE}    «inherit: [a]\n",
        ["phases[0].inherit: unknown phase \"['a']\"; choose one of a"],
    ),
    "a phase that inherits from itself": (
        f"{GOOD}{PHASE}    «inherit: a\n",
        ["phases[0].inherit: phases inherit in a circle: a -> a"],
    ),
    "two phases in a circle": (
        f"{GOOD}{PHASE}    «inherit: b\n  - {{name: b, runs: [{{arm: x, inherit: a}}]}}\n",
        ["phases[0].inherit: phases inherit in a circle: a -> b -> a"],
    ),
    "three phases in a circle": (
        f"{GOOD}phases:\n  - {{name: x, vary: {{lr: [1]}}}}\n  - {{name: a, vary: {{lr: [1]}}, «inherit: b}}\n"
        "  - {name: b, vary: {lr: [1]}, inherit: c}\n  - {name: c, vary: {lr: [1]}, inherit: a}\n",
        ["phases[1].inherit: phases inherit in a circle: a -> b -> c -> a"],
    ),
    "the only phase inherits from itself": (
        f"{GOOD}runs: [{{arm: x, «inherit: main}}]\n",
        ["runs[0].inherit: phases inherit in a circle: main -> main"],
    ),
    # ---- seeds
    "wrong seeds": (
        f"{GOOD}seeds: [«-1, 2, «1.0, «true, «2, «x, «2147483648]\n{PHASE}",
        [
            "seeds[0]: a seed is a whole number from 0 to 2147483647, got -1",
            "seeds[2]: a seed is a whole number from 0 to 2147483647, got 1.0",
            "seeds[3]: a seed is a whole number from 0 to 2147483647, got True",
            "seeds[4]: seed 2 is listed twice",
            "seeds[5]: a seed is a whole number from 0 to 2147483647, got 'x'",
            "seeds[6]: a seed is a whole number from 0 to 2147483647, got 2147483648",
        ],
    ),
    "no seeds": (
        f"{GOOD}«seeds: []\nphases:\n  - {{name: a, «seeds: [], vary: {{lr: [1.0]}}}}\n",
        ["seeds: the list of seeds is empty", "phases[0].seeds: the list of seeds is empty"],
    ),
    "one seed instead of a list": (
        f"{GOOD}«seeds: 3\n{PHASE}",
        ["seeds: expected a list of seeds such as [1, 2, 3], got 3"],
    ),
    "wrong fresh seeds": (
        f"{GOOD}phases:\n"
        + "".join(
            f"  - {{name: p{i}, «seeds: {text}, vary: {{lr: [1.0]}}}}\n"
            for i, text in enumerate(["fresh 0", "fresh x", "frsh 3", "fresh -1", "fresh 10000"])
        ),
        [
            f"phases[{i}].seeds: expected `fresh N` with N from 1 to 9999, or a list, got '{text}'"
            for i, text in enumerate(["fresh 0", "fresh x", "frsh 3", "fresh -1", "fresh 10000"])
        ],
    ),
    # ---- YAML
    "duplicate keys": (
        f"{GOOD}vary:\n  alpha: [0.1]\n  «alpha: [0.2]\n",
        ["duplicate key 'alpha'"],
    ),
    "tabs": (
        f"{GOOD}vary:\n«\talpha: [0.1]\n",
        ["not valid YAML: found character '\\t' that cannot start any token"],
    ),
    "a list at the top": (
        "«- campaign: small\n",
        ["a campaign is a mapping with at least `campaign:` and `phases:` (or `vary:`)"],
    ),
    "an empty file": ("«", ["a campaign is a mapping with at least `campaign:` and `phases:` (or `vary:`)"]),
    "sections that are no mappings": (
        f"campaign: small\n«metric: val_loss\n«resources: [1]\n«base: 3\nphases:\n"
        "  - {name: a, «vary: [alpha], «set: 3}\n",
        [
            "metric: must be a mapping of settings, got 'val_loss'",
            "resources: must be a mapping of settings, got [1]",
            "base: must be a mapping of settings, got 3",
            "phases[0].vary: nothing varies: give at least one setting with a list of values",
            "phases[0].set: must be a mapping of settings, got 3",
        ],
    ),
    "many mistakes, each reported, in the order of the file": (
        "campaign: small\nbase:\n  «steps: x\n  «corpus: shakespear\nseeds: [«-1]\n"
        "phases:\n  - name: a\n    vary: {alpha: [0.1, «true], «lrr: [1]}\n"
        "  - name: b\n    «inherit: c\n    runs: [{arm: x, «alhpa: 1}]\n«hold: 3\n",
        [
            "base.steps: input should be a valid integer, got 'x'",
            "base.corpus: unknown corpus 'shakespear', did you mean 'shakespeare'?; nor is there such a file or folder",
            "seeds[0]: a seed is a whole number from 0 to 2147483647, got -1",
            "phases[0].vary.alpha[1]: input should be a valid number, got True",
            "phases[0].vary.lrr: unknown setting, did you mean 'lr'?",
            "phases[1].inherit: unknown phase 'c'; choose one of a, b",
            "phases[1].runs[0].alhpa: unknown setting, did you mean 'alpha'?",
            "hold: input should be a valid string, got 3",
        ],
    ),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *assignments: str) -> Campaign:
    """The campaign of a file `c.yaml` in the working directory."""
    Path("c.yaml").write_text(text, encoding="utf-8")
    return load_campaign(Path("c.yaml"), assignments)


def complaint(text: str, *assignments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *assignments)
    return str(caught.value)


def unmarked(text: str) -> tuple[str, list[str]]:
    """A file without its marks, and the `line:column` of each mark."""
    plain, positions = "", []
    for piece in text.split(HERE):
        if plain or positions or not text.startswith(HERE):
            plain += piece
        else:
            plain = piece
        positions.append(f"{plain.count(chr(10)) + 1}:{len(plain) - plain.rfind(chr(10))}")
    return plain, positions[:-1]


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_a_mistake_is_answered_with_its_place_and_with_what_to_do(
    case: tuple[str, list[str]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, positions = unmarked(case[0])
    expected = [f"c.yaml:{at}: {message}" for at, message in zip(positions, case[1], strict=True)]
    expected = [line.replace("CWD", str(folder)) for line in expected]
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    assert run_campaign.main(["c.yaml", "--inline"]) == 2
    out, err = capsys.readouterr()
    assert err.splitlines() == expected
    assert out == ""
    assert [path.name for path in folder.iterdir()] == ["c.yaml"]
