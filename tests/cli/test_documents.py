"""What ``--json`` prints: other people's programs rest on every name and type here."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.attempt.context import Context
from rlhf.store import Store
from tests.cli.conftest import Ask
from tests.pipeline.helpers import make, planned, states, write_model
from tests.pipeline.toys import TotalSettings

STAGE = {
    "stage": str,
    "state": str,
    "key": str | None,
    "artifact": str | None,
    "why": str,
    "needs": list,
    "metrics": dict | None,
    "seconds": float | None,
}


def store_of(path: Path) -> Store:
    return Store.open(path.parent / "store")


@pytest.mark.parametrize("command", ["plan", "status"])
def test_plan_and_status_before_anything_is_made(ask: Ask, path: Path, command: str):
    """Missing has a key and no result; blocked has neither, and names what it waits for."""
    answer = ask(command, "--json")
    assert (answer.status, answer.err) == (0, "")
    document = answer.document
    assert list(document) == ["pipeline", "store", "stages"] + ["usage"] * (command == "status")
    assert (document["pipeline"], document["store"]) == ("toy", str(path.parent / "store"))
    for stage in document["stages"]:
        assert list(stage) == [*STAGE, *["progress"] * (command == "status")]
        assert all(isinstance(stage[name], kind) for name, kind in STAGE.items())
    words, count, total = document["stages"]
    assert (words["stage"], words["state"], words["why"], words["needs"]) == ("words", "missing", "new", [])
    assert len(words["key"]) == 64
    assert (count["state"], count["key"], count["artifact"], count["needs"]) == ("blocked", None, None, ["words"])
    assert total["needs"] == ["count"]
    assert {words["artifact"], words["metrics"], words["seconds"]} == {None}
    assert not (path.parent / "store").exists()


@pytest.mark.parametrize("command", ["plan", "status"])
def test_plan_and_status_of_what_is_made(ask: Ask, made: Path, command: str):
    """Cached has key, artifact, final metrics and the seconds that it took."""
    stages = ask(command, "--json").document["stages"]
    found = planned(made)
    for stage in stages:
        record = found[stage["stage"]].record
        assert record is not None
        assert stage == {
            "stage": stage["stage"],
            "state": "cached",
            "key": record.key,
            "artifact": record.artifact,
            "why": "unchanged",
            "needs": [],
            "metrics": record.metrics,
            "seconds": 1.5,
        } | ({"progress": None} if command == "status" else {})


def test_plan_speaks_of_the_asked_for_stages_with_the_asked_for_settings(ask: Ask, made: Path):
    """Overrides count in every command, and ``why`` names the changed setting, old → new."""
    stages = ask("plan", "count", "count.step=3", "--json").document["stages"]
    assert [(one["stage"], one["state"], one["why"]) for one in stages] == [
        ("words", "cached", "unchanged"),
        ("count", "missing", "step 1 → 3"),
    ]


def test_status_knows_what_runs_and_what_failed(ask: Ask, made: Path):
    """Running while somebody holds the lease; failed after an attempt that ended in an error; missing otherwise."""
    store = store_of(made)
    override = "total.factor=2.0"
    key = planned(made, override)["total"].key
    assert key is not None

    def total(command: str = "status") -> tuple[str, str]:
        one = ask(command, override, "--json").document["stages"][-1]
        return one["state"], one["why"]

    assert total() == ("missing", "factor 1.0 → 2.0")
    with store.lease(key):
        state, why = total()
        assert state == "running"
        assert why.startswith("held by process ")
        assert total("plan")[0] == "missing", "a plan knows no running"
    first = store.new_attempt(key)
    assert total() == ("missing", "factor 1.0 → 2.0; 1 unfinished attempt(s)")
    (first / "failure.json").write_text(json.dumps({"what": "it broke", "where": "rank 0", "next": ""}))
    assert total() == ("failed", "it broke (rank 0)")
    store.new_attempt(key)
    assert total()[0] == "missing", "the latest attempt decides"


def test_status_of_a_running_stage_says_how_far_it_is(ask: Ask, made: Path):
    """Its step and the time left, out of the store alone, by the pace of its last steps and not the reader's clock."""
    store, override = store_of(made), "total.factor=2.0"
    key = planned(made, override)["total"].key
    assert key is not None

    def progress() -> Any:
        return ask("status", override, "--json").document["stages"][-1]["progress"]

    old = store.new_attempt(key)
    (old / "progress.json").write_text(json.dumps({"message": "old", "done": 9, "total": 9, "at": 0.0, "times": []}))
    assert progress() is None, "nobody holds the lease"
    with store.lease(key):
        attempt = store.new_attempt(key)
        assert progress() is None, "the attempt that runs has not said anything"
        context = Context("total", key, TotalSettings(), {}, attempt / "output", attempt, store.root / "cache")
        for step in range(1, 5):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("time.time", lambda step=step: 1000.0 + 90 * step)
                context.progress(f"step {step}/10  loss 0.5", step, 10)
        assert progress() == {"message": "step 4/10  loss 0.5", "done": 4, "total": 10, "eta_seconds": 540.0}
        shown = [line.strip() for line in ask("status", override).out.splitlines()]
        assert "eta 9:00   step 4/10  loss 0.5" in shown
        context.progress("step 2/10", 2, 10)
        assert progress()["eta_seconds"] is None, "begun again"
    assert progress() is None


