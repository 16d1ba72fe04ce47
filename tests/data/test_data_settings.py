from pathlib import Path

import pytest
from pydantic import ValidationError

from rlhf.config.base import semantic_values
from rlhf.config.data import SNIPPET_BLOCKS, DataSettings, HeldoutSettings, SnippetSettings, is_local, sources
from rlhf.errors import SettingsError

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file, a folder, and a folder named like a built-in word."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text("{}\n")
    (tmp_path / "team" / "set").mkdir(parents=True)
    (tmp_path / "movie-snippets").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("mine.jsonl", True),
        ("team/set", True),
        ("missing.parquet", True),
        ("./missing", True),
        ("~/missing", True),
        ("/missing", True),
        ("movie-snippets", False),
        ("./movie-snippets", True),
        ("scratch", False),
        (f"team/other@{REVISION}", False),
    ],
)
def test_a_source_is_a_path_when_it_is_there_or_can_be_nothing_else(folder: Path, name: str, local: bool) -> None:
    """A folder that happens to be named like a built-in word must not change what the word means."""
    assert is_local(name) is local


def test_moving_a_file_changes_no_semantic_value_and_repinning_a_dataset_does(folder: Path) -> None:
    """Paths stay out of keys; the words and pinned names go in."""
    (folder / "moved.jsonl").write_text("{}\n")

    def values(name: str) -> dict[str, object]:
        return semantic_values(DataSettings(prompts=name))

    assert values("mine.jsonl") == values(str(folder / "moved.jsonl"))
    assert values("mine.jsonl")["prompts"] == "file"
    assert values("movie-snippets")["prompts"] == "movie-snippets"
    assert values(f"a/b@{REVISION}")["prompts"] == f"a/b@{REVISION}"
    assert semantic_values(DataSettings(judge=None))["judge"] is None
    assert "downloads" not in values("movie-snippets")


def test_the_local_sources_are_those_whose_content_a_key_needs(folder: Path) -> None:
    """Every path is listed by field, and nothing else; one that is not there is named by its setting."""
    settings = DataSettings(demonstrations="mine.jsonl", comparisons="team/set", prompts=f"a/b@{REVISION}", judge=None)
    assert sources(settings) == {"demonstrations": Path("mine.jsonl"), "comparisons": Path("team/set")}
    heldout = {"demonstrations": "team/set", "comparisons": f"a/b@{REVISION}#test"}
    mine = DataSettings(
        demonstrations="mine.jsonl", comparisons=f"a/b@{REVISION}", judge=None, heldout=HeldoutSettings(**heldout)
    )
    assert sources(mine) == {"demonstrations": Path("mine.jsonl"), "heldout.demonstrations": Path("team/set")}
    assert semantic_values(mine)["heldout"] == {
        "demonstrations": "file",
        "comparisons": f"a/b@{REVISION}#test",
        "prompts": None,
    }
    for settings, where in (
        (DataSettings(prompts="missing.jsonl"), "data.prompts"),
        (DataSettings(prompts="mine.jsonl", heldout=HeldoutSettings(prompts="missing.jsonl")), "data.heldout.prompts"),
    ):
        with pytest.raises(SettingsError) as caught:
            sources(settings)
        assert caught.value.where == where


def test_records_to_hold_out_are_for_sources_of_ones_own(folder: Path) -> None:
    """The movie snippets are dealt out in blocks already, and a name that could change is refused there too."""
    with pytest.raises(ValidationError, match=r"heldout\.prompts is for prompts of your own"):
        DataSettings(heldout=HeldoutSettings(prompts="mine.jsonl"))
    with pytest.raises(ValidationError, match="40 hexadecimal digits"):
        DataSettings(prompts="mine.jsonl", heldout=HeldoutSettings(prompts="a/b"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a/b", "40 hexadecimal digits"),
        ("a/b@main", "Files and versions"),
        (f"a/b@{REVISION[:-1]}", "40 hexadecimal digits"),
        ("scratch", "names a model, not data"),
    ],
)
def test_a_dataset_that_could_change_is_refused_with_how_to_pin_it(folder: Path, name: str, reason: str) -> None:
    """A hub name without a full commit would make a key that means something else tomorrow."""
    with pytest.raises(ValidationError, match=reason):
        DataSettings(comparisons=name)


