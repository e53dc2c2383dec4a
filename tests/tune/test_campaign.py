"""Campaign files: what is allowed, and that every mistake is reported with its place and with advice."""

import copy
import io
import os
import shutil
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

import run_campaign
from ngpt.config.base import QUOTES, Config, ConfigError, build
from ngpt.config.base import settings as settings_of
from ngpt.data.dataset import Dataset
from ngpt.data.sources import CORPORA
from ngpt.model.residual import RESIDUAL_RULES
from ngpt.optim.optimizers import OPTIMIZERS
from ngpt.optim.schedule import SCHEDULES
from ngpt.training.config import TrainConfig, with_absolute_paths
from tests.helpers.marked_text import unmarked
from tune.campaign import load_campaign
from tune.planning.plan import preview
from tune.spec.schema import Campaign, EarlyStop, FreshSeeds, Header, Metric, Resources, UntilDecided
from tune.spec.sweeps import SWEEPS, ArmSpec, Axis

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
GPUS = "`auto`, a whole number from 0 to 1024, or a share of a GPU from 0.0001 to below 1"
KINDS = "vary, grid, zip, runs, combine, search"

# What is wrong -> the file, and the messages in the order of the marks.
WRONG: dict[str, tuple[str, list[str]]] = {
    # ---- names of settings
    "unknown key at the top": (
        f"{GOOD}«metirc: {{name: val_loss}}\n{PHASE}",
        ["metirc: unknown setting, did you mean 'metric'?"],
    ),
    "settings of trials at the top": (
        f"{GOOD}«steps: 7\n«optim: {{lr: 0.1}}\n«learning_rate: 0.1\n«seed: 1\n{PHASE}",
        [
            "steps: a setting of trials: move it into `base:`",
            "optim: a setting of trials: move it into `base:`",
            "learning_rate: unknown setting; here it is called optim.lr",
            "seed: unknown setting, did you mean 'seeds'?",
        ],
    ),
    "a winner of no phase": (
        f"{GOOD}{PHASE}  - name: confirm\n    seeds: fresh 4\n    runs: [{{arm: baseline}}, {{«arm: winner}}]\n",
        [
            "phases[1].runs[1].arm: this arm changes nothing: name the phase that it is the winner of, "
            "`{arm: winner, inherit: a}`",
        ],
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
    "resources that several ranks cannot share": (
        f"{GOOD}resources: {{ranks_per_trial: 3, «cpus_per_trial: 4}}\n{PHASE}",
        ["resources.cpus_per_trial: 4 threads cannot be divided among 3 ranks; give a multiple of 3"],
    ),
    "a GPU for every second rank": (
        f"{GOOD}resources: {{ranks_per_trial: 4, «gpus_per_trial: 2}}\n{PHASE}",
        ["resources.gpus_per_trial: each of 4 ranks has a GPU of its own: expected auto, 4, or 0 for the CPU, got 2"],
    ),
    "ranks that train batched trials": (
        f"{GOOD}resources: {{ranks_per_trial: 2, «vectorise: 4}}\n{PHASE}",
        [
            "resources.vectorise: a process trains one trial as one of its 2 ranks, so it batches none: "
            "leave out vectorise"
        ],
    ),
    "a strategy without ranks": (
        f"{GOOD}resources: {{«strategy: fsdp}}\n{PHASE}",
        ["resources.strategy: is for several ranks: give their number as ranks_per_trial"],
    ),
    "a misspelt strategy": (
        f"{GOOD}resources: {{ranks_per_trial: 2, «strategy: fdsp}}\n{PHASE}",
        ["resources.strategy: unknown strategy 'fdsp', did you mean 'fsdp'? Allowed: ddp, fsdp"],
    ),
    "batches that ranks cannot divide": (
        f"{GOOD}resources: {{ranks_per_trial: 2}}\nvary: {{batch_size: [4, «3]}}\n",
        ["vary.batch_size[1]: 3 sequences cannot be divided among 2 ranks"],
    ),
    "models that fsdp cannot divide": (
        f"{GOOD}resources: {{ranks_per_trial: 2, strategy: fsdp}}\nvary: {{mlp_ratio: [2.0, «2.0625]}}\n",
        ["vary.mlp_ratio[1]: strategy fsdp: blocks.0.mlp.down.weight has 33 vectors, which 2 ranks cannot divide"],
    ),
    "equal time on several ranks": (
        f"{GOOD}hold: seconds\nresources: {{«ranks_per_trial: 2}}\n{PHASE}",
        [
            "resources.ranks_per_trial: phase a holds seconds, which are measured on one device; "
            "use `hold: tokens` or `hold: steps`"
        ],
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
    "too few items of a list in base": (
        "campaign: small\nbase: {«betas: [0.9]}\nvary: {«betas: [[0.9, 0.95], «[0.5]]}\n".replace(
            "«betas: [[", "betas: [["
        ),
        ["base.betas: value 2 is missing", "vary.betas[1]: value 2 is missing"],
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
        "campaign: small\nbase: {«lr: .nan}\nvary: {alpha: [0.1, «.inf]}\n",
        [
            "base.lr: input should be a finite number, got nan",
            "vary.alpha[1]: input should be a finite number, got inf",
        ],
    ),
    "out of range": (
        f"campaign: small\n«confidence: 1.5\n«min_effect: -1\nbase: {{«n_layer: 0}}\n{PHASE}",
        [
            "confidence: input should be less than 1, got 1.5",
            "min_effect: input should be greater than or equal to 0, got -1; 0 to 1,000,000 is possible",
            "base.n_layer: input should be greater than or equal to 1, got 0; 1 to 10,000 is possible",
        ],
    ),
    # ---- choices
    "unknown corpus": (
        f"campaign: small\nbase:\n  data:\n    «corpus: shakespear\n{PHASE}",
        ["base.data.corpus: unknown corpus 'shakespear', did you mean 'shakespeare'?; there is no such file or folder"],
    ),
    "unknown corpus in a sweep": (
        f"{GOOD}vary: {{corpus: [python-docs, «nowhere/text.txt]}}\n",
        [
            "vary.corpus[1]: unknown corpus 'nowhere/text.txt'; choose one of "
            + ", ".join(sorted(CORPORA))
            + "; there is no such file or folder"
        ],
    ),
    "a corpus without a name": (
        f"campaign: small\nbase: {{«corpus: ''}}\n{PHASE}",
        ["base.corpus: a corpus is a name, a file or a folder, got ''"],
    ),
    "local copy that is not there": (
        f"campaign: small\nbase: {{corpus: shakespeare, «data.path: gone.txt}}\n{PHASE}",
        ["base.data.path: no such file: CWD/gone.txt"],
    ),
    "unknown residual rule": (
        f"campaign: small\nbase: {{«residual: lrep}}\n{PHASE}",
        [
            "base.residual: unknown residual rule 'lrep', did you mean 'lerp'? Allowed: "
            + ", ".join(sorted(RESIDUAL_RULES))
        ],
    ),
    "unknown optimizer in a sweep": (
        f"{GOOD}vary: {{optim.name: [adamw, «moun]}}\n",
        [
            "vary.optim.name[1]: unknown optimizer 'moun', did you mean 'muon'? Allowed: "
            + ", ".join(sorted(OPTIMIZERS))
        ],
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
        [
            "phases[0].set.schedule.name: unknown schedule 'cosin', did you mean 'cosine'? Allowed: "
            + ", ".join(sorted(SCHEDULES))
        ],
    ),
    "a phase that holds something unknown": (
        f"{GOOD}phases:\n  - {{name: a, «hold: token, vary: {{alpha: [1, 2]}}}}\n",
        [
            "phases[0].hold: unknown quantity to hold 'token', did you mean 'tokens'?",
        ],
    ),
    "unknown metric, goal and hold": (
        f"{GOOD}metric: {{«name: loss, «goal: minimise}}\n«hold: token\n{PHASE}",
        [
            "metric.name: unknown metric 'loss', did you mean 'val_loss'? Allowed: activation_norm_error, flops, "
            "n_params, peak_memory_bytes, r_max, r_mean, r_min, r_replaced, steps, tokens, tokens_per_second, "
            "train_loss, val_bpb, val_loss, weight_norm_error",
            "metric.goal: unknown goal 'minimise', did you mean 'minimize'? Allowed: maximize, minimize",
            "hold: unknown quantity to hold 'token', did you mean 'tokens'? Allowed: seconds, steps, tokens",
        ],
    ),
    "unknown share of a GPU": (
        f"{GOOD}resources: {{«gpus_per_trial: atuo, «workers: 0}}\n{PHASE}",
        [
            f"resources.gpus_per_trial: expected {GPUS}, got 'atuo'",
            "resources.workers: input should be greater than or equal to 1, got 0; 1 to 4,096 is possible",
        ],
    ),
    "unknown device in base": (
        f"campaign: small\nbase: {{«device: cudda}}\n{PHASE}",
        ["base.device: unknown device 'cudda', did you mean 'cuda'? Allowed: auto, cpu, cuda, mps"],
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
    "a rule under its old and its new name": (
        f"{GOOD}vary: {{residual: [seed, lerp, «add_normalize]}}\n",
        ["vary.residual[2]: add_normalize is listed twice"],
    ),
    "two runs of a rule under its old and its new name": (
        f"{GOOD}runs:\n  - {{arm: x, residual: seed}}\n  - «{{arm: y, residual: add_normalize}}\n",
        ["runs[1]: the arm 'y' changes the same settings in the same way as 'x'"],
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
    "settings of the campaign in base": (
        f"campaign: small\nbase: {{«seeds: [3], steps: 5, «hold: steps}}\n{PHASE}",
        [
            "base.seeds: `seeds:` is a top-level key of the campaign file: move it out of `base:`",
            "base.hold: `hold:` is a top-level key of the campaign file: move it out of `base:`",
        ],
    ),
    "seed in base": (
        f"campaign: small\nbase: {{«seed: 3}}\n{PHASE}",
        ["base.seed: the seed is not set in `base:`: write `seeds: [1, 2, 3]` at the top level of the file"],
    ),
    "runtime settings swept": (
        f"{GOOD}grid: {{«tracker.log_every: [1, 2], «device: [cpu, cuda]}}\n",
        [
            "grid.tracker.log_every: tracker.log_every does not change what is computed: set it in `base:`",
            "grid.device: device does not change what is computed: set it in `base:`",
        ],
    ),
    "a grid of 10^12 arms": (
        f"{GOOD}«grid: {{{', '.join(f'{name}: {list(range(1, 1001))}' for name in ('lr', 'alpha', 'steps', 'eps'))}}}",
        ["grid: (1000 x 1000 x 1000 x 1000) arms x 3 seeds = 3e+12 trials; a campaign has at most 10000"],
    ),
    "too many trials in two phases": (
        f"{GOOD}phases:\n  - name: a\n    vary: {{lr: {list(range(1, 3001))}}}\n"
        f"  - name: b\n    «vary: {{alpha: {list(range(1, 501))}}}\n",
        ["phases[1].vary: 500 arms x 3 seeds = 1500 trials after 9000 in other phases; a campaign has at most 10000"],
    ),
    # ---- arms
    "two arms of one name": (
        f"{GOOD}runs: [{{arm: x, alpha: 0.1}}, {{«arm: x, alpha: 0.2}}]\n",
        ["runs[1].arm: two arms are named 'x'"],
    ),
    "two arms whose names differ by a space": (
        f"{GOOD}runs: [{{arm: a  b, alpha: 0.1}}, {{«arm: 'a b ', alpha: 0.2}}]\n",
        ["runs[1].arm: two arms are named 'a b'"],
    ),
    "two equal arms": (
        f"{GOOD}runs:\n  - {{arm: x, alpha: 1}}\n  - «{{arm: y, model: {{alpha: 1.0}}}}\n",
        ["runs[1]: the arm 'y' changes the same settings in the same way as 'x'"],
    ),
    "a baseline that changes something": (
        f"{GOOD}runs: [{{«arm: baseline, alpha: 0.1}}]\n",
        ["runs[0].arm: the arm `baseline` is the unchanged base of the phase; give a changed arm another name"],
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
        "  - name: b\n    inherit: a\n    vary: {n_embd: [32, «20]}\n",
        [
            "phases[1].vary.n_embd[1]: n_embd 20 / n_head 4 gives heads of odd width 5; rotary embedding needs an even "
            "width (if model.n_head=4 wins the earlier phase)"
        ],
    ),
    "impossible model only if two earlier phases end so": (
        f"{GOOD}phases:\n  - name: a\n    vary: {{n_head: [1, 4]}}\n  - name: b\n    vary: {{n_embd: [32, «20]}}\n"
        "  - name: c\n    inherit: a\n    runs: [{arm: x, inherit: b}]\n",
        [
            "phases[1].vary.n_embd[1]: n_embd 20 / n_head 4 gives heads of odd width 5; rotary embedding needs an even "
            "width (if model.n_head=4, model.n_embd=20 wins the earlier phase)"
        ],
    ),
    "micro-batches that do not fit": (
        f"{GOOD}vary: {{batch_size: [4, «5], alpha: [0.1]}}\n".replace("steps: 4", "steps: 4, micro_batch_size: 2"),
        ["vary.batch_size[1]: batch_size 5 is not a multiple of micro_batch_size 2"],
    ),
    "vocabulary smaller than the tokenizer's": (
        "campaign: small\nbase: {vocab_size: 600, tokenizer: 'sentencepiece:500'}\n"
        "vary: {tokenizer: [«'sentencepiece:700', 'sentencepiece:400']}\n",
        ["vary.tokenizer[0]: model.vocab_size 600 is smaller than the 700 tokens of the data"],
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
            "phases[0].name: 'trials' is reserved: the results directory uses this name itself",
            "phases[1].name: 'Report.HTML' is reserved: the results directory uses this name itself",
        ],
    ),
    "names that would be paths": (
        "«campaign: ../small\nphases:\n"
        + "".join(f"  - {{«name: {name}, vary: {{lr: [1.0]}}}}\n" for name in ("a/b", "..", "/tmp", "''", "a..b")),
        [f"campaign: '../small' cannot be the name of a campaign: use 1 to 64 {NAMES}"]
        + [
            f"phases[{i}].name: {name} cannot be the name of a phase: use 1 to 64 {NAMES}"
            for i, name in enumerate(["'a/b'", "'..'", "'/tmp'", "''", "'a..b'"])
        ],
    ),
    "names that YAML reads as numbers": (
        "«campaign: 1\nphases:\n  - {«name: 0.5, «inherit: 1, runs: [{«arm: true}]}\n"
        "  - {name: '1', combine: {from: [«1]}}\n",
        [
            f"campaign: 1 cannot be the name of a campaign: {QUOTES}",
            f"phases[0].name: 0.5 cannot be the name of a phase: {QUOTES}",
            f"phases[0].inherit: unknown phase '1'; {QUOTES}",
            f"phases[0].runs[0].arm: true cannot be the name of an arm: {QUOTES}",
            f"phases[1].combine.from[0]: unknown phase '1'; {QUOTES}",
        ],
    ),
    "texts that YAML reads as numbers": (
        f"campaign: small\n«description: 2026\nbase: {{«corpus: 1}}\n{PHASE}",
        [
            f"description: input should be a valid string, got 2026; {QUOTES}",
            f"base.corpus: input should be a valid string, got 1; {QUOTES}",
        ],
    ),
    "sizes that no machine has": (
        f"{GOOD}resources: {{«cpus_per_trial: 1000000000000, «workers: 1000000000, «vectorise: 99999, "
        f"«stall_timeout: 1e308}}\nbudget: {{«trials: 9999999999, «hours: 1e9}}\n{PHASE}",
        [
            "resources.cpus_per_trial: input should be less than or equal to 4096, got 1000000000000; "
            "1 to 4,096 is possible",
            "resources.workers: input should be less than or equal to 4096, got 1000000000; 1 to 4,096 is possible",
            "resources.vectorise: input should be less than or equal to 1024, got 99999; 1 to 1,024 is possible",
            "resources.stall_timeout: input should be less than or equal to 10000000, got 1e+308; "
            "1 to 10,000,000 is possible",
            "budget.trials: input should be less than or equal to 1000000000, got 9999999999; "
            "1 to 1,000,000,000 is possible",
            "budget.hours: input should be less than or equal to 1000000, got 1000000000.0; "
            "above 0 to 1,000,000 is possible",
        ],
    ),
    "a model that no machine has": (
        f"campaign: small\nbase: {{«n_layer: 10000, n_embd: 1048576, n_head: 1024}}\n{PHASE}",
        [
            "base.n_layer: n_layer 10000, n_embd 1048576 and mlp_ratio 4 give a model of about 1.8e+17 parameters; "
            "at most 1e+13 are possible",
        ],
    ),
    "a step that no machine has": (
        f"campaign: small\nbase: {{«batch_size: 1048576, block_size: 65536}}\n{PHASE}",
        [
            "base.batch_size: batch_size 1048576 with block_size 65536 makes 68,719,476,736 tokens per step; "
            "at most 1,073,741,824 are possible",
        ],
    ),
    "a name of 300 characters": (
        f"«campaign: {'a' * 150}{'b' * 150}\n{PHASE}",
        [f"campaign: '{'a' * 19}…{'b' * 20}' cannot be the name of a campaign: use 1 to 64 {NAMES}"],
    ),
    "no campaign name": (f"«base: {{}}\n{PHASE}", ["`campaign:` is missing: give the campaign a name"]),
    # ---- inheritance
    "missing inherit": (
        f"{GOOD}phases:\n  - {{name: alpha, vary: {{lr: [1]}}}}\n  - {{name: b, «inherit: alhpa, vary: {{lr: [1]}}}}\n",
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
        ["phases[0].inherit: phases inherit from each other in a cycle: a -> a"],
    ),
    "two phases in a cycle": (
        f"{GOOD}{PHASE}    «inherit: b\n  - {{name: b, runs: [{{arm: x, inherit: a}}]}}\n",
        ["phases[0].inherit: phases inherit from each other in a cycle: a -> b -> a"],
    ),
    "three phases in a cycle": (
        f"{GOOD}phases:\n  - {{name: x, vary: {{lr: [1]}}}}\n  - {{name: a, vary: {{lr: [1]}}, «inherit: b}}\n"
        "  - {name: b, vary: {lr: [1]}, inherit: c}\n  - {name: c, vary: {lr: [1]}, inherit: a}\n",
        ["phases[1].inherit: phases inherit from each other in a cycle: a -> b -> c -> a"],
    ),
    "a cycle that another phase leads into": (
        f"{GOOD}phases:\n  - {{name: x, vary: {{lr: [1]}}, inherit: b}}\n"
        "  - {name: a, vary: {lr: [1]}, «inherit: b}\n  - {name: b, vary: {lr: [1]}, inherit: a}\n",
        ["phases[1].inherit: phases inherit from each other in a cycle: a -> b -> a"],
    ),
    "the only phase inherits from itself": (
        f"{GOOD}runs: [{{arm: x, «inherit: main}}]\n",
        ["runs[0].inherit: phases inherit from each other in a cycle: main -> main"],
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
            f"phases[{i}].seeds: expected `fresh`, `fresh N` with N from 1 to 9999, or a list, got '{text}'"
            for i, text in enumerate(["fresh 0", "fresh x", "frsh 3", "fresh -1", "fresh 10000"])
        ],
    ),
    "seeds until decided, with mistakes": (
        f"{GOOD}seeds: {{until: decided, «start: 1, «most: many, «fersh: true}}\nphases:\n"
        "  - {name: a, seeds: {until: decided, start: 5, «most: 4}, vary: {lr: [1.0]}}\n"
        "  - {name: b, seeds: {until: decided, «start: 40}, vary: {lr: [1.0]}}\n"
        "  - {name: c, «seeds: {start: 3}, vary: {lr: [1.0]}}\n"
        "  - {name: d, seeds: {«until: decide, «fresh: 3}, vary: {lr: [1.0]}}\n",
        [
            "seeds.start: expected a whole number from 2 to 1000, got 1",
            "seeds.most: expected a whole number from 2 to 1000, got 'many'",
            "seeds.fersh: unknown setting, did you mean 'fresh'?",
            "phases[0].seeds.most: must be at least `start`, which is 5, got 4",
            "phases[1].seeds.start: must be at most `most`, which is 30, got 40",
            "phases[2].seeds: `until: decided` is missing: write `{until: decided, start: 3, most: 30}`",
            "phases[3].seeds.until: unknown condition 'decide', did you mean 'decided'?",
            "phases[3].seeds.fresh: expected true or false, got 3",
        ],
    ),
    "seeds until decided, and a search that is stopped early": (
        f"{GOOD}seeds: {{until: decided}}\n«early_stop: {{first: 2}}\n"
        "search: {method: random, trials: 3, space: {lr: {log: [1e-3, 1e-1]}}}\n",
        [
            "early_stop: phase main gives seeds until its arms are decided, which stops arms by itself; "
            "remove `early_stop:`, or list the seeds of that phase"
        ],
    ),
    "seeds until decided, and arms that optuna proposes": (
        f"{GOOD}seeds: {{until: decided}}\n"
        "search: {«method: optuna, trials: 3, space: {lr: {log: [1e-3, 1e-1]}}}\n",
        [
            "search.method: optuna proposes arms by their results on all seeds, so `until: decided` cannot be combined "
            "with it; use `method: random`, or a list of seeds"
        ],
    ),
    "too many trials, if no arm is decided": (
        f"{GOOD}seeds: {{until: decided, most: 1000}}\n«vary: {{alpha: {[i / 100 for i in range(1, 12)]}}}\n",
        ["vary: 11 arms x 1000 seeds = 11000 trials; a campaign has at most 10000"],
    ),
    # ---- YAML
    "duplicate keys": (
        f"{GOOD}vary:\n  alpha: [0.1]\n  «alpha: [0.2]\n",
        ["duplicate key 'alpha'"],
    ),
    "tabs": (
        f"{GOOD}vary:\n«\talpha: [0.1]\n",
        ["a tab (U+0009): use spaces"],
    ),
    "a list at the top": (
        "«- campaign: small\n",
        ["a campaign is a mapping with at least `campaign:` and `phases:` (or `vary:`)"],
    ),
    "an empty file": ("«", ["a campaign is a mapping with at least `campaign:` and `phases:` (or `vary:`)"]),
    "sections that are no mappings": (
        "campaign: small\n«metric: val_loss\n«resources: [1]\n«base: 3\nphases:\n"
        "  - {name: a, «vary: [alpha], «set: 3}\n",
        [
            "metric: must be a mapping of settings, such as {name: val_loss}",
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
            "base.corpus: unknown corpus 'shakespear', did you mean 'shakespeare'?; there is no such file or folder",
            "seeds[0]: a seed is a whole number from 0 to 2147483647, got -1",
            "phases[0].vary.alpha[1]: input should be a valid number, got True",
            "phases[0].vary.lrr: unknown setting, did you mean 'lr'?",
            "phases[1].inherit: unknown phase 'c'; choose one of a, b",
            "phases[1].runs[0].alhpa: unknown setting, did you mean 'alpha'?",
            f"hold: input should be a valid string, got 3; {QUOTES}",
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


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_a_mistake_is_reported_with_its_place_and_with_advice(
    case: tuple[str, list[str]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, positions = unmarked(case[0])
    expected = [f"c.yaml:{at}: {message}" for at, message in zip(positions, case[1], strict=True)]
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    assert run_campaign.main(["c.yaml", "--inline"]) == 2
    out, err = capsys.readouterr()
    assert err.splitlines() == [line.replace("CWD", str(folder)) for line in expected]
    assert out == ""
    assert [path.name for path in folder.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("cls", [TrainConfig, Header, EarlyStop])
def test_every_whole_number_has_a_largest_value(cls: type[Config]) -> None:
    def problem(name: str, value: float) -> str:
        try:
            build(cls, {"first": 1, name: value} if cls is EarlyStop else {name: value})
        except ConfigError as error:
            return " ".join(each.message for each in error.problems if each.location == tuple(name.split(".")))
        return ""

    whole = [name for name in settings_of(cls) if "valid integer" in problem(name, 2.5)]
    assert whole and [name for name in whole if "less than" not in problem(name, 2**62)] == []


@pytest.mark.parametrize("value", ["auto", 0, 1, 8, 1.0, 0.5, 1 / 3, 0.0001])
def test_a_trial_gets_whole_gpus_or_a_share_of_one(value: Any) -> None:
    assert build(Resources, {"gpus_per_trial": value}).gpus_per_trial == value


@pytest.mark.parametrize("value", [1.5, 1e-9, 1e308, float("nan"), float("inf"), -1, 1025, True, "1", None])
def test_a_number_of_gpus_that_ray_can_never_place_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Resources, {"gpus_per_trial": value})
    assert str(caught.value) == f"gpus_per_trial: expected {GPUS}, got {value!r}"


def test_a_campaign_from_standard_input_is_refused_by_name(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert run_campaign.main(["-"]) == 2
    assert capsys.readouterr().err.startswith("-: standard input is not read, because a run is resumed from its file")


def test_lines_and_columns_are_counted_as_in_an_editor(folder: Path) -> None:
    text = "# a comment\ncampaign: small\nphases:\n  - name: a\n    vary:\n      alhpa: [0.1]\n"
    assert complaint(text) == "c.yaml:6:7: phases[0].vary.alhpa: unknown setting, did you mean 'alpha'?"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere/c.yaml", "nowhere/c.yaml: No such file or directory"),
        (".", ".: Is a directory"),
        ("binary.yaml", "binary.yaml: byte 0 is not UTF-8"),
    ],
)
def test_an_unreadable_file_is_a_usage_error_that_names_it(
    path: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "binary.yaml").write_bytes(b"\xff\xfe")
    assert run_campaign.main([path]) == 2
    assert capsys.readouterr().err == f"{message}\n"
    assert not (folder / "results").exists()


def test_a_huge_grid_is_refused_without_being_expanded(folder: Path) -> None:
    text, _ = unmarked(WRONG["a grid of 10^12 arms"][0])
    tracemalloc.start()
    complaint(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6  # bytes; the arms alone would take 10^14


def test_a_new_sweep_is_a_function_and_an_entry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(axes: Sequence[Axis]) -> list[ArmSpec]:
        return [ArmSpec(f"{axis.label}-{i}", {axis.setting: axis.values[i]}) for axis in axes for i in (0, -1)]

    monkeypatch.setitem(SWEEPS, "ends", ends)
    file = f"{GOOD}phases:\n  - name: a\n    ends: {{alpha: [0.1, 0.2, 0.3], lr: [1e-3, 1e-2]}}\n"
    (phase,) = load(file).phases
    assert [arm.overrides for arm in phase.arms] == [
        {"model.alpha": 0.1},
        {"model.alpha": 0.3},
        {"optim.lr": 1e-3},
        {"optim.lr": 1e-2},
    ]
    seeds = ", ".join(map(str, range(3000)))
    assert "phases[0].ends: 4 arms x 3000 seeds = 12000 trials" in complaint(f"{file}    seeds: [{seeds}]\n")
    assert "did you mean 'ends'?" in complaint(file.replace("ends:", "end:"))


@pytest.mark.parametrize(
    ("arms", "problem"),
    [
        ([1], "must return a list of ArmSpec with names, got 1"),
        ([ArmSpec("a", {"steps": 3})], "sets steps, which is none of its axes"),
        ([ArmSpec("a", {"model.alpha": 0.1}), ArmSpec("a", {})], "returns two arms with the name a"),
        (None, "fails: TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_a_sweep_that_returns_no_arms_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arms: Any, problem: str
) -> None:
    monkeypatch.setitem(SWEEPS, "odd", lambda axes: arms)
    file = f"{GOOD}phases:\n  - {{name: a, odd: {{alpha: [0.1]}}}}\n"
    assert f"phases[0].odd: the sweep odd {problem}" in complaint(file)


def test_seeds_until_decided_have_defaults_and_hold_for_the_campaign_or_for_one_phase(folder: Path) -> None:
    phases = "phases:\n  - {name: a, vary: {lr: [1.0]}}\n"
    phases += "  - {name: b, seeds: {until: decided, start: 2, most: 8, fresh: true}, vary: {lr: [1.0]}}\n"
    campaign = load(f"{GOOD}seeds: {{until: decided}}\n{phases}")
    assert [phase.seeds for phase in campaign.phases] == [UntilDecided(3, 30), UntilDecided(2, 8, fresh=True)]


# ---- what a valid file means -----------------------------------------------------------------------------------------


def test_every_setting_of_a_campaign_is_read_from_the_file(folder: Path) -> None:
    text = (
        "campaign: full\ndescription: All of it\nmetric: {name: val_bpb, goal: maximize}\nseeds: [7, 8]\n"
        "hold: steps\nconfidence: 0.9\nmin_effect: 0.01\n"
        "base: {steps: 5, model: {alpha: 0.2}, optim.lr: 1e-3, warmup_steps: 1}\n"
        "resources: {cpus_per_trial: 2, gpus_per_trial: 0.25, workers: 3}\n"
        "phases:\n"
        "  - {name: a, vary: {lr: [1e-2, 1]}}\n"
        "  - {name: b, inherit: a, set: {steps: 9}, seeds: fresh 4, runs: [{arm: x, alpha: 1, inherit: a}]}\n"
        "  - {name: c, hold: seconds, seeds: [0], zip: {alpha: [0.1, 0.2], optim: {name: [muon, adamw]}}}\n"
    )
    campaign = load(text)
    assert (campaign.name, campaign.description, campaign.hold) == ("full", "All of it", "steps")
    assert (campaign.metric, campaign.confidence) == (Metric(name="val_bpb", goal="maximize"), 0.9)
    assert campaign.min_effect == 0.01
    assert campaign.resources == Resources(cpus_per_trial=2, gpus_per_trial=0.25, workers=3)
    base = campaign.base
    assert (base.steps, base.model.alpha, base.optim.lr, base.schedule.warmup_steps) == (5, 0.2, 0.001, 1)
    assert [phase.hold for phase in campaign.phases] == [None, None, "seconds"]
    assert (campaign.text, campaign.assignments) == (text, ())
    a, b, c = campaign.phases
    assert (a.name, a.seeds, a.swept) == ("a", (7, 8), {"optim.lr": (0.01, 1)})
    assert [arm.overrides for arm in a.arms] == [{"optim.lr": 0.01}, {"optim.lr": 1}]
    assert (b.inherit, b.pinned, b.seeds, b.needs) == ("a", {"steps": 9}, FreshSeeds(4), {"a"})
    assert [(arm.name, arm.overrides, arm.inherit) for arm in b.arms] == [("x", {"model.alpha": 1}, "a")]
    assert c.seeds == (0,)
    assert [arm.name for arm in c.arms] == ["alpha=0.1, optim.name=muon", "alpha=0.2, optim.name=adamw"]


def test_settings_that_are_left_out_have_defaults(folder: Path) -> None:
    campaign = load("campaign: short\nvary: {alpha: [0.1]}\n")
    assert (campaign.metric, campaign.resources) == (Metric(name="val_loss", goal="minimize"), Resources())
    assert (campaign.hold, campaign.confidence, campaign.min_effect) == ("tokens", 0.95, 0.005)
    assert [(phase.name, phase.seeds) for phase in campaign.phases] == [("main", (1, 2, 3))]


def test_phases_are_ordered_by_need_and_otherwise_as_written(folder: Path) -> None:
    text = "campaign: c\nphases:\n" + "".join(
        f"  - {{name: {name}, runs: [{{arm: x, alpha: 1}}]{inherit}}}\n"
        for name, inherit in [("d", ", inherit: a"), ("c", ""), ("b", ", inherit: d"), ("a", "")]
    )
    assert [phase.name for phase in load(text).phases] == ["c", "a", "d", "b"]


def test_a_scientific_number_is_a_number(folder: Path) -> None:
    assert load(GOOD + PHASE, "lr=2e-4").base.optim.lr == 0.0002
    assert load("campaign: c\nbase: {lr: 1e-3}\nvary: {alpha: [1e-1]}\n").base.optim.lr == 0.001


# ---- --set -----------------------------------------------------------------------------------------------------------


def test_set_changes_the_base_and_beats_the_file(folder: Path) -> None:
    campaign = load(GOOD + PHASE, "steps=9", "optim.name=muon", "tracker.log_every=1", "n_head=1")
    base = campaign.base
    assert (base.steps, base.optim.name, base.tracker.log_every, base.model.n_head) == (9, "muon", 1, 1)
    assert base.model.n_embd == 16
    assert campaign.assignments == ("steps=9", "optim.name=muon", "tracker.log_every=1", "n_head=1")
    assert campaign.text == GOOD + PHASE


def test_set_can_replace_a_wrong_value_of_the_file(folder: Path) -> None:
    text = "campaign: c\nbase: {n_embd: 15, n_head: 2, steps: x}\nvary: {lr: [1]}\n"
    assert load(text, "n_embd=12", "steps=3").base.model.head_dim == 6


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("alhpa=1", "--set alhpa=1: unknown setting, did you mean 'alpha'?"),
        ("name=muon", "--set name=muon: ambiguous setting, write one of optim.name, schedule.name"),
        ("steps=many", "--set steps=many: input should be a valid integer, got 'many'"),
        ("steps=1e3", "--set steps=1e3: input should be a valid integer, got 1000.0; write 1000"),
        ("n_head=3", "--set n_head=3: n_embd 16 cannot be divided into n_head 3 heads"),
        ("n_embd=15", "--set n_embd=15: n_embd 15 cannot be divided into n_head 2 heads"),
        ("corpus=shakespear", "--set corpus=shakespear: unknown corpus 'shakespear', did you mean 'shakespeare'?; "
         "there is no such file or folder"),
        ("steps", "--set steps: expected NAME=VALUE"),
        ("=3", "--set =3: expected NAME=VALUE"),
        ("betas=[0.9", "--set betas=[0.9: 1:5: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("betas=[0.9, 2]", "--set betas=[0.9, 2][1]: input should be less than 1, got 2"),
        ("seed=3", "--set seed=3: --set cannot change seeds: write `seeds: [1, 2, 3]` at the top level of the file"),
        ("seeds=[3]", "--set seeds=[3]: `seeds:` is a top-level key of the campaign file; "
 "--set only changes settings under `base:`"),
        (
            "resources.workers=2",
            "--set resources.workers=2: `resources:` is a top-level key of the campaign file; "
 "--set only changes settings under `base:`",
        ),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_reported_there(assignment: str, message: str, folder: Path) -> None:
    assert complaint(GOOD + PHASE, assignment) == message


def test_mistakes_in_the_file_and_on_the_command_line_are_reported_together(folder: Path) -> None:
    text = "campaign: c\nbase: {lrr: 1}\nvary: {alpha: [x]}\n"
    assert complaint(text, "stesp=1", "lr=x").splitlines() == [
        "c.yaml:2:8: base.lrr: unknown setting, did you mean 'lr'?",
        "c.yaml:3:16: vary.alpha[0]: input should be a valid number, got 'x'",
        "--set stesp=1: unknown setting, did you mean 'steps'?",
        "--set lr=x: input should be a valid number, got 'x'",
    ]


# ---- paths -----------------------------------------------------------------------------------------------------------


def test_paths_of_a_campaign_are_made_absolute(folder: Path, corpus: Path, dataset: Dataset) -> None:
    (folder / "texts").mkdir()
    shutil.copy(corpus, folder / "texts" / "a.txt")
    shutil.copy(dataset.folder / "tokenizer.model", folder / "t.model")
    text = (
        "campaign: c\nbase: {data: {corpus: texts/a.txt, tokenizer: t.model}}\nphases:\n"
        "  - {name: a, vary: {corpus: [texts, ./texts/a.txt, python-docs]}}\n"
        "  - {name: b, set: {tokenizer: ./t.model}, runs: [{arm: x, corpus: texts}]}\n"
        "  - {name: c, vary: {tokenizer: ['sentencepiece:300', t.model, gpt2]}}\n"
    )
    campaign = load(text)
    assert campaign.base.data.corpus == str(folder / "texts/a.txt")
    assert campaign.base.data.tokenizer == str(folder / "t.model")
    a, b, c = campaign.phases
    corpora = [str(folder / "texts"), str(folder / "texts/a.txt"), "python-docs"]
    assert [arm.overrides["data.corpus"] for arm in a.arms] == corpora
    assert [arm.name for arm in a.arms] == ["corpus=texts", "corpus=./texts/a.txt", "corpus=python-docs"]
    assert b.pinned == {"data.tokenizer": str(folder / "t.model")}
    assert [arm.overrides for arm in b.arms] == [{"data.corpus": str(folder / "texts")}]
    tokenizers = [arm.overrides["data.tokenizer"] for arm in c.arms]
    assert tokenizers == ["sentencepiece:300", str(folder / "t.model"), "gpt2"]


def test_paths_on_the_command_line_are_made_absolute(folder: Path, corpus: Path) -> None:
    shutil.copy(corpus, folder / "a.txt")
    assert load(GOOD + PHASE, "corpus=a.txt").base.data.corpus == str(folder / "a.txt")


def test_a_local_copy_and_the_folder_of_a_tokenizer_are_made_absolute() -> None:
    written = {"data.path": "copy.txt", "data.tokenizer": "gpt2:vocab", "data.corpus": "shakespeare", "steps": 3}
    here = os.getcwd()
    assert with_absolute_paths(written) == {
        "data.path": f"{here}/copy.txt",
        "data.tokenizer": f"gpt2:{here}/vocab",
        "data.corpus": "shakespeare",
        "steps": 3,
    }


def test_a_home_directory_is_expanded(folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    shutil.copy(corpus, folder / "a.txt")
    assert load(GOOD + PHASE, "corpus=~/a.txt").base.data.corpus == str(folder / "a.txt")
    assert "unknown corpus" in complaint(GOOD + PHASE, "corpus=~nobody-here/a.txt")


def test_the_name_of_a_corpus_wins_over_a_folder_of_that_name(folder: Path) -> None:
    (folder / "python-docs").mkdir()
    assert load(GOOD + PHASE).base.data.corpus == "python-docs"


# ---- anything --------------------------------------------------------------------------------------------------------

FUZZED = """\
campaign: c
metric: {name: val_loss, goal: minimize}
seeds: [1, 2]
hold: tokens
confidence: 0.95
budget: {trials: 9, hours: 1}
base:
  model: {n_layer: 1, n_head: 2, n_embd: 16}
  data: {corpus: python-docs, tokenizer: "sentencepiece:500"}
  optim: {name: adamw, betas: [0.9, 0.95]}
  steps: 4
resources: {cpus_per_trial: 1, gpus_per_trial: auto}
phases:
  - name: a
    vary: {alpha: [0.1, 0.2]}
  - name: b
    inherit: a
    set: {steps: 8}
    grid: {n_head: [1, 2], n_embd: [16, 32]}
  - name: c
    seeds: fresh 2
    runs: [{arm: baseline}, {arm: x, inherit: b, lr: 0.01}]
  - name: d
    zip: {lr: [0.1, 0.2], tokenizer: ["sentencepiece:500", gpt2]}
  - name: e
    combine: {from: [a, b]}
  - name: f
    search: {method: random, trials: 3, seed: 0, space: {lr: {log: [0.1, 0.2]}, n_head: {choice: [1, 2]}}}
  - name: g
    inherit: e
    search: {method: optuna, trials: 3, parallel: 2, space: {alpha: {uniform: [0.1, 0.2]}, n_layer: {uniform: [1, 3]}}}
"""
WORDS = ["a", "b", "x", "baseline", "steps", "alpha", "name", "arm", "inherit", "vary", "runs", "seed", "fresh 1", "lr"]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=3),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3)
)


def nodes(data: Any) -> list[tuple[Any, Any]]:
    """Every place in a document, as a container and a key or index."""
    keys = list(data) if isinstance(data, dict) else list(range(len(data))) if isinstance(data, list) else []
    return [place for key in keys for place in ((data, key), *nodes(data[key]))]


def mutate(data: Any, draw: st.DataObject) -> None:
    """Deletes, replaces, renames or duplicates one random node."""
    container, key = draw.draw(st.sampled_from(nodes(data)), label="node")
    what = draw.draw(st.sampled_from(["delete", "replace", "rename", "copy", "list"]), label="how")
    if what == "delete":
        del container[key]
    elif what == "rename" and isinstance(container, dict):
        container[draw.draw(st.sampled_from(WORDS))] = container.pop(key)
    elif what == "copy":
        _, source = draw.draw(st.sampled_from(nodes(data)), label="from")
        container[key] = copy.deepcopy(container.get(source, 1) if isinstance(container, dict) else container)
    elif what == "list" and isinstance(container, list):
        container.append(copy.deepcopy(container[key]))
    else:
        container[key] = draw.draw(values, label="value")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.data())
def test_any_mutation_of_a_file_is_a_campaign_or_a_list_of_problems(folder: Path, draw: st.DataObject) -> None:
    data = YAML(typ="safe").load(FUZZED)
    for _ in range(draw.draw(st.integers(1, 3))):
        if nodes(data):
            mutate(data, draw)
    written = io.StringIO()
    YAML().dump(data, written)
    try:
        campaign = load(written.getvalue())
    except ConfigError as error:
        assert all(line.startswith("c.yaml:") for line in str(error).splitlines()), str(error)
        return
    assert campaign.phases
    for phase in preview(campaign):
        assert all(trial.config.steps >= 1 for trial in phase.trials)
