import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.base import Settings, runtime
from rlhf.errors import RequestError, SettingsError
from rlhf.pipeline.differences import flatten
from rlhf.pipeline.plan import plan
from rlhf.pipeline.stage import taking
from rlhf.store import Store
from tests.pipeline.helpers import load_toy, make, planned, states, write_pipeline
from tests.pipeline.toys import KNOWN


class WorkersByNumber(Settings):
    """Workers that are not those of a worker group."""

    workers: int = runtime(2)
    """How many."""


CACHED = {"words": "cached", "count": "cached", "total": "cached"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A pipeline whose three stages have results."""
    path = write_pipeline(tmp_path)
    make(path)
    return path


def keys(path: Path, *overrides: str) -> dict[str, str | None]:
    return {name: one.key for name, one in planned(path, *overrides).items()}


def test_in_an_empty_store_the_first_stage_is_missing_and_the_rest_is_blocked(tmp_path: Path):
    """A blocked stage has no key, and names the stages whose results it waits for."""
    found = planned(write_pipeline(tmp_path))
    assert states(found) == {"words": "missing", "count": "blocked", "total": "blocked"}
    assert found["words"].key is not None
    assert found["words"].why == "new"
    assert (found["count"].key, found["count"].needs) == (None, ("words",))
    assert (found["total"].key, found["total"].needs) == (None, ("count",))
    assert "words" in found["count"].why
    assert not (tmp_path / "store").exists(), "planning made a store"


def test_what_was_made_is_cached(path: Path):
    """The same request again is nothing but hits."""
    assert states(planned(path)) == CACHED


@pytest.mark.parametrize(
    "override",
    [
        "words.label=other",
        "words.style.verbose=true",
        "total.behaviour=raises",
        "total.gate=/somewhere",
        "cluster.cpus=1",
        "cluster.max_failures=0",
        "tracking.wandb=disabled",
        "pipeline=renamed",
    ],
)
def test_a_runtime_setting_changes_no_key(path: Path, override: str):
    """Where and how a stage runs is no part of what it makes."""
    assert keys(path, override) == keys(path)
    assert states(planned(path, override)) == CACHED


def test_moving_the_store_or_renaming_the_file_changes_no_key(path: Path, tmp_path: Path):
    """A hit stays a hit wherever the store lies and whatever the pipeline file is called."""
    before = keys(path)
    shutil.move(tmp_path / "store", tmp_path / "elsewhere")
    renamed = path.rename(tmp_path / "other.yaml")
    override = f"store.uri={tmp_path / 'elsewhere'}"
    assert keys(renamed, override) == before
    assert states(planned(renamed, override)) == CACHED


@pytest.mark.parametrize(
    ("override", "expected", "why"),
    [
        ("words.left=one two three", ("missing", "blocked", "blocked"), "left one two → one two three"),
        ("words.style.upper=true", ("missing", "blocked", "blocked"), "style.upper false → true"),
        ("words.seed=5", ("missing", "blocked", "blocked"), "seed 0 → 5"),
        ("seed=5", ("missing", "blocked", "blocked"), "seed 0 → 5"),
        ("count.step=2", ("cached", "missing", "blocked"), "step 1 → 2"),
        ("total.factor=2.5", ("cached", "cached", "missing"), "factor 1.0 → 2.5"),
    ],
)
def test_a_semantic_setting_changes_its_stage_and_what_is_downstream_of_it(
    path: Path, override: str, expected: tuple[str, ...], why: str
):
    """Nothing upstream is touched, and ``why`` names the changed setting, old → new."""
    found = planned(path, override)
    assert tuple(states(found).values()) == expected
    changed = next(one for one in found.values() if one.state == "missing")
    assert changed.why == why
    assert changed.key not in keys(path).values()
    assert states(planned(path)) == CACHED, "going back is a hit again"


def test_a_changed_field_is_named_wherever_it_is_nested():
    """In sections, and in lists of sections; a list of plain values is one value."""
    settings = {"kl": {"coef": 0.1}, "rewards": [{"model": "rm", "weight": 1.0}, {"model": "b"}], "names": ["a"]}
    assert flatten(settings | {"seed": 0, "none": []}) == {
        "kl.coef": 0.1,
        "rewards[0].model": "rm",
        "rewards[0].weight": 1.0,
        "rewards[1].model": "b",
        "names": ["a"],
        "seed": 0,
        "none": [],
    }


def test_a_stage_of_a_new_version_runs_again(path: Path):
    """A result of an older version of the code is no hit."""
    known = KNOWN | {"count": replace(KNOWN["count"], version=2)}
    found = planned(path, known=known)
    assert states(found) == {"words": "cached", "count": "missing", "total": "blocked"}
    assert found["count"].why == "stage count version 1 → count version 2"


def test_a_source_enters_the_key_by_its_content_and_not_by_its_place(tmp_path: Path):
    """Moving or renaming a file is a hit; one changed byte is a miss, also with the file's size and time unchanged."""
    path, source = write_pipeline(tmp_path), tmp_path / "a.txt"
    source.write_text("alpha")
    make(path, f"words.file={source}")
    (tmp_path / "sub").mkdir()
    moved = source.rename(tmp_path / "sub" / "b.jsonl")
    assert states(planned(path, f"words.file={moved}")) == CACHED

    shutil.copyfile(moved, source)
    assert states(planned(path, f"words.file={source}")) == CACHED
    times = source.stat()
    source.write_text("alphA")
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    found = planned(path, f"words.file={source}")
    assert found["words"].state == "missing"
    assert found["words"].why.startswith("content of file ")


def test_a_source_folder_is_known_by_its_files_and_their_names(tmp_path: Path):
    """Hidden files do not count; a renamed, added or changed file does."""
    path, folder = write_pipeline(tmp_path), tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("alpha")

    def key() -> str | None:
        return planned(path, f"words.file={folder}")["words"].key

    before = key()
    (folder / ".hidden").write_text("x")
    assert key() == before
    (folder / "b.txt").write_text("beta")
    added = key()
    assert added != before
    (folder / "b.txt").rename(folder / "c.txt")
    assert key() not in (before, added)


def test_a_source_without_files_is_refused(tmp_path: Path):
    """Nothing is read from it: a pipe, which is not waited for, a device, and a folder with hidden files alone."""
    path, folder, pipe = write_pipeline(tmp_path), tmp_path / "folder", tmp_path / "pipe"
    folder.mkdir()
    (folder / ".hidden").write_text("x")
    os.mkfifo(pipe)
    for source, reason in ((pipe, "neither a file nor a folder"), ("/dev/zero", "neither"), (folder, "is empty")):
        with pytest.raises(SettingsError, match=reason):
            planned(path, f"words.file={source}")


def test_a_damaged_memory_of_sources_costs_reading_and_nothing_else(tmp_path: Path):
    """The digests that the store remembers are a cache: cut short, they are made again."""
    path, source = write_pipeline(tmp_path), tmp_path / "a.txt"
    source.write_text("alpha")
    make(path, f"words.file={source}")
    before = keys(path, f"words.file={source}")
    memory = tmp_path / "store" / "cache" / "sources.json"
    if not memory.exists():
        memory.parent.mkdir(exist_ok=True)
    memory.write_text('{"half')
    assert keys(path, f"words.file={source}") == before


def test_an_equal_result_of_a_changed_stage_stops_the_change_there(path: Path):
    """Early cut-off: count runs on other words, finds as many, and total stays cached."""
    override = "words.left=five six"
    make(path, override, only="words")
    assert states(planned(path, override)) == {"words": "cached", "count": "missing", "total": "blocked"}
    assert planned(path, override)["count"].why == "input words changed"
    make(path, override, only="count")
    assert states(planned(path, override)) == CACHED


def test_a_stage_that_reads_one_folder_is_not_rerun_for_another(path: Path):
    """count reads words/left alone: another words/right leaves it cached."""
    override = "words.right=other"
    make(path, override, only="words")
    assert states(planned(path, override)) == CACHED


def test_a_stage_may_be_used_twice(tmp_path: Path):
    """Instances are told apart by name; equal ones share a result, and each reads what it is wired to."""
    more = "more: {uses: words, left: a b c}\nagain: {uses: words}\ntally: {uses: count, inputs: {words: more/left}}\n"
    path = write_pipeline(tmp_path, "words: {}\ncount: {}\n" + more)
    make(path)
    found = planned(path)
    assert set(states(found).values()) == {"cached"}
    assert found["again"].key == found["words"].key
    assert found["more"].key != found["words"].key
    records = {name: one.record for name, one in found.items()}
    assert records["count"] is not None
    assert records["tally"] is not None
    assert records["count"].metrics == {"count/words": 2.0}
    assert records["tally"].metrics == {"count/words": 3.0}


def test_targets_bring_what_they_need_and_no_more(path: Path):
    """The needed stages come producers first; without a target all of them."""
    assert list(planned(path, targets=["count"])) == ["words", "count"]
    assert list(planned(path)) == ["words", "count", "total"]


def test_a_pipeline_names_what_a_run_without_names_brings_up_to_date(tmp_path: Path):
    """So that one file may hold several last stages."""
    sections = "words: {}\ncount: {}\nother: {uses: count}\ntotal: {}\n"
    path = write_pipeline(tmp_path, sections + "targets: [total]\n")
    assert "other" not in planned(path)
    assert list(planned(path, targets=["other"])) == ["words", "other"]
    assert "other" in planned(write_pipeline(tmp_path, sections))


DIAMOND = """
words: {}
count: {}
total: {}
more: {uses: words, left: a b c}
tally: {uses: count, inputs: {words: more/left}}
sum: {uses: total, inputs: {count: tally}}
last: {uses: group, inputs: {policy: sum}}
"""


def pin(path: Path, *names: str):
    """Make stages imported, as ``rlhf import`` does, with results that were made elsewhere."""
    elsewhere = write_pipeline(path.parent, DIAMOND.split("last:")[0], "elsewhere.yaml")
    make(elsewhere)
    store = Store.open(path.parent / "store")
    for name in names:
        store.set_ref("toy", name, store.refs("elsewhere")[name].key, imported=True)


def test_nothing_runs_for_imported_stages(tmp_path: Path):
    """What only they read is unused, with or without targets, however far up; the rest of the pipeline is planned."""
    path = write_pipeline(tmp_path, DIAMOND)
    pin(path, "sum")
    cut = {"more": "unused", "tally": "unused", "sum": "cached"}
    assert states(planned(path, targets=["last"])) == cut | {"last": "missing"}
    assert states(planned(path, targets=["sum"])) == cut
    override = "words.left=not made yet"
    found = planned(path, override)
    whole = cut | {"words": "missing", "count": "blocked", "total": "blocked", "last": "missing"}
    assert states(found) == whole
    assert (found["more"].why, found["more"].key) == ("not needed: sum is imported", None)
    assert planned(path, override, targets=["tally"])["more"].state == "cached", "a target is needed"


def test_a_stage_that_anything_else_reads_is_not_unused(tmp_path: Path):
    """Two readers, of which one is imported."""
    path = write_pipeline(tmp_path, "words: {}\ncount: {}\ntotal: {}\nagain: {uses: total}\n")
    pin(path, "total")
    override = "words.left=not made yet"
    found = planned(path, override, targets=["total", "again"])
    assert states(found) == {"words": "missing", "count": "blocked", "total": "cached", "again": "blocked"}
    assert states(planned(path, override, targets=["total"]))["words"] == "unused"


def test_of_an_unused_stage_nothing_is_looked_at(tmp_path: Path):
    """A source that is gone is no obstacle where nothing needs it."""
    path = write_pipeline(tmp_path)
    pin(path, "total")
    override = f"words.file={tmp_path / 'gone'}"
    assert states(planned(path, override)) == {"words": "unused", "count": "unused", "total": "cached"}
    with pytest.raises(SettingsError, match="gone"):
        planned(path, override, targets=["count"])


def test_the_plan_has_producers_first_whatever_the_files_order(tmp_path: Path):
    """A section may stand before what it needs."""
    found = planned(write_pipeline(tmp_path, "total: {}\ncount: {}\nwords: {}\n"))
    assert list(found) == ["words", "count", "total"]


def test_an_unknown_target_is_answered_with_the_nearest(path: Path):
    """A misspelt stage is no request for nothing."""
    with pytest.raises(RequestError, match="no stage 'totl'") as caught:
        planned(path, targets=["totl"])
    assert "did you mean total?" in caught.value.next_step


def test_a_stage_that_the_file_lacks_is_to_be_added(tmp_path: Path):
    """It is known, so that nothing else was meant."""
    path = write_pipeline(tmp_path, "words: {}\n")
    with pytest.raises(RequestError, match="no stage 'count'") as caught:
        planned(path, targets=["count"])
    assert caught.value.next_step == f"add `count: {{}}` to {path}; `rlhf config --fields count` explains its settings"


def test_wires_that_lead_nowhere_are_refused(tmp_path: Path):
    """An unknown role, an unknown instance and a producer that is not there are errors with a place and a way out."""
    path = write_pipeline(tmp_path, "words: {}\ncount: {inputs: {wrds: words}}\n")
    with pytest.raises(SettingsError, match="takes no input 'wrds'") as caught:
        planned(path)
    assert "did you mean words?" in caught.value.next_step

    path = write_pipeline(tmp_path, "words: {}\ncount: {inputs: {words: wodrs/left}}\n")
    with pytest.raises(SettingsError, match="'wodrs'") as caught:
        planned(path)
    assert f"{path}:3" in str(caught.value)
    assert "did you mean words?" in str(caught.value)

    path = write_pipeline(tmp_path, "count: {}\n")
    with pytest.raises(SettingsError, match="needs 'words' as its words") as caught:
        planned(path)
    assert f"add `words: {{}}` to {path}; " in caught.value.next_step
    assert "count.inputs.words" in caught.value.next_step


@pytest.mark.parametrize(
    ("wire", "said"), [("words", ""), ("other", "other is a policy"), ("count/part", "count/part is")]
)
def test_an_input_of_another_kind_is_refused(tmp_path: Path, wire: str, said: str):
    """A whole artifact of a kind that the role takes, and nothing else, before anything runs."""
    text = f"words: {{}}\ncount: {{}}\ntotal: {{inputs: {{count: {wire}}}}}\nother: {{uses: total}}\n"
    path = write_pipeline(tmp_path, text)
    if not said:
        assert planned(path)["total"].needs == ("words",)
        return
    with pytest.raises(SettingsError, match=f"{said}.*total takes a data as its count") as caught:
        planned(path)
    assert caught.value.where.endswith("total.inputs.count")


def test_a_circle_of_stages_is_refused_and_shown(tmp_path: Path):
    """Stages that need each other are named in their circle."""
    known = KNOWN | {"words": replace(KNOWN["words"], inputs=taking(seed="total"))}
    with pytest.raises(SettingsError, match="circle") as caught:
        planned(write_pipeline(tmp_path), known=known)
    assert {"words", "count", "total"} <= set(caught.value.what.replace("→", " ").split())


def test_a_folder_that_an_artifact_does_not_have_is_refused(tmp_path: Path):
    """What folders there are is known once the artifact is there; then they are listed."""
    make(write_pipeline(tmp_path, "words: {}\n"))
    path = write_pipeline(tmp_path, "words: {}\ncount: {inputs: {words: words/middle}}\n")
    with pytest.raises(SettingsError, match="no folder 'middle'") as caught:
        planned(path)
    assert caught.value.where == "count.inputs.words"
    assert "left, right" in caught.value.next_step


def test_a_damaged_result_is_missing_and_the_user_is_told(path: Path, tmp_path: Path):
    """A result whose file was changed by hand is no hit: it is moved away, and named."""
    record = planned(path)["count"].record
    assert record is not None
    store = Store.open(tmp_path / "store")
    sha256 = store.manifest(record.artifact).files[0].sha256
    blob = tmp_path / "store" / "blobs" / "sha256" / sha256[:2] / sha256
    blob.chmod(0o644)
    blob.write_text("9")
    found = plan(load_toy(path), KNOWN, store)
    assert states(found) == {"words": "cached", "count": "missing", "total": "blocked"}
    assert found["count"].why == "its result was damaged"
    assert len(store.notices) == 1
    assert "quarantine" in store.notices[0]
    assert planned(path)["count"].why == "its latest result was damaged, and is in quarantine"
    make(path)
    assert states(planned(path)) == CACHED


@pytest.mark.parametrize(
    ("declared", "said", "written"),
    [
        ({"inputs": {"prompts": "data/prompts"}}, "inputs of the stage count is no function", "inputs=taking(ROLE="),
        ({"runs": "workers"}, 'the stage count runs="workers", and its settings have no workers', "ShardedSettings"),
        ({"runs": "workers", "settings": WorkersByNumber}, "settings have no workers: WorkerSettings", "inherit"),
    ],
)
def test_a_stage_that_could_not_run_is_refused_as_it_is_declared(declared: Any, said: str, written: str):
    """With its name and what to write instead."""
    with pytest.raises(RequestError, match=said) as error:
        replace(KNOWN["count"], **declared)
    assert written in error.value.next_step
