"""What ``rlhf leaderboard`` shows of real comparison sets, through the stages data and rank."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli.main import main
from rlhf.config.pipeline import load_pipeline
from rlhf.pipeline.plan import plan
from rlhf.pipeline.stage import stages
from rlhf.store import Store
from tests.pipeline.helpers import made


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pipeline(folder: Path, *, models: bool) -> Path:
    """A pipeline of data and rank, with results: model b writes what everybody prefers, c what nobody does."""
    sets = [
        {"prompt": f"p{number}", "responses": ["one", "two", "three"], "rankings": [[1, 0, 2]] * 3}
        | ({"models": ["a", "b", "c"]} if models else {})
        for number in range(8)
    ]
    files = {
        "comparisons": write(folder / "comparisons.jsonl", sets),
        "demonstrations": write(folder / "demonstrations.jsonl", [{"prompt": "p", "completion": "c"}]),
        "prompts": write(folder / "prompts.jsonl", [{"prompt": "p"}]),
        "judge": None,
    }
    data = {name: None if file is None else str(file) for name, file in files.items()} | {"heldout_fraction": 0.0}
    path = folder / "mine.yaml"
    path.write_text(json.dumps({"store": {"uri": str(folder / "store")}, "data": data, "rank": {}}))
    known = stages()
    config = load_pipeline(path, (), {name: stage.settings for name, stage in known.items()})
    store = Store.open(config.store.uri)
    for name in config.instances:
        store.set_ref(config.name, name, made(plan(config, known, store)[name], store).key)
    return path


def test_models_come_in_the_order_of_what_people_prefer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As a table, and as JSON with the interval of each."""
    path = pipeline(tmp_path, models=True)
    assert main(["leaderboard", "--config", str(path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["model", "b", "a", "c"]
    assert shown[1].split()[-1] == "48"
    assert main(["leaderboard", "rank", "--json", "--config", str(path)]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [one["model"] for one in models] == ["b", "a", "c"]
    for one in models:
        assert one["low"] < one["elo"] < one["high"]


def test_without_models_or_a_result_the_message_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What to write into the sets; what to run; and that a stage of another kind has none."""
    path = pipeline(tmp_path, models=False)
    for words, said in (
        (["leaderboard"], 'write "models": [name, …] beside the responses'),
        (["leaderboard", "data"], "data has no leaderboard"),
        (["leaderboard", "rank.prior_elo=50"], "rlhf run rank rank.prior_elo=50"),
        (["leaderboard", "rank", "data"], "takes one stage"),
    ):
        assert main([*words, "--config", str(path)]) == 2
        assert said in capsys.readouterr().err.replace("\n", " ").replace("  ", " ")
