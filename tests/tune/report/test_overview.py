"""The page of all campaigns: charts that can be compared, and names from outside as text."""

import base64
import hashlib
import html
import re

import pytest

from tune.report.html import Live
from tune.report.overview import CHART_WIDTH, PAD, CampaignRow, intervals, render_notice, render_overview
from tune.storage.summaries import Delta

LIVE = Live("v1", "/-/state")


def row(metric: str, *ends: float) -> CampaignRow:
    low, mean, high = ends
    return CampaignRow("x", metric=metric, delta=Delta(mean, low, high))


def test_campaigns_of_one_metric_share_a_scale_that_has_zero() -> None:
    small, large, other, none = intervals(
        [row("val_loss", -0.2, -0.1, 0.0), row("val_loss", -1.0, -0.9, -0.8), row("val_bpb", 1, 2, 4), CampaignRow("y")]
    )
    inner = CHART_WIDTH - 2 * PAD
    assert small and large and other and none is None
    assert small == pytest.approx((PAD + inner, PAD + 0.8 * inner, PAD + 0.9 * inner, PAD + inner), abs=0.051)
    assert large == pytest.approx((PAD + inner, PAD, PAD + 0.1 * inner, PAD + 0.2 * inner), abs=0.051)
    assert other == pytest.approx((PAD, PAD + inner / 4, PAD + inner / 2, PAD + inner), abs=0.051)


def test_a_difference_without_an_interval_or_without_a_size_is_a_dot() -> None:
    (bare, zero) = intervals(
        [CampaignRow("a", metric="m", delta=Delta(-0.5)), CampaignRow("b", metric="n", delta=Delta(0.0))]
    )
    assert bare and zero and bare.low == bare.mean == bare.high == PAD and zero.mean == zero.zero == PAD


def test_names_and_reasons_are_shown_as_text() -> None:
    bad = '"><script>alert(1)</script>\x1b[2J\u202e'
    rows = [
        CampaignRow(bad, reason=bad),
        CampaignRow("ok", "/ok/", "running", detail=bad, arm=bad, note=bad, newest=bad),
    ]
    for text in (
        render_overview(rows, folder=bad, left_out=0, problem="", live=LIVE),
        render_overview([], folder=bad, left_out=0, problem=bad, live=LIVE),
        render_notice(bad, bad, LIVE),
    ):
        assert "<script>alert" not in text and "\x1b" not in text and "\u202e" not in text
        assert "&lt;script&gt;alert(1)" in text


def test_the_policy_allows_the_style_and_scripts_of_the_server_and_nothing_else() -> None:
    text = render_overview([], folder="results", left_out=0, problem="", live=LIVE)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    (style,) = re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL)
    inline, *scripts = re.findall(r"<script[^>]*>.*?</script>", text, flags=re.DOTALL)
    digests = [
        base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        for content in (inline.removeprefix("<script>").removesuffix("</script>"), style)
    ]
    assert html.unescape(policy).split("; ")[:4] == [
        "default-src 'none'",
        f"script-src 'self' 'sha256-{digests[0]}'",
        "connect-src 'self'",
        f"style-src 'sha256-{digests[1]}'",
    ]
    assert scripts == ['<script src="/-/overview.js"></script>', '<script src="/-/live.js"></script>']
    assert " style=" not in text and " onclick=" not in text
