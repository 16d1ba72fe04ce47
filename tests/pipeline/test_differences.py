"""Why a stage would run again: every cause is named, old → new, also one that lies stages before it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.pipeline.differences import changed_settings
from rlhf.pipeline.documents import explain_document
from rlhf.pipeline.plan import plan
from rlhf.pipeline.stage import taking
from rlhf.pipeline.transfer import import_folder
from rlhf.store import Store
from tests.pipeline.helpers import load_toy, make, write_model, write_pipeline
from tests.pipeline.toys import KNOWN


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A pipeline whose three stages have results."""
    path = write_pipeline(tmp_path)
    make(path)
    return path


def explained(path: Path, stage: str, *overrides: str, known: Any = KNOWN) -> Any:
    config = load_toy(path, *overrides)
    store = Store.open(config.store.uri)
    planned = plan(config, known, store)
    return explain_document(planned[stage], planned, store)


def causes(path: Path, stage: str, *overrides: str, known: Any = KNOWN) -> list[str]:
    return explained(path, stage, *overrides, known=known)["changes"]


def settings_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [one.phrase for one in changed_settings(("s", 1, old), ("s", 1, new))]


def test_settings_are_compared_wherever_they_are_nested():
    """In sections and in lists of sections; a list of plain values is one value."""
    old = {"kl": {"coef": 0.05}, "rewards": [{"model": "rm", "weight": 1.0}], "names": ["a"], "same": {"x": [1]}}
    new = {"kl": {"coef": 0.1}, "rewards": [{"model": "rm", "weight": 2.0}, {"model": "b"}], "names": ["a", "b"]}
    assert settings_differences(old, new | {"same": {"x": [1]}}) == [
        "kl.coef 0.05 → 0.1",
        'names ["a"] → ["a", "b"]',
        "rewards[0].weight 1.0 → 2.0",
        "rewards[1].model absent → b",
    ]


@pytest.mark.parametrize(
    ("old", "new", "phrase"),
    [
        ({}, {"a": None}, "a absent → null"),
        ({"a": None}, {}, "a null → absent"),
        ({"a": 1}, {"a": True}, "a 1 → true"),
        ({"a": 1}, {"a": 1.0}, "a 1 → 1.0"),
        ({"a": {}}, {"a": None}, "a {} → null"),
        ({"a": [1]}, {"a": [True]}, "a [1] → [true]"),
    ],
)
def test_what_are_two_values_in_a_key_is_a_difference(old: dict[str, Any], new: dict[str, Any], phrase: str):
    """A setting that came with a default of null makes another key, as does a number of another type."""
    assert settings_differences(old, new) == [phrase]


def test_a_section_of_another_method_is_one_difference():
    """Both sides whole, the method first: most settings of one method have no counterpart in the other."""
    lora = {"alpha": 32.0, "dropout": 0.0, "init": "zero", "merge": False, "method": "lora", "rank": 16}
    sides = {"tuning": lora, "seed": 0}, {"tuning": {"blocks": 2, "method": "top"}, "seed": 1}
    assert settings_differences(*sides) == [
        "seed 0 → 1",
        "tuning {method: lora, alpha: 32.0, dropout: 0.0, init: zero, merge:…} → {method: top, blocks: 2}",
    ]
    (_, whole) = changed_settings(("s", 1, sides[0]), ("s", 1, sides[1]))
    assert whole.to_json() | {"what": ""} == {
        "what": "",
        "kind": "setting",
        "name": "tuning",
        "old": lora,
        "new": {"method": "top", "blocks": 2},
    }
    assert settings_differences({"tuning": lora}, {"tuning": lora | {"rank": 8}}) == ["tuning.rank 16 → 8"]
    before = {"method": "full", "lora": None}
    assert settings_differences(before, {"method": "full", "tuning": {"method": "full"}}) == [
        "lora null → absent",
        "tuning absent → {method: full}",
    ]


