import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli.dashboard import LAYOUT
from tests.cli.conftest import Ask

GOLDEN = Path(__file__).parents[2] / "benchmarks" / "golden.json"


def test_every_panel_shows_metrics_that_a_stage_logs():
    """Golden results have the names, except of what is timed."""
    logged = {"step"} | {name for steps in json.loads(GOLDEN.read_text()).values() for name in steps[-1]}
    shown = {name for panels in LAYOUT.values() for panel in panels for name in panel}
    assert {name for name in shown if not name.startswith("perf/")} <= logged


def test_without_a_key_the_view_is_printed_and_refused(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With what to do."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    answer = ask("dashboard")
    assert answer.status == 2
    assert "objective/scores over objective/kl" in answer.out.splitlines()[1]
    assert "WANDB_API_KEY" in answer.err


def test_with_a_key_the_view_begins_with_reward_against_kl(ask: Ask, monkeypatch: pytest.MonkeyPatch):
    """As W&B would be sent it. There is no server here: to save it is a stand-in."""
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    sent: list[Any] = []
    monkeypatch.setattr("wandb.login", lambda **_: True)
    monkeypatch.setattr(workspaces.Workspace, "save", lambda view: sent.append(view._to_model()))
    monkeypatch.setattr(workspaces.Workspace, "url", "https://wandb/view")
    answer = ask("dashboard", "tracking.entity=us")
    assert (answer.status, answer.out.splitlines()[-1]) == (0, "https://wandb/view")
    (view,) = sent
    assert (view.entity, view.project) == ("us", "rlhf")
    first = view.spec.section.panel_bank_config.sections[0].panels[0].config
    assert (first.x_axis, first.metrics) == ("objective/kl", ["objective/scores"])
