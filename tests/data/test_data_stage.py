import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.attempt.context import Context
from rlhf.config.data import DataSettings
from rlhf.data.downloads import MOVIE_SNIPPETS_SDIST
from rlhf.data.records import ComparisonSet, Demonstration, JudgeRating, Prompt, read_jsonl
from rlhf.errors import RecordError
from rlhf.stages.data import run


def context_for(folder: Path, **settings: Any) -> Context[DataSettings]:
    for name in ("output", "attempt"):
        (folder / name).mkdir(parents=True)
    return Context(
        stage="data",
        key="0" * 64,
        settings=DataSettings(**settings),
        inputs={},
        output=folder / "output",
        attempt=folder / "attempt",
        cache=folder / "cache",
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def notes_of(context: Context[DataSettings]) -> list[str]:
    return context.folder.notes()


def own_sources(folder: Path) -> dict[str, str]:
    rows: dict[str, list[Any]] = {
        "demonstrations": [{"prompt": f"p{n}", "completion": "c"} for n in range(20)],
        "comparisons": [{"prompt": f"p{n % 10}", "chosen": "a", "rejected": "b"} for n in range(20)],
        "prompts": [{"prompt": [{"role": "user", "content": f"p{n}"}]} for n in range(20)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for kind, values in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    return {kind: str(folder / f"{kind}.jsonl") for kind in rows}


def test_the_movie_snippets_become_every_folder_that_later_stages_read(tmp_path: Path, sdist: Path) -> None:
    """The metrics count the rows of each file, every row is a valid record, and the origin is on record."""
    context = context_for(tmp_path, downloads=sdist.parent)
    metrics = run(context)
    models = {"demonstrations": Demonstration, "comparisons": ComparisonSet, "prompts": Prompt, "judge": JudgeRating}
    assert metrics.pop("demonstrations/heldout_seen") == metrics.pop("prompts/heldout_seen") == 0
    for name, count in metrics.items():
        records = list(read_jsonl(context.output / f"{name}.jsonl", models[name.split("/")[0]]))
        assert len(records) == count > 0, name
    assert set(files_of(context.output)) == {*(f"{name}.jsonl" for name in metrics), "sources/sources.json"}
    origins = json.loads((context.output / "sources" / "sources.json").read_text())
    assert origins["judge"]["source"] == "movie-snippets"
    assert origins["judge"]["rows"] == {"judge/ratings": metrics["judge/ratings"]}
    assert origins["comparisons"]["file"]["sha256"] == MOVIE_SNIPPETS_SDIST.sha256
    assert origins["comparisons"]["file"]["licence"] == "MIT"
    assert "Hutto" in origins["comparisons"]["file"]["citation"]


def test_the_other_snippets_are_comparisons_of_two_pools(tmp_path: Path, sdist: Path) -> None:
    """All 8,898 but for a few, in sets of five rated by twenty; a twentieth held out, and none in both parts."""
    context = context_for(tmp_path, downloads=sdist.parent, comparisons="other-snippets")
    metrics = run(context)
    parts = {
        part: list(read_jsonl(context.output / "comparisons" / f"{part}.jsonl", ComparisonSet))
        for part in ("train", "heldout")
    }
    every = [one for part in parts.values() for one in part]
    assert metrics["comparisons/train"] == len(parts["train"])
    assert len(parts["heldout"]) == round(0.05 * len(every))
    assert sum(len(one.responses) for one in every) == pytest.approx(8898, abs=10)
    assert len({str(one.prompt) for one in every}) == 2
    assert all(one.annotators is None and one.ratings and len(one.ratings[0]) == 20 for one in every)
    assert not {tuple(one.responses) for one in parts["train"]} & {tuple(one.responses) for one in parts["heldout"]}
    origins = json.loads((context.output / "sources" / "sources.json").read_text())
    assert origins["comparisons"]["source"] == "other-snippets"
    assert origins["comparisons"]["file"]["sha256"] == MOVIE_SNIPPETS_SDIST.sha256


def test_the_same_settings_write_the_same_bytes(tmp_path: Path, sdist: Path) -> None:
    """A stage's result is a function of what it was given, wherever it runs."""
    for name in ("a", "b"):
        run(context_for(tmp_path / name, downloads=sdist.parent))
    assert files_of(tmp_path / "a" / "output") == files_of(tmp_path / "b" / "output")


def test_own_sources_need_no_network_and_leave_no_path_in_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of the user's own are split by prompt; the same content elsewhere gives the same artifact."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("a", "b"):
        context = context_for(
            tmp_path / name, judge=None, heldout_fraction=0.1, **own_sources(tmp_path / f"own-{name}")
        )
        assert run(context) == {
            "demonstrations/train": 18,
            "demonstrations/heldout": 2,
            "comparisons/train": 18,
            "comparisons/heldout": 2,
            "prompts/train": 18,
            "prompts/heldout": 2,
            "demonstrations/heldout_seen": 0,
            "prompts/heldout_seen": 0,
        }
    assert files_of(tmp_path / "a" / "output") == files_of(tmp_path / "b" / "output")
    assert not (tmp_path / "a" / "output" / "judge").exists()


def test_malformed_rows_stop_the_stage_or_are_noted(tmp_path: Path) -> None:
    """None are allowed by default; those that are allowed are left out, counted for the user, and quarantined."""
    own = own_sources(tmp_path / "own")
    with Path(own["prompts"]).open("a") as file:
        file.write('{"prompt": ""}\n')
    context = context_for(tmp_path / "strict", judge=None, **own)
    with pytest.raises(RecordError, match="1 of 21 rows are malformed") as caught:
        run(context)
    assert f"{own['prompts']}:21: prompt: is empty" in caught.value.where

    context = context_for(tmp_path / "lenient", judge=None, max_bad_fraction=0.05, **own)
    metrics = run(context)
    assert metrics["prompts/train"] + metrics["prompts/heldout"] == 20
    notes = (context.attempt / "notes.jsonl").read_text()
    assert "prompts: 1 of 21 rows are malformed" in notes
    assert str(context.attempt / "quarantine-prompts.jsonl") in notes
    assert (context.attempt / "quarantine-prompts.jsonl").exists()


def test_records_that_are_held_out_by_the_user_are_the_held_out_part(tmp_path: Path) -> None:
    """All of the source is trained on then; held-out rows whose prompt is trained on are counted, letter case aside."""
    own = own_sources(tmp_path / "own")
    rows = {
        "demonstrations": [{"prompt": "P3", "completion": "c"}, {"prompt": "new", "completion": "c"}],
        "comparisons": [{"prompt": "p0", "chosen": "x", "rejected": "y"}],
        "prompts": [{"prompt": "p4"}, {"prompt": "Q5"}, {"prompt": "newer"}],
    }
    Path(own["prompts"]).write_text("".join(json.dumps({"prompt": f"q{n}"}) + "\n" for n in range(20)))
    heldout: dict[str, str] = {}
    for kind, values in rows.items():
        heldout[kind] = str(tmp_path / f"heldout-{kind}.jsonl")
        Path(heldout[kind]).write_text("".join(json.dumps(value) + "\n" for value in values))
    context = context_for(tmp_path / "run", judge=None, heldout=heldout, **own)
    assert run(context) == {
        "demonstrations/train": 20,
        "demonstrations/heldout": 2,
        "comparisons/train": 20,
        "comparisons/heldout": 1,
        "prompts/train": 20,
        "prompts/heldout": 3,
        "demonstrations/heldout_seen": 1,
        "prompts/heldout_seen": 2,
    }
    assert notes_of(context) == [
        "demonstrations: 1 of 2 held-out rows have a prompt that is trained on",
        "prompts: 2 of 3 held-out rows have a prompt that is trained on",
    ]
    origins = json.loads((context.output / "sources" / "sources.json").read_text())
    assert origins["prompts"]["heldout"] == "file"


def test_held_out_prompts_of_ones_own_are_none_that_demonstrations_show(tmp_path: Path) -> None:
    """Two files with some prompts in common: the evaluation asks what neither stage was trained on."""
    own = own_sources(tmp_path / "own")
    rows = [{"prompt": f"P{n}"} for n in range(20)] + [{"prompt": f"q{n}"} for n in range(5)]
    Path(own["prompts"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed in range(5):
        context = context_for(tmp_path / str(seed), judge=None, heldout_fraction=0.2, seed=seed, **own)
        metrics = run(context)
        assert (metrics["prompts/heldout"], metrics["prompts/heldout_seen"]) == (5, 0)


def test_comparison_sets_that_share_one_prompt_are_held_out_by_set(tmp_path: Path, sdist: Path) -> None:
    """The quickstart's own sets, written to a file, can be read back as a source of one's own."""
    first = context_for(tmp_path / "first", downloads=sdist.parent)
    rows = run(first)["comparisons/train"]
    own = own_sources(tmp_path / "own") | {"comparisons": str(first.output / "comparisons" / "train.jsonl")}
    second = context_for(tmp_path / "second", judge=None, **own)
    metrics = run(second)
    assert metrics["comparisons/heldout"] == round(0.05 * rows)
    assert metrics["comparisons/train"] + metrics["comparisons/heldout"] == rows
    assert notes_of(first) == ["movie snippets: 10588 in 353 blocks; 2 repeated ones left out"]
    (note,) = notes_of(second)
    assert note.startswith("comparisons: all rows share one prompt, so rows are held out that share no response")


def test_the_stage_notes_as_what_the_rows_of_a_source_were_read(tmp_path: Path) -> None:
    """Once a source; rows of our own form are not mentioned."""
    own = own_sources(tmp_path / "own")
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]
    rows = [{"conversations": [turns[0] | {"content": f"p{n}"}, turns[1]]} for n in range(3)]
    Path(own["demonstrations"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    context = context_for(tmp_path / "run", judge=None, **own)
    run(context)
    assert [note for note in notes_of(context) if "read as" in note] == [
        "demonstrations: 3 rows read as conversations in 'conversations': the last message is the completion, "
        "all before it the prompt"
    ]


def test_how_training_rows_were_read_is_noted_beside_a_held_out_source_too(tmp_path: Path) -> None:
    """Each source by its own name."""
    own = own_sources(tmp_path / "own")
    train, heldout = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    for file, count in ((train, 4), (heldout, 2)):
        rows = [{"instruction": f"{file.name} {number}", "output": "c"} for number in range(count)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = {"demonstrations": str(heldout)}
    context = context_for(tmp_path / "run", heldout=held, seed=1, **(own | {"demonstrations": str(train)}))
    run(context)
    assert [note.split(" as ")[0] for note in notes_of(context) if " read as " in note] == [
        "demonstrations: 4 rows read",
        "heldout.demonstrations: 2 rows read",
    ]


def test_paths_of_ones_own_are_in_the_lineage_and_what_was_read_in_the_result(tmp_path: Path) -> None:
    """Of each source, of what is held out, and of the judge's ratings; all that was not read is noted by its name."""
    own = own_sources(tmp_path / "own")
    judge, heldout = tmp_path / "ratings.jsonl", tmp_path / "held.jsonl"
    judge.write_text("".join(json.dumps({"text": f"t{n}", "rating": n}) + "\n" for n in range(7)) + "{}\n")
    heldout.write_text("".join(json.dumps({"instruction": f"h{n}", "output": "c"}) + "\n" for n in range(3)) + "{}\n")
    held = {"demonstrations": str(heldout)}
    context = context_for(tmp_path / "run", judge=str(judge), heldout=held, max_bad_fraction=0.5, seed=1, **own)
    metrics = run(context)
    assert metrics["judge/ratings"] == 7
    assert metrics["demonstrations/heldout"] == 3
    assert len(list(read_jsonl(context.output / "judge" / "ratings.jsonl", JudgeRating))) == 7
    notes = notes_of(context)
    assert [note.split(" are ")[0] for note in notes if "malformed" in note] == [
        "heldout.demonstrations: 1 of 4 rows",
        "judge: 1 of 8 rows",
    ]
    assert [note.split(" as ")[0] for note in notes if " read as " in note] == ["heldout.demonstrations: 3 rows read"]
    for name in ("heldout-demonstrations", "judge"):
        assert (context.attempt / f"quarantine-{name}.jsonl").exists()

    result = json.loads((context.output / "sources" / "sources.json").read_text())
    assert result == {
        "demonstrations": {
            "source": "file",
            "rows": {"demonstrations/train": 20, "demonstrations/heldout": 3},
            "heldout": "file",
        },
        **{
            kind: {
                "source": "file",
                "rows": {name: metrics[name] for name in (f"{kind}/train", f"{kind}/heldout")},
            }
            for kind in ("comparisons", "prompts")
        },
        "judge": {"source": "file", "rows": {"judge/ratings": 7}},
    }
    expected = {kind: row | {"source": (own | {"judge": str(judge)})[kind]} for kind, row in result.items()}
    expected["demonstrations"]["heldout"] = str(heldout)
    assert context.folder.origin.read() == expected
