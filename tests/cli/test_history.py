"""What ``explain``, ``lineage`` and ``diff`` say of results: on a terminal, and as JSON."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf.narration import diff_view, explain_view, lineage_view
from rlhf.store import ActionRecord, Store, key_of
from tests.cli.conftest import Ask
from tests.pipeline.helpers import make, planned

MADE: dict[str, Any] = {
    "finished": "2026-11-26T10:20:30+00:00",
    "host": "driver",
    "python": "3.11.9",
    "commit": "c0ffee",
    "versions": {"torch": "2.13.0"},
    "ranks": 1,
    "gpus": 0,
    "hosts": ["node-1"],
    "devices": ["CPU"],
    "earlier_attempts": [],
    "previous": None,
    "origin": {},
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def commit(
    store: Store, stage: str, settings: dict[str, Any], inputs: dict[str, ActionRecord], seconds: float, **made: Any
) -> ActionRecord:
    """A result of a few bytes with a provenance of one's own."""
    digests = {role: one.artifact for role, one in inputs.items()}
    key = key_of(stage, 1, settings, digests)
    folder = store.new_attempt(key) / "output"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(key))
    return store.commit(
        ActionRecord(
            key=key,
            stage=stage,
            version=1,
            settings=settings,
            inputs={
                role: {"artifact": one.artifact, "part": "", "digest": one.artifact, "key": one.key}
                for role, one in inputs.items()
            },
            artifact=store.put_artifact(folder, "data").digest,
            metrics={"score": seconds / 100},
            provenance=MADE | made,
            seconds=seconds,
            attempt="000001",
        )
    )


@pytest.fixture
def chain(store: Store) -> dict[str, ActionRecord]:
    """Data of a file of the user's, a base model of the hub, sft and ppo; sft failed once, after an hour on 8 GPUs."""
    card = {"source": "owner/model", "revision": "a" * 40, "license": "apache-2.0"}
    rows = {"source": "rows.jsonl"}
    failed = [{"attempt": "000001", "seconds": 3600.0, "ranks": 8, "gpus": 8}]
    data = commit(store, "data", {"sources": {"demonstrations": "d" * 64}}, {}, 10, origin={"demonstrations": rows})
    model = commit(store, "model", {"base": "owner/model"}, {}, 20, origin={"model": card})
    inputs = {"base": model, "demonstrations": data}
    sft = commit(store, "sft", {"lr": 1e-4}, inputs, 1800, ranks=8, gpus=8, earlier_attempts=failed)
    ppo = commit(store, "ppo", {"kl": {"coef": 0.1}}, {"policy": sft, "prompts": data}, 900, ranks=4, gpus=4)
    return {"data": data, "model": model, "sft": sft, "ppo": ppo}


def rendered(view: Any, width: int = 120) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(view)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def test_the_cost_of_a_result_counts_every_attempt_that_led_to_it_once(
    ask: Ask, chain: dict[str, ActionRecord], store: Store
):
    """GPU-hours are GPUs times hours, failed attempts included; data, read twice, was made once."""
    document = ask("lineage", chain["ppo"].key, "--json").document
    assert document["provenance"]["total"] == {
        "seconds": 10 + 20 + 1800 + 3600 + 900,
        "gpu_hours": 8 * 1.5 + 4 * 0.25,
        "results": 4,
    }
    sft = document["inputs"]["policy"]
    assert sft["provenance"]["total"] == {"seconds": 5430, "gpu_hours": 12.0, "results": 3}
    assert sft["provenance"]["read"]["base"] == {"part": "", "digest": chain["model"].artifact}


def test_gpu_hours_that_nobody_noted_are_unknown_and_not_zero(ask: Ask, store: Store):
    """A result of before they were noted must not make a model look free."""
    old = commit(store, "data", {}, {}, 5, gpus=None)
    assert ask("lineage", old.key, "--json").document["provenance"]["total"]["gpu_hours"] is None
    assert "GPU-hours unknown" in ask("lineage", old.key).out


