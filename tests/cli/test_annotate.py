import json
from pathlib import Path

from rlhf.collect.collection import AnnotationJournal, read_sets
from tests.cli.conftest import Ask

ROW = {"prompt": "p", "responses": ["a", "b"]}


def test_a_request_that_cannot_be_served_is_refused_in_a_few_lines(ask: Ask, tmp_path: Path):
    """The wrong number of files, a bad row, a file of somebody else's; nothing is made."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(ROW) + "\n" + json.dumps({"prompt": "p"}) + "\n")
    for words, message in (
        ((), "rlhf annotate SETS.jsonl OUT.jsonl"),
        ((str(rows),), "rlhf annotate SETS.jsonl OUT.jsonl"),
        ((str(rows), str(tmp_path / "out.jsonl")), f"{rows}:2: responses: is missing"),
        ((str(tmp_path / "none.jsonl"), str(tmp_path / "out.jsonl")), "there is no file"),
        ((str(rows), str(tmp_path / "out.jsonl"), "--port", "x"), "--port"),
        ((str(rows), str(tmp_path / "out.jsonl"), "--port", "65536"), "there is no port 65536"),
    ):
        answer = ask("annotate", *words)
        assert (answer.status, answer.out) == (2, ""), words
        assert message in answer.err
    assert not list(tmp_path.glob("out*"))


def test_the_result_is_written_from_the_answers_alone(ask: Ask, tmp_path: Path):
    """After a death, without serving anything; without answers one is told how to begin."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text(json.dumps(ROW) + "\n")
    answer = ask("annotate", str(rows), str(out), "--export-only")
    assert answer.status == 2
    assert f"next:  rlhf annotate {rows} {out}" in answer.err
    with AnnotationJournal(tmp_path / "out.answers.jsonl") as journal:
        journal.append(next(iter(read_sets(str(rows)))), "ann", [1, 0])
    answer = ask("annotate", str(rows), str(out), "--export-only")
    assert (answer.status, answer.err) == (0, "")
    assert f"wrote {out}; rows: 1 ranked, rankings: 1, annotators: 1" in answer.out
    assert json.loads(out.read_text()) == ROW | {"rankings": [[1, 0]], "annotators": ["ann"]}