def test_a_stage_without_a_result_is_named_with_its_state(ask: Ask, made: Path, tmp_path: Path):
    """In every command that needs one; the reason alone says nothing."""
    for words in (("lineage", "total"), ("diff", "total", "count"), ("export", "total", str(tmp_path / "out"))):
        answer = ask(*words, "total.factor=2.0")
        assert answer.status == 2
        assert "error: total has no result yet\n  where: stage total: missing, factor 1.0 → 2.0\n" in answer.err
    assert "where: stage total: blocked, waits for count" in ask("lineage", "total", "count.step=3").err


def test_explain_names_what_changed(ask: Ask, made: Path):
    """Old and new values, and the settings in the key; of a blocked stage what its settings say already."""
    same = ask("explain", "count", "--json").document
    assert list(same) == [*STAGE, "changes", "settings", "since", "differences", "made"]
    assert (same["state"], same["changes"], same["settings"]) == ("cached", [], {"step": 1})

    changed = ask("explain", "count", "count.step=2", "--json").document
    assert (changed["state"], changed["changes"]) == ("missing", ["step 1 → 2"])

    blocked = ask("explain", "total", "count.step=2", "total.factor=2.0", "--json").document
    assert (blocked["state"], blocked["key"], blocked["needs"]) == ("blocked", None, ["count"])
    assert blocked["changes"] == ["factor 1.0 → 2.0", "input count will change: count.step 1 → 2"]


def test_lineage_goes_back_to_the_first_stage(ask: Ask, made: Path):
    """Each node has the same fields; a stage, a digest's first digits or nothing at all name the last stage."""
    document = ask("lineage", "--json").document
    node, names = document, []
    while True:
        assert list(node) == ["artifact", "stage", "key", "settings", "inputs", "provenance"]
        assert {"host", "seconds", "attempt"} <= set(node["provenance"])
        names.append(node["stage"])
        if not node["inputs"]:
            break
        ((role, node),) = node["inputs"].items()
        names.append(role)
    assert names == ["total", "count", "count", "words", "words"]
    for target in ("total", document["artifact"], document["artifact"][:8], document["key"][:8]):
        assert ask("lineage", target, "--json").document == document
    assert ask("lineage", "count", "--json").document == document["inputs"]["count"]


def test_lineage_ends_where_a_result_came_from_outside(ask: Ask, made: Path, tmp_path: Path):
    """An imported folder is named by its artifact, in the same form."""
    write_model(tmp_path / "model")
    assert ask("import", str(tmp_path / "model"), "--as", "total").status == 0
    document = ask("lineage", "--json").document
    assert document["stage"] == "import"
    origin = document["inputs"]["folder"]
    assert list(origin) == list(document)
    assert (origin["artifact"], origin["stage"], origin["inputs"]) == (document["artifact"], None, {})
    assert "from outside" in ask("lineage").out


def test_verify_counts_reports_and_only_on_request_repairs(ask: Ask, made: Path):
    """Status 1 on damage, and nothing is moved; --repair moves it, and the stage is missing."""
    whole = ask("verify", "--json")
    assert whole.status == 0
    assert list(whole.document) == ["checked", "damaged"]
    assert whole.document["damaged"] == []
    assert whole.document["checked"] == 3 + 3 + 4

    record = planned(made)["count"].record
    assert record is not None
    sha256 = store_of(made).manifest(record.artifact).files[0].sha256
    blob = made.parent / "store" / "blobs" / "sha256" / sha256[:2] / sha256
    blob.chmod(0o644)
    blob.write_text("3")
    for words in (("verify", "--json"), ("verify", "--json"), ("verify", "--repair", "--json")):
        answer = ask(*words)
        assert answer.status == 1
        (damage,) = answer.document["damaged"]
        assert list(damage) == ["artifact", "file", "why"]
        assert (damage["artifact"], damage["file"]) == (record.artifact, f"blobs/sha256/{sha256[:2]}/{sha256}")
        assert "count.json" in damage["why"]
    assert "quarantine" in answer.err
    assert ask("verify").status == 0
    stages = ask("plan", "--json").document["stages"]
    assert [stage["state"] for stage in stages] == ["cached", "missing", "blocked"]