def test_comparisons_alone_are_taken_for_comparisons_alone() -> None:
    """There are no prompts in them to be continued."""
    assert DataSettings(comparisons="other-snippets").comparisons == "other-snippets"
    with pytest.raises(ValidationError, match="are comparisons, and no prompts"):
        DataSettings(prompts="other-snippets")


def test_more_blocks_than_there_are_are_refused() -> None:
    """The default deal fits, all blocks may be dealt out, and one too many is told with both numbers."""
    defaults = SnippetSettings()
    deal = [name for name in SnippetSettings.model_fields if name != "set_size"]
    spare = SNIPPET_BLOCKS - sum(getattr(defaults, name) for name in deal)
    assert SnippetSettings(comparisons=defaults.comparisons + spare)
    with pytest.raises(ValidationError, match=r"354 blocks are asked for, and the movie snippets have 353"):
        SnippetSettings(comparisons=defaults.comparisons + spare + 1)


def test_what_names_no_mixture_is_refused_by_name(folder: Path) -> None:
    """Each with the task or the setting that is wrong."""
    one, two = {"source": "mine.jsonl"}, {"source": "team"}
    for prompts, heldout, reason in (
        ({}, None, "names no task"),
        ({"a b": one}, None, "'a b' is none"),
        ({"a": one, "b": {"source": "./mine.jsonl"}}, None, "tasks a and b would read the same records"),
        ({"a": {"source": "team/set"}, "b": two}, None, "tasks a and b would read the same records"),
        ({"a": one, "b": {"source": "scratch"}}, None, "names a model, not data"),
        ({"a": one | {"weight": 0}}, None, "greater than 0"),
        ({"a": one, "b": two}, "team", r"heldout\.prompts is one source, and prompts has tasks: .* a, b"),
        ({"a": one, "b": two}, {"a": "x.jsonl"}, r"heldout\.prompts lacks the task b, which prompts has"),
        ({"a": one}, {"a": "x.jsonl", "c": "y.jsonl"}, r"heldout\.prompts has the task c, which prompts has not"),
        ("mine.jsonl", {"a": "x.jsonl"}, r"heldout\.prompts names the tasks a, and prompts is one source"),
        ({"a": {"source": "movie-snippets"}}, {"a": "x.jsonl"}, r"heldout\.prompts\.a is for prompts of your own"),
    ):
        with pytest.raises(ValidationError, match=reason):
            DataSettings.model_validate({"prompts": prompts, "heldout": {"prompts": heldout}})


def test_names_weights_and_contents_of_tasks_enter_the_key_and_paths_do_not(folder: Path) -> None:
    """A missing file is named by its task."""

    def values(**tasks: dict[str, object]) -> object:
        return semantic_values(DataSettings.model_validate({"prompts": tasks}))["prompts"]

    assert values(a={"source": "mine.jsonl", "weight": 2}) == {"a": {"source": "file", "weight": 2.0}}
    assert values(a={"source": "mine.jsonl"}) == values(a={"source": "team/set"})
    tasks = {"a": {"source": "mine.jsonl"}, "b": {"source": "missing.jsonl"}}
    settings = DataSettings.model_validate({"prompts": {"a": tasks["a"]}, "heldout": {"prompts": {"a": "team"}}})
    assert sources(settings) == {"prompts.a": Path("mine.jsonl"), "heldout.prompts.a": Path("team")}
    with pytest.raises(SettingsError) as caught:
        sources(DataSettings.model_validate({"prompts": tasks}))
    assert caught.value.where == "data.prompts.b"