def test_a_changed_input_leads_to_the_setting_behind_it(path: Path):
    """Through stages that are made already and through stages that are not, with the changed stage's name."""
    override = "words.left=one two three"
    behind = "words.left one two → one two three"
    assert causes(path, "count", override) == [f"input words will change: {behind}"]
    assert causes(path, "total", override) == [f"input count will change: {behind}"]
    make(path, override, only="words")
    assert causes(path, "count", override) == [f"input words changed: {behind}"]
    (count,) = explained(path, "total", override)["differences"]
    assert (count["kind"], count["name"], count["stage"]) == ("input", "count", "count")
    (words,) = count["differences"]
    assert (words["kind"], words["name"], words["stage"]) == ("input", "words", "words")
    (left,) = words["differences"]
    assert (left["kind"], left["name"], left["old"], left["new"]) == ("setting", "left", "one two", "one two three")


def test_an_input_that_came_out_as_before_is_no_cause(path: Path):
    """count reads words/left alone: another words/right is known not to matter once it is made."""
    make(path, "words.right=other", only="words")
    assert causes(path, "count", "words.right=other") == []


def test_a_changed_file_is_named_by_the_setting_that_names_it(tmp_path: Path):
    """By the digests of its content, since the path is no part of a key."""
    path, file = write_pipeline(tmp_path), tmp_path / "rows.jsonl"
    file.write_text("alpha")
    make(path, f"words.file={file}")
    file.write_text("beta")
    (behind,) = causes(path, "total", f"words.file={file}")
    assert behind.startswith("input count will change: words: content of file ")
    assert behind.count("…") == 2


def test_a_new_version_of_a_stage_is_a_cause(path: Path):
    """Its own, and behind an input."""
    known = KNOWN | {"count": replace(KNOWN["count"], version=2)}
    assert causes(path, "count", known=known) == ["stage count version 1 → count version 2"]
    assert causes(path, "total", known=known) == [
        "input count will change: count: stage count version 1 → count version 2"
    ]


def test_a_first_run_has_nothing_to_be_compared_with(tmp_path: Path):
    """It is new, and no setting is called changed."""
    document = explained(write_pipeline(tmp_path), "words")
    assert (document["why"], document["changes"], document["since"], document["made"]) == ("new", [], None, None)


def test_a_damaged_result_is_called_damaged_until_it_is_made_again(path: Path, tmp_path: Path):
    """Also by the commands after the one that found the damage and moved it away."""
    store = Store.open(tmp_path / "store")
    record = plan(load_toy(path), KNOWN, store)["count"].record
    assert record is not None
    sha256 = store.manifest(record.artifact).files[0].sha256
    blob = tmp_path / "store" / "blobs" / "sha256" / sha256[:2] / sha256
    blob.chmod(0o644)
    blob.write_text("9")
    assert explained(path, "count")["why"] == "its result was damaged"
    assert explained(path, "count")["why"] == "its latest result was damaged, and is in quarantine"
    make(path)
    assert explained(path, "count")["why"] == "unchanged"


def test_an_import_is_a_cause_downstream(path: Path, tmp_path: Path):
    """The stage after an imported one would run on another's work: it says which artifact took the place."""
    known = KNOWN | {
        "count": replace(KNOWN["count"], kind="policy"),
        "total": replace(KNOWN["total"], inputs=taking(count="count")),
    }
    folder = write_model(tmp_path / "model")
    (folder / "count.json").write_text("1")
    config, store = load_toy(path), Store.open(tmp_path / "store")
    made = plan(config, known, store)["count"].record
    assert made is not None
    record = import_folder(folder, config, "count", known["count"], store)
    assert causes(path, "total", known=known) == [
        f"input count changed: count: made by its stage ({made.artifact[:8]}…) → imported ({record.artifact[:8]}…)"
    ]
    assert explained(path, "count", known=known)["why"] == "imported"
    assert causes(path, "count", known=known) == []
