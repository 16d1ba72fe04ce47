import json
from pathlib import Path

import pytest

from rlhf.data.readers import NAMED_BAD_ROWS
from rlhf.data.validation import KINDS
from tests.cli.conftest import Ask

GOOD = {
    "demonstrations": {"prompt": "Say it.", "completion": "It."},
    "comparisons": {"prompt": "Say it.", "chosen": "It.", "rejected": "No."},
    "prompts": {"prompt": "Say it."},
    "judge": {"text": "It.", "rating": 1.5},
}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_file_is_counted_and_its_kind_told_by_its_fields(ask: Ask, tmp_path: Path, kind: str):
    """With --kind too, and then not guessed."""
    file = write(tmp_path / "rows.jsonl", GOOD[kind], GOOD[kind])
    for words in ((), ("--kind", kind)):
        answer = ask("data", "validate", file, *words)
        assert (answer.status, answer.err) == (0, "")
        assert answer.out == f"{file}: 2 rows of {kind}, all valid\n"
    assert set(GOOD) == set(KINDS)


def test_in_a_folder_a_file_with_the_name_of_a_kind_is_read_as_that(ask: Ask, tmp_path: Path):
    """As `rlhf init --data` takes them: prompts may have completions; another file is told by its fields."""
    folder = tmp_path / "my"
    (folder / "judge").mkdir(parents=True)
    write(folder / "comparisons.jsonl", GOOD["comparisons"])
    write(folder / "Prompts.jsonl", GOOD["demonstrations"])
    write(folder / "judge" / "a.jsonl", GOOD["judge"])
    write(folder / "more.jsonl", GOOD["demonstrations"], GOOD["demonstrations"])
    answer = ask("data", "validate", str(folder))
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.splitlines() == [
        f"{folder}/Prompts.jsonl: 1 rows of prompts, all valid",
        "1 rows read as prompts of rows that hold more; fields not read: completion",
        f"{folder}/comparisons.jsonl: 1 rows of comparisons, all valid",
        f"{folder}/judge: 1 rows of judge, all valid",
        f"{folder}/more.jsonl: 2 rows of demonstrations, all valid",
    ]
    write(folder / "demonstrations.jsonl", GOOD["prompts"])
    assert f"{folder}/demonstrations.jsonl:1: completion: is missing" in ask("data", "validate", str(folder)).err


def test_rows_of_another_form_are_said_to_be_so_in_one_line(ask: Ask, tmp_path: Path):
    """After the count; what is not read is named there too."""
    turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."}]
    file = write(tmp_path / "rows.jsonl", {"messages": turns, "source": "web"})
    first, second = ask("data", "validate", file).out.splitlines()
    assert first == f"{file}: 1 rows of demonstrations, all valid"
    assert second.startswith("1 rows read as conversations in 'messages'")
    assert second.endswith("fields not read: source")


def test_a_bad_row_is_named_by_file_line_and_field(ask: Ask, tmp_path: Path):
    """All bad rows are looked at, not only the first; nothing is written beside the file."""
    good = GOOD["demonstrations"]
    rows = [good, {"prompt": "p", "completion": 3}, good, "{half", {"prompt": "p"}]
    file = write(tmp_path / "rows.jsonl", *rows)
    before = sorted(tmp_path.iterdir())
    answer = ask("data", "validate", file)
    assert answer.status == 2
    assert answer.out == ""
    what, *places = answer.err.splitlines()
    assert what == "error: 3 of 5 rows are malformed as demonstrations"
    assert places[0].startswith(f"  where: {file}:2: completion: ")
    assert places[1].startswith(f"  {file}:4: invalid JSON")
    assert places[2] == f"  {file}:5: completion: is missing"
    assert sorted(path for path in tmp_path.iterdir() if path.name not in ("site", "toy.yaml")) == [
        path for path in before if path.name not in ("site", "toy.yaml")
    ]


def test_many_bad_rows_are_counted_and_some_named(ask: Ask, tmp_path: Path):
    """The message stays short."""
    count = NAMED_BAD_ROWS + 5
    answer = ask("data", "validate", write(tmp_path / "rows.jsonl", *[{"prompt": ""}] * count))
    assert f"{count} of {count} rows are malformed as prompts" in answer.err
    assert "and 5 more" in answer.err


def test_a_wrong_kind_makes_every_row_bad(ask: Ask, tmp_path: Path):
    """What --kind says is believed, and an unknown kind is answered with the known ones."""
    file = write(tmp_path / "rows.jsonl", GOOD["prompts"])
    answer = ask("data", "validate", file, "--kind", "demonstrations")
    assert answer.status == 2
    assert f"{file}:1: completion: is missing" in answer.err
    answer = ask("data", "validate", file, "--kind", "demonstration")
    assert answer.status == 2
    assert "did you mean demonstrations?" in answer.err


def test_what_is_no_file_of_rows_is_refused(ask: Ask, tmp_path: Path):
    """An empty file, a missing one, and a command line without the word or the file."""
    assert "there are no rows" in ask("data", "validate", write(tmp_path / "rows.jsonl")).err
    assert "there are no rows" in ask("data", "validate", str(tmp_path / "rows.jsonl"), "--kind", "prompts").err
    assert "there is no file" in ask("data", "validate", str(tmp_path / "none.jsonl")).err
    assert "there is no file" in ask("data", "validate", f"{'long' * 2000}.jsonl").err.replace("\n", " ")
    # A file that nobody can read from its start, not even root.
    (tmp_path / "link.jsonl").symlink_to("/proc/self/mem")
    answer = ask("data", "validate", str(tmp_path / "link.jsonl"))
    assert (answer.status, "the file cannot be read: " in answer.err) == (2, True)
    for words in (("data",), ("data", "validate"), ("data", "rows.jsonl"), ("data", "validate", "a", "b")):
        answer = ask(*words)
        assert answer.status == 2
        assert "rlhf data validate FILE" in answer.err