def test_lineage_on_a_terminal(ask: Ask, chain: dict[str, ActionRecord]):
    """A tree, and below it data digests, the base model with its revision and licence, code, versions and cost."""
    document = ask("lineage", chain["ppo"].key, "--json").document
    keys = {name: record.key[:6] + "…" for name, record in chain.items()}
    assert (
        rendered(lineage_view(document))
        == f"""\
ppo {keys["ppo"]}  2026-11-26 10:20  15:00  4 ranks, 4 GPUs  on node-1
├── policy: sft {keys["sft"]}  2026-11-26 10:20  30:00  8 ranks, 8 GPUs  after 1 attempt of 1:00:00  on node-1
│   ├── base: model {keys["model"]}  2026-11-26 10:20  0:20  1 rank, no GPUs  on node-1
│   └── demonstrations: data {keys["data"]}  2026-11-26 10:20  0:10  1 rank, no GPUs  on node-1
└── prompts: data {keys["data"]}  as above

model: model          owner/model, at {"a" * 40}, licence apache-2.0
data: demonstrations  rows.jsonl, digest {"d" * 64}
code                  c0ffee
hosts                 node-1
devices               CPU
versions              Python 3.11.9, torch 2.13.0
cost                  1:45:30, 13 GPU-hours, for 4 results and the attempts that led to them"""
    )


def test_diff_shows_settings_inputs_and_metrics_side_by_side(ask: Ask, chain: dict[str, ActionRecord], store: Store):
    """What differs is followed through inputs; metrics have both values and their difference."""
    model, data = chain["model"], chain["data"]
    sft = commit(store, "sft", {"lr": 5e-4}, {"base": model, "demonstrations": data}, 1900)
    ppo = commit(
        store, "ppo", {"kl": {"coef": 0.2}}, {"policy": sft, "prompts": data}, 950, versions={"torch": "2.14.0"}
    )
    document = ask("diff", chain["ppo"].key, ppo.key, "--json").document
    assert list(document) == ["a", "b", "changes", "differences", "circumstances", "metrics"]
    assert document["changes"] == ["kl.coef 0.1 → 0.2", "input policy changed: sft.lr 0.0001 → 0.0005"]
    assert document["metrics"]["score"] == {"a": 9.0, "b": 9.5, "difference": 0.5}
    a, b = chain["ppo"].key[:6], ppo.key[:6]
    assert (
        rendered(diff_view(document))
        == f"""\
a  ppo {a}…
b  ppo {b}…
made from, a → b:
  kl.coef 0.1 → 0.2
  input policy changed, by sft:
    lr 0.0001 → 0.0005
made with, a → b:
  ranks 4 → 1
  gpus 4 → 0
  torch 2.13.0 → 2.14.0

metric  a    b  b - a
score   9  9.5   +0.5"""
    )


def test_diff_takes_stages_pipelines_keys_and_artifacts(ask: Ask, made: Path, chain: dict[str, ActionRecord]):
    """Any two results of one store, by any of their names, a short key as it is printed among them."""
    store = Store.open(made.parent / "store")
    store.set_ref("other", "ppo", chain["ppo"].key)
    total = planned(made)["total"].record
    assert total is not None
    whole = ask("diff", "total", chain["ppo"].key, "--json").document
    assert (whole["a"]["key"], whole["b"]["key"]) == (total.key, chain["ppo"].key)
    for other in ("other/ppo", chain["ppo"].key[:6], chain["ppo"].key[:8].upper(), chain["ppo"].key[:6] + "…"):
        assert ask("diff", "toy/total", other, "--json").document == whole
    assert ask("diff", total.artifact[:10], chain["ppo"].artifact, "--json").document == whole
    assert "they are one result" in ask("diff", "total", "total").out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("totl", "names no stage"),
        ("abc", "at least 6"),
        ("0" * 12, "no stage, key or artifact"),
        ("other/ppo", "no result of 'ppo'"),
        ("../../etc/passwd", "no result of"),
        ("toy/..", "no result of"),
        ("", "names no stage"),
    ],
)
def test_a_name_of_nothing_is_refused_with_what_to_do(ask: Ask, made: Path, name: str, said: str):
    """Status 2, and never a traceback, whatever is given as a name."""
    answer = ask("diff", "total", name)
    assert answer.status == 2
    assert said in answer.err
    assert "next:" in answer.err