def test_doctor_lists_what_it_looked_at(ask: Ask):
    """Status 0 exactly when everything is well."""
    answer = ask("doctor", "--json")
    checks = answer.document["checks"]
    assert all(list(check) == ["name", "ok", "found", "next"] for check in checks)
    assert answer.status == (0 if all(check["ok"] for check in checks) else 1)


ERRORS = [
    ("plan", "count.stepp=2"),
    ("plan", "nonsense"),
    ("status", "nonsense"),
    ("explain", "nonsense"),
    ("explain",),
    ("lineage", "nonsense"),
    ("lineage",),
    ("verify", "store.uri=gs://bucket"),
    ("doctor", "store.uri=gs://bucket"),
]


@pytest.mark.parametrize("words", ERRORS)
def test_an_error_under_json_is_a_document_too(ask: Ask, words: tuple[str, ...]):
    """One document on standard output whatever happens, and the exit status of the error."""
    answer = ask(*words, "--json")
    assert (answer.status, answer.err) == (2, "")
    assert list(answer.document) == ["error"]
    assert list(answer.document["error"]) == ["what", "where", "next"]
    assert answer.document["error"]["what"]


def test_status_says_how_much_the_store_holds(ask: Ask, made: Path):
    """Equal files take their room once: what the store holds and what it takes are two numbers."""
    make(made, "words.right=otherword")
    usage = ask("status", "--json").document["usage"]
    free = usage.pop("free_bytes")
    assert free > 0
    assert usage == {"artifacts": 4, "file_bytes": 7 + 5 + 1 + 3 + 7 + 9, "blob_bytes": 7 + 5 + 1 + 3 + 9}
    line = ask("status").out.splitlines()[-1]
    assert line.startswith("store: 4 artifacts, 32 bytes of files in 25 bytes of blobs, ")
    assert line.endswith(" free")


def test_gc_says_what_goes_and_what_stays(ask: Ask, made: Path):
    """First without doing it; a researcher's earlier rerun stays for two weeks, and the latest results for ever."""
    make(made, "total.factor=2")
    young = ask("gc", "--json").document
    assert list(young) == ["dry_run", "grace_hours", "removed", "results", "kept"]
    assert (young["grace_hours"], young["results"]) == (336, [])
    assert {kind for kind, heap in young["removed"].items() if heap["files"]} == {"attempts"}  # their scratch
    assert young["kept"] == {
        "results": 4,
        "young": 1,
        "blobs": {"files": 5, "bytes": 7 + 5 + 1 + 3 + 3},
        "pipelines": {"toy": ["count", "total", "words"]},
    }
    assert "nothing" in ask("gc").out
    said, planned_ = (ask("gc", "--dry-run", "--grace", "0", "--json").document for _ in range(2))
    done = ask("gc", "--grace", "0", "--json").document
    assert said == planned_ == done | {"dry_run": True}
    assert [one["stage"] for one in done["results"]] == ["total"]
    assert done["removed"]["blobs"] == {"files": 1, "bytes": 3}
    assert done["kept"]["results"] == 3
    assert set(states(planned(made, "total.factor=2")).values()) == {"cached"}
    assert ask("verify").status == 0


def test_gc_in_words(ask: Ask, made: Path):
    """A line for each kind of thing that goes, the stages concerned, and who needs what stays."""
    make(made, "total.factor=2")
    lines = ask("gc", "--grace", "0", "--dry-run").out.splitlines()
    assert lines[0].strip() == "would remove"
    told = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in lines[1:]}
    assert told["results"] == "1: total 1"
    assert told["blobs"] == "1 file, 3 bytes"
    assert told["stays"] == "3 results, 16 bytes of blobs"
    assert told["needed by"] == "toy: count, total, words"
    assert ask("gc", "--grace", "0").out.splitlines()[0].strip() == "removed"
    assert ask("gc", "--grace", "-1").status == 2
