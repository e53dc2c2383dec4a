"""Fresh seeds, and the level at which repeated confirmations are tested."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tune.planning.plan import plan_phase, preview
from tune.planning.seeds import SEED_RANGE, content_of, draw_seeds, level_of_look, phase_seeds, seed_family
from tune.spec.schema import Campaign
from tune.storage.records import FreshDraw

BASE = """\
campaign: c
base: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 8, steps: 10, batch_size: 16, alpha: 0.2}
"""
Load = Callable[[str], Campaign]
NAMES = [f"p{i}" for i in range(6)]


# ---- drawn seeds ---------------------------------------------------------------------------------------------------


def test_drawn_seeds_follow_from_the_content_and_avoid_seen_ones() -> None:
    first = draw_seeds("content", 5, ())
    assert len(set(first)) == 5 and all(SEED_RANGE[0] <= seed < SEED_RANGE[1] for seed in first)
    assert draw_seeds("content", 5, ()) == first != draw_seeds("other", 5, ())
    again = draw_seeds("content", 5, first)
    assert not set(again) & set(first)
    assert draw_seeds("content", 5, first[:1])[:4] == first[1:]


def test_seeds_are_drawn_even_if_most_are_taken() -> None:
    taken = range(SEED_RANGE[0], SEED_RANGE[1])
    assert not set(draw_seeds("content", 3, taken)) & set(taken)


def test_a_plan_uses_the_seeds_that_were_drawn_for_its_content(load: Load) -> None:
    campaign = load(f"{BASE}phases:\n  - {{name: p, seeds: fresh 2, vary: {{lr: [1]}}}}\n")
    (phase,) = campaign.phases
    planned = plan_phase(campaign, phase, {})
    assert planned.fresh is None and planned.seeds == phase_seeds(campaign, phase)
    draw = FreshDraw(content_of(phase, planned.identities), (71, 72))
    drawn = plan_phase(campaign, phase, {}, draws={("p", draw.content): draw})
    assert (drawn.seeds, drawn.fresh, drawn.identities) == ((71, 72), draw, planned.identities)
    renamed = plan_phase(campaign, phase, {}, draws={("old name", draw.content): draw})
    assert renamed.seeds == (71, 72)
    changed = load(f"{BASE}phases:\n  - {{name: p, seeds: fresh 2, vary: {{lr: [2]}}}}\n")
    assert plan_phase(changed, changed.phases[0], {}, draws={("p", draw.content): draw}).fresh is None
    (previewed,) = preview(campaign, draws={("p", draw.content): draw})
    assert previewed == drawn


def test_seeds_are_shared_by_campaigns_of_one_corpus_model_size_and_kind(load: Load) -> None:
    def family(text: str) -> str:
        campaign = load(text)
        return seed_family(campaign, campaign.phases[0])

    usual = family(f"{BASE}vary: {{lr: [1]}}\n")
    assert family(f"{BASE.replace('steps: 10', 'steps: 11')}vary: {{alpha: [1]}}\n") == usual
    assert family(f"{BASE.replace('n_embd: 16', 'n_embd: 32')}vary: {{lr: [1]}}\n") != usual
    assert family(f"{BASE}phases: [{{name: p, set: {{n_layer: 3}}, vary: {{lr: [1]}}}}]\n") != usual
    gpt = BASE.replace("alpha: 0.2", "residual: add")
    assert family(f"{gpt}vary: {{lr: [1]}}\n") != usual


# ---- provisional seeds ---------------------------------------------------------------------------------------------


def fresh_campaign(load: Load, order: list[str], lists: str = "[1, 2]") -> Campaign:
    """Phases `p0`, `p1`, ... in the given order, with enough fresh seeds to overlap."""
    phases = "".join(f"  - {{name: {name}, seeds: fresh 300, vary: {{lr: [1]}}}}\n" for name in order)
    return load(f"{BASE}seeds: {lists}\nphases:\n  - {{name: first, vary: {{lr: [1]}}}}\n{phases}")


def all_fresh(campaign: Campaign) -> dict[str, tuple[int, ...]]:
    return {phase.name: phase_seeds(campaign, phase) for phase in campaign.phases if phase.name != "first"}


def test_no_two_phases_share_a_provisional_seed(load: Load) -> None:
    seeds = all_fresh(fresh_campaign(load, NAMES))
    assert [len(found) for found in seeds.values()] == [300] * 6
    assert len({seed for found in seeds.values() for seed in found}) == 6 * 300


def test_provisional_seeds_differ_from_all_listed_seeds(load: Load) -> None:
    listed = list(range(100, 1000, 3))
    seeds = all_fresh(fresh_campaign(load, NAMES, str(listed)))
    assert not {seed for found in seeds.values() for seed in found} & set(listed)


@hypothesis_settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(order=st.permutations(NAMES))
def test_provisional_seeds_do_not_depend_on_the_order_of_the_phases(load: Load, order: list[str]) -> None:
    assert all_fresh(fresh_campaign(load, order)) == all_fresh(fresh_campaign(load, NAMES))


# ---- levels --------------------------------------------------------------------------------------------------------


def test_the_levels_of_all_confirmations_add_up_to_twice_alpha() -> None:
    levels = [level_of_look(0.05, look) for look in range(1, 5)]
    assert levels == pytest.approx([0.05, 0.025, 0.05 / 6, 0.05 / 12])
    total = sum(level_of_look(0.05, look) for look in range(1, 100_000))
    assert total < 0.1 and total == pytest.approx(0.1, rel=1e-4)  # half of it on the side of `better`