def test_digits_of_several_results_are_refused_and_the_candidates_listed(
    ask: Ask, store: Store, monkeypatch: pytest.MonkeyPatch
):
    """One must not be taken for another: both are named, with their stages."""
    commits = [commit(store, "data", {"n": n}, {}, 1) for n in range(2)]
    digits = commits[0].key[:6]
    monkeypatch.setattr(Store, "keys", lambda _: [one.key for one in commits])
    # Two keys that share six digits are not to be had: the second is read under the first digits.
    read = Store.action
    changed = {one.key: one for one in commits} | {commits[1].key: replace(commits[1], key=digits + commits[1].key[6:])}
    monkeypatch.setattr(Store, "action", lambda self, key: changed.get(key) or read(self, key))
    answer = ask("diff", digits, commits[0].key)
    assert answer.status == 2
    assert "names more than one result" in answer.err
    assert commits[0].key[:16] in answer.err
    assert digits + commits[1].key[6:16] in answer.err
    assert ask("diff", commits[0].key, commits[0].key).status == 0


def test_explain_says_why_a_stage_ran_again_after_it_did(ask: Ask, made: Path):
    """A result remembers the one before it, so that the question can be asked once the answer is cached."""
    store = Store.open(made.parent / "store")
    first = planned(made)["count"].record
    assert first is not None
    again = planned(made, "count.step=2")["count"]
    assert again.key is not None
    made_after = MADE | {"previous": first.key}
    store.commit(replace(first, key=again.key, settings={"step": 2}, provenance=made_after))
    document = ask("explain", "count", "count.step=2", "--json").document
    assert (document["state"], document["made"]["since"]) == ("cached", first.key)
    assert document["made"]["changes"] == ["step 1 → 2"]
    shown = ask("explain", "count", "count.step=2").out
    assert f"it was made after {first.key[:6]}…, because:\n  step 1 → 2" in shown


def test_explain_on_a_terminal(ask: Ask, made: Path):
    """The causes as a tree; those of a stage that stands behind several inputs are told once."""
    make(made, "words.left=five six seven", only="words")
    document = ask("explain", "total", "words.left=five six seven", "total.factor=2.0", "--json").document
    since = document["since"][:6]
    assert (
        rendered(explain_view(document))
        == f"""\
total: blocked; since its latest result, {since}…:
  factor 1.0 → 2.0
  input count will change, by count:
    input words changed, by words:
      left one two → five six seven"""
    )
    twice = document | {"differences": [document["differences"][1]] * 2}
    assert rendered(explain_view(twice)).endswith("input count will change, by count: as above")


def test_no_setting_or_name_can_move_the_cursor(ask: Ask, chain: dict[str, ActionRecord], store: Store):
    """A model card, a host or a setting comes from outside: its control characters are not printed."""
    evil = "x\x1b[2Jy"
    one = commit(store, "data", {"a": evil}, {}, 1, host=evil, hosts=[evil], origin={evil: {"source": evil}})
    for words in (("lineage", one.key), ("diff", one.key, chain["data"].key)):
        answer = ask(*words)
        assert answer.status == 0
        assert "\x1b" not in answer.out
        assert "x�[2Jy" in answer.out


def test_damage_in_a_file_of_any_name_cannot_move_the_cursor(ask: Ask, made: Path):
    """Whoever may write into the store may call a file what they like."""
    (made.parent / "store" / "blobs" / "sha256" / "\x1b[2J[bold]").write_text("x")
    for words in (("verify",), ("verify", "--repair")):
        answer = ask(*words)
        assert answer.status == 1
        assert "\x1b" not in answer.out + answer.err
        assert "�[2J[bold]" in answer.out


def test_an_answer_of_a_model_cannot_move_the_cursor_of_a_terminal(
    ask: Ask, made: Path, monkeypatch: pytest.MonkeyPatch
):
    """A pipe gets what the model wrote, to the letter."""

    class Speaker:
        def __init__(self, _: Path) -> None: ...

        def prompt_ids(self, *_: object) -> list[int]:
            return [1]

        def answer(self, *_: object, **__: object) -> list[str]:
            return ["one\x1b[2", "J\n", "two"]

    monkeypatch.setattr("rlhf.rollout.speaker.Speaker", Speaker)
    assert ask("generate", "total", "--prompt", "hi").out == "one\x1b[2J\ntwo\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert ask("generate", "total", "--prompt", "hi").out == "one�[2J\ntwo\n"
