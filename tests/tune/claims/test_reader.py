"""Claims in a campaign file: what is allowed, and that each mistake is reported with its place before anything runs."""

from pathlib import Path
from typing import Any

import pytest

from ngpt.config.base import ConfigError, flatten
from ngpt.training.config import TrainConfig
from tests.helpers.marked_text import unmarked
from tune.campaign import load_campaign
from tune.claims.possible_arms import possible_arms
from tune.claims.reader import load_claims
from tune.spec.schema import Claim, Phase
from tune.spec.sweeps import ArmSpec

BASE = """\
campaign: small
base: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 16, steps: 4, batch_size: 2, alpha: 0.05}
phases:
  - name: a
    vary: {alpha: [0.05, 0.15], alpha_kind: [vector, scalar]}
  - name: b
    inherit: a
    grid: {project_every: [1, 7], lr: [0.1, 0.2]}
  - name: c
    runs: [{arm: baseline}, {arm: winner, inherit: b}]
    set: {steps: 8}
claims:
"""
LESS = "left: {alpha: 0.15}, right: {alpha: 0.05}, relation: less"
KNOWN = "choose one of less, greater, equal, below, above, synergy, best, monotone, ratio, arithmetic"

WRONG: dict[str, tuple[str, list[str]]] = {
    "an unknown relation": (
        "{id: x, «relation: lesser, left: {alpha: 0.15}, right: {alpha: 0.05}}",
        ["claims[0].relation: unknown relation 'lesser', did you mean 'less'?"],
    ),
    "no relation": ("«{id: x}", [f"claims[0]: `relation:` is missing: {KNOWN}"]),
    "no id": (f"«{{{LESS}}}", ["claims[0]: `id:` is missing: give the claim a name"]),
    "no right": (
        "«{id: x, relation: less, left: {alpha: 0.15}}",
        ["claims[0]: `right:` is missing: the relation `less` needs left and right"],
    ),
    "no tolerance": (
        "«{id: x, relation: equal, left: {alpha: 0.15}, right: {alpha: 0.05}}",
        ["claims[0]: `tolerance:` is missing: the relation `equal` needs left, right and tolerance"],
    ),
    "a negative tolerance": (
        "{id: x, relation: equal, left: {alpha: 0.15}, right: {alpha: 0.05}, «tolerance: -1}",
        ["claims[0].tolerance: a tolerance is 0 or more, got -1"],
    ),
    "a field of another relation": (
        f"{{id: x, «tolerance: 1, {LESS}}}",
        ["claims[0].tolerance: `tolerance:` does not apply to the relation `less`"],
    ),
    "a misspelt field": (f"{{id: x, «sais: no, {LESS}}}", ["claims[0].sais: unknown setting, did you mean 'says'?"]),
    "a bad expression": (
        "{id: x, relation: arithmetic, value: 3, tolerance: 0, «expression: abs(3)}",
        [
            "claims[0].expression: 'abs(3)' is not an arithmetic expression: use numbers, + - * / ** and parentheses, "
            "such as `110e3 * 20 * 60`"
        ],
    ),
    "two of one id": (f"{{id: x, {LESS}}}\n  - {{«id: x, {LESS}}}", ["claims[1].id: two claims have the id 'x'"]),
    "a source that is a number": (
        f"{{id: x, «source: 2, {LESS}}}",
        ['claims[0].source: expected text, got 2; write "2" in quotes'],
    ),
    "an unknown metric": (
        f"{{id: x, «metric: val_los, {LESS}}}",
        ["claims[0].metric: unknown metric 'val_los', did you mean 'val_loss'?"],
    ),
    "an unknown direction": (
        "{id: x, relation: monotone, setting: alpha, «direction: decreases}",
        ["claims[0].direction: unknown direction 'decreases', did you mean 'decreasing'?"],
    ),
    "an unknown setting": (
        "{id: x, relation: best, left: {«alhpa: 0.15}}",
        ["claims[0].left.alhpa: unknown setting, did you mean 'alpha'?"],
    ),
    "an unknown setting to vary": (
        "{id: x, relation: monotone, «setting: alhpa, direction: decreasing}",
        ["claims[0].setting: unknown setting, did you mean 'alpha'?"],
    ),
    "a seed as a side": (
        "{id: x, relation: best, left: {«seed: 1}}",
        ["claims[0].left.seed: a claim covers all seeds of its arms: leave out `seed:`"],
    ),
    "a side that is a word": (
        "{id: x, relation: best, «left: baseline}",
        [
            "claims[0].left: expected the settings of an arm, such as {alpha: 0.28}, or {arm: NAME}, got 'baseline'",
        ],
    ),
    "the same on both sides": (
        "{id: x, relation: less, left: {alpha: 0.15}, «right: {alpha: 0.15}}",
        ["claims[0].right: left and right are the same"],
    ),
    "one part alone": (
        "{id: x, relation: synergy, left: {alpha: 0.15}, right: {alpha: 0.05}, «parts: [{lr: 0.1}]}",
        [
            "claims[0].parts: expected a list of two or more arms, such as [{arm: A}, {arm: B}], got [{'lr': 0.1}]",
        ],
    ),
    "an unknown setting of a part": (
        "{id: x, relation: synergy, left: {alpha: 0.15}, right: {alpha: 0.05}, parts: [{arm: a}, {«alhpa: 1}]}",
        ["claims[0].parts[1].alhpa: unknown setting, did you mean 'alpha'?"],
    ),
    "a part that no arm is": (
        "{id: x, relation: synergy, phase: c, left: {arm: winner}, right: {arm: baseline}, "
        "parts: [{arm: winner}, «{arm: winer}]}",
        ["claims[0].parts[1]: unknown arm of phase c 'winer', did you mean 'winner'?"],
    ),
    "a claim that is a word": ("«x", ["claims[0]: a claim is a mapping with `id:` and `relation:`, got 'x'"]),
    # ---- arms that do not exist
    "a value that no arm has": (
        "{id: x, relation: less, «left: {alpha: 0.28}, right: {alpha: 0.05}}",
        ["claims[0].left: no arm of any phase has alpha=0.28; alpha takes 0.05, 0.15"],
    ),
    "a value that no arm of the phase has": (
        "{id: x, relation: less, phase: c, «left: {project_every: 3}, right: {arm: baseline}}",
        ["claims[0].left: no arm of phase c has project_every=3; project_every takes 1, 7"],
    ),
    "values that no arm has together": (
        "{id: x, relation: less, phase: a, «left: {alpha: 0.15, alpha_kind: scalar}, right: {alpha: 0.05}}",
        ["claims[0].left: no arm of phase a has alpha=0.15, alpha_kind=scalar all together"],
    ),
    "an arm that is not there": (
        "{id: x, relation: less, «left: {arm: winer, phase: c}, right: {arm: baseline}}",
        ["claims[0].left: unknown arm of phase c 'winer', did you mean 'winner'?"],
    ),
    "a phase that is not there": (
        f"{{id: x, «phase: cc, {LESS}}}",
        ["claims[0].phase: unknown phase 'cc', did you mean 'c'?"],
    ),
    "sides that never meet": (
        "«{id: x, relation: less, left: {arm: winner}, right: {arm: 'alpha=0.15'}}",
        ["claims[0]: no phase has both sides: left in c and right in a"],
    ),
    "a setting that does not vary": (
        "{id: x, relation: monotone, «setting: n_layer, direction: decreasing}",
        ["claims[0].setting: no phase has two or more numeric values of n_layer"],
    ),
    "all of several mistakes, each in its place": (
        "{id: x, relation: less, «left: {alpha: 0.28}, right: {alpha: 0.05}}\n  - «{id: y, relation: best}\n"
        "  - {id: z, relation: best, «left: {alpha: 0.9}}",
        [
            "claims[0].left: no arm of any phase has alpha=0.28; alpha takes 0.05, 0.15",
            "claims[1]: `left:` is missing: the relation `best` needs left",
            "claims[2].left: no arm of any phase has alpha=0.9; alpha takes 0.05, 0.15",
        ],
    ),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str) -> tuple[Claim, ...]:
    Path("c.yaml").write_text(text)
    return load_campaign(Path("c.yaml")).claims


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_is_reported_with_its_place(folder: Path, what: str) -> None:
    claims, messages = WRONG[what]
    text, places = unmarked(f"{BASE}  - {claims}\n")
    with pytest.raises(ConfigError) as error:
        load(text)
    expected = [f"c.yaml:{place}: {message}" for place, message in zip(places, messages, strict=True)]
    assert str(error.value).splitlines() == expected


