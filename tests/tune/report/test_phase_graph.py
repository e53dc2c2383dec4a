"""What phases hand on, and its picture."""

import itertools
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any

import jinja2

from tune.report.phase_graph import BOX_HEIGHT, handovers, inheritance_graph
from tune.storage.summaries import ArmSummary, Delta, PhaseSummary


def phase(name: str, winner: dict[str, Any] | None = None, sources: tuple[str, ...] = (), **more: Any) -> PhaseSummary:
    best = [ArmSummary("best", overrides=winner, sources=sources, verdict="better")] if winner else []
    arms = (ArmSummary("baseline"), *best)
    chosen = "best" if winner else "baseline"
    own = PhaseSummary(phase=name, arms=arms, winner=chosen, baseline="baseline", swept={"a": [1]})
    return replace(own, **more)


THREE = [
    phase("alpha", {"model.alpha": 0.2}),
    phase("kind", {"model.kind": "scalar"}, inherit="alpha", base={"model.alpha": 0.2}),
    phase("confirm", {"model.alpha": 0.2, "model.kind": "scalar"}, ("kind",), swept={}),
]


def test_a_phase_is_given_what_the_winner_had_and_an_arm_of_a_list_of_runs_too() -> None:
    first, second = handovers(THREE)
    assert first.text() == "alpha: alpha=0.2"
    assert (second.source, second.target, second.arm) == ("kind", "confirm", "best")
    assert second.settings == {"model.alpha": 0.2, "model.kind": "scalar"}


def test_what_a_phase_pins_for_itself_was_not_handed_on() -> None:
    pinned = phase("next", inherit="alpha", base={"model.alpha": 0.4, "steps": 9})
    (only,) = handovers([THREE[0], pinned])
    assert only.settings == {} and only.text() == "alpha: the base as it is"


def test_an_arm_that_happens_to_be_an_earlier_winner_inherits_nothing() -> None:
    assert handovers([THREE[0], phase("again", {"model.alpha": 0.2})]) == []
    assert handovers([THREE[0], phase("again", {"model.alpha": 0.2}, swept={})]) == []


def test_an_arm_that_joins_two_winners_has_both_and_an_arrow_for_each() -> None:
    other = phase("rate", {"optim.lr": 0.1})
    joined = phase("combined", {"model.alpha": 0.2, "optim.lr": 0.1}, ("alpha", "rate"), swept={})
    again = ArmSummary("again", overrides={"optim.lr": 0.1, "steps": 7}, sources=("rate",))
    joined = replace(joined, arms=(*joined.arms, again))
    assert [(edge.source, edge.arm, edge.settings) for edge in handovers([THREE[0], other, joined])] == [
        ("alpha", "best", {"model.alpha": 0.2}),
        ("rate", "best", {"optim.lr": 0.1}),
    ]


def test_the_best_arm_is_handed_on_to_its_confirmation_and_from_there_although_it_did_not_win() -> None:
    arm = ArmSummary("a=2", overrides={"model.alpha": 0.2}, verdict="undecided")
    search = replace(phase("search"), arms=(ArmSummary("baseline"), arm))
    confirm = replace(search, phase="confirm", arms=(ArmSummary("baseline"), replace(arm, sources=("search",))))
    later = phase("later", inherit="confirm", base={"model.alpha": 0.2})
    edges = handovers([search, replace(confirm, handed_on="a=2"), later])
    assert [edge.text() for edge in edges] == ["search to arm a=2: alpha=0.2", "confirm: alpha=0.2"]


def test_a_source_may_be_a_phase_of_other_results() -> None:
    (only,) = handovers([phase("next", inherit="results/other/best", base={"optim.lr": 0.1})])
    assert only.text() == "results/other/best: lr=0.1"
    graph = inheritance_graph([phase("next", inherit="results/other/best", base={"optim.lr": 0.1})])
    assert graph is not None and len(graph["arrows"]) == 1
    assert graph["labels"][0]["text"] == "from results/other/best: lr=0.1"


def test_a_box_says_what_came_out_and_an_arrow_from_the_box_above_needs_no_name() -> None:
    graph = inheritance_graph(THREE)
    assert graph is not None
    assert [box["result"] for box in graph["boxes"]] == ["best is better"] * 3
    assert [label["text"] for label in graph["labels"]] == ["alpha=0.2", "alpha=0.2, kind=scalar"]
    kept = inheritance_graph([phase("a"), phase("b", inherit="a")])
    assert kept is not None and [box["result"] for box in kept["boxes"]] == ["keeps its baseline"] * 2
    long = phase("a", arms=(ArmSummary("w" * 80, delta=Delta(-0.0525)),))
    long = replace(long, winner="w" * 80)
    (box, _) = (inheritance_graph([long, phase("b", inherit="a")]) or {})["boxes"]
    assert len(box["result"]) <= 46 and box["result"].endswith("is better, \u22120.0525")


def test_boxes_do_not_overlap_and_each_arrow_ends_at_a_box() -> None:
    far = phase("last", inherit="alpha", base={"model.alpha": 0.2})
    graph = inheritance_graph([*THREE, far])
    assert graph is not None
    tops = [box["y"] for box in graph["boxes"]]
    assert all(below - above > BOX_HEIGHT for above, below in itertools.pairwise(tops))
    ends = [float(d.rpartition("V ")[2].split()[0]) for d in graph["arrows"]]
    assert all(any(top - 3 <= end <= top + BOX_HEIGHT for top in tops) for end in ends)
    assert len(graph["arrows"]) == len(graph["labels"]) == 3
    assert all(label["y"] < graph["height"] for label in graph["labels"])


def test_nothing_handed_on_is_no_picture() -> None:
    assert inheritance_graph([phase("a"), phase("b")]) is None
    assert inheritance_graph([]) is None


def test_hostile_names_stay_text_in_the_picture() -> None:
    name = "<script>alert(1)</script>\x1b[31m" + "x" * 200
    graph = inheritance_graph([phase("a", inherit=name)])
    assert graph is not None and len(graph["labels"][0]["text"]) <= 46
    template = jinja2.Environment(autoescape=True).from_string(
        "<svg>{% for t in g.labels %}{{ t.text }}{% endfor %}</svg>"
    )
    assert len(list(ET.fromstring(template.render(g=graph)).iter())) == 1
