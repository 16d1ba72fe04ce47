"""A run says which policies its evaluation left out."""

import io
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from rlhf.cli.run import print_samples


def record(key: str, *made_from: str) -> Any:
    return SimpleNamespace(key=key, artifact=key, metrics={}, inputs={name: {"key": name} for name in made_from})


def printed(**records: tuple[str, Any]) -> str:
    """What a run of stages prints; each has a kind and its record."""
    by_key = {one.key: one for _, one in records.values()}
    store = SimpleNamespace(action=by_key.get, read_file=lambda *_: b"")
    out = io.StringIO()
    request: Any = SimpleNamespace(store=lambda: store, out=Console(file=out, width=100))
    stages: Any = {
        name: SimpleNamespace(name=name, stage=SimpleNamespace(kind=kind), record=one)
        for name, (kind, one) in records.items()
    }
    print_samples(request, stages)
    return out.getvalue()


def test_a_policy_that_was_trained_and_not_evaluated_is_named() -> None:
    """Otherwise the figures of the one that `evaluate.policies` names pass for its own."""
    sft, ppo, dpo = record("s"), record("p", "s"), record("d", "s")
    trained = {"sft": ("policy", sft), "ppo": ("policy", ppo), "dpo": ("policy", dpo)}
    assert "not evaluated: dpo; add evaluate.policies=[dpo]" in printed(
        **trained, evaluate=("report", record("e", "p", "s"))
    )
    assert "not evaluated" not in printed(**trained, evaluate=("report", record("e", "p", "d")))
    assert "not evaluated" not in printed(**trained)