@pytest.mark.parametrize(
    "claim",
    [
        f'{{id: x, source: "002", says: "alpha 0.15 beats 0.05", {LESS}}}',
        "{id: x, relation: less, left: {alpha: 0.15, project_every: 7}, right: {project_every: 1}}",  # if the arm wins
        "{id: x, relation: greater, left: {arm: winner, phase: c}, right: {arm: baseline, phase: c}}",
        "{id: x, relation: best, left: {model.alpha: 0.15}, phase: a}",
        "{id: x, relation: monotone, setting: lr, direction: increasing, left: {project_every: 7}}",
        "{id: x, relation: ratio, metric: tokens_per_second, value: 3 / 2, tolerance: 0.1, "
        "left: {alpha_kind: scalar}, right: {alpha_kind: vector}}",
        "{id: x, relation: less, left: {steps: 9}, right: {alpha: 0.05}}",  # steps may depend on the batch size
    ],
)
def test_a_claim_about_a_possible_arm_is_accepted(folder: Path, claim: str) -> None:
    (found,) = load(f"{BASE}  - {claim}\n")
    assert found.id == "x"


def test_arms_known_only_in_the_run_may_have_any_value_that_is_not_pinned() -> None:
    found = Phase("found", None, {"steps": 4, "model.alpha": 0.1}, (), (1, 2), {})  # by a search
    after = Phase("after", "found", {}, (ArmSpec("x", {"optim.lr": 0.1}),), (1, 2), {})
    elsewhere = Phase("elsewhere", "results/x/alpha", {}, (ArmSpec("x", {"optim.lr": 0.1}),), (1, 2), {})
    arms = possible_arms([found, after, elsewhere], flatten(TrainConfig()))

    def places(selector: dict[str, Any]) -> set[str]:
        return {arm.phase for arm in arms if arm.may_match(selector)}

    assert places({"model.alpha_kind": "scalar", "optim.lr": 0.7}) == {"found", "after", "elsewhere"}
    assert places({"model.alpha": 0.3}) == {"after", "elsewhere"}
    assert places({"model.alpha": 0.1, "phase": "found"}) == {"found"}
    assert places({"arm": "x", "optim.lr": 0.7}) == {"found"}


def test_a_claim_is_read_with_full_names_and_numbers(folder: Path) -> None:
    text = "{id: x, relation: ratio, value: 3 / 2, tolerance: 0.1, left: {lr: 0.1}, right: {lr: 0.2, phase: b}}"
    assert load(f"{BASE}  - {text}\n") == (
        Claim("x", "ratio", value=1.5, tolerance=0.1, left={"optim.lr": 0.1}, right={"optim.lr": 0.2, "phase": "b"}),
    )


def test_claims_are_optional_and_must_be_a_list(folder: Path) -> None:
    assert load(BASE.removesuffix("claims:\n")) == ()
    with pytest.raises(ConfigError, match=r"claims: expected a list of claims, got \{'a': 1\}"):
        load(BASE.replace("claims:", "claims: {a: 1}"))


def test_claims_can_be_read_without_a_campaign(folder: Path) -> None:
    Path("claims.yaml").write_text(f"claims:\n  - {{id: x, {LESS}}}\n")
    assert [claim.id for claim in load_claims(Path("claims.yaml"))] == ["x"]
    Path("claims.yaml").write_text(f"claims:\n  - {{id: x, {LESS}}}\n  - {{id: x, relation: best}}\n")
    with pytest.raises(ConfigError) as error:
        load_claims(Path("claims.yaml"))
    assert str(error.value) == ("claims.yaml:3:5: claims[1]: `left:` is missing: the relation `best` needs left")
