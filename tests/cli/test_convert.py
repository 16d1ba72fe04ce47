import json
from pathlib import Path

from tests.cli.conftest import Ask
from tests.data.test_argilla import ranking, response, sdk_record, server_record
from tests.data.test_label_studio import ITEMS, annotation, ranker, task


def write(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_one_line_says_what_was_read_written_and_left_out(ask: Ask, tmp_path: Path):
    """And what is written is well-formed."""
    file = write(
        tmp_path / "export.jsonl",
        server_record(
            response("ann", "submitted", preference=ranking(r1=3, r2=1, r3=1)),
            response("bob", "discarded"),
            response("cy", "submitted", preference=ranking(r1=1, r2=2, r3=3), comment="why"),
        ),
        server_record(),
    )
    out = tmp_path / "out.jsonl"
    answer = ask("data", "convert", file, str(out))
    assert (answer.status, answer.err) == (0, "")
    assert answer.out == (
        f"{file}: 2 records read, 1 comparison sets by 2 annotators written to {out}; left out: "
        "1 answers to comment, which compare no responses, 1 discarded responses, 1 records without a comparison\n"
    )
    assert ask("data", "validate", str(out)).out == f"{out}: 1 rows of comparisons, all valid\n"


def test_options_say_what_the_file_does_not(ask: Ask, tmp_path: Path):
    """Fields, question and groups, with blanks after commas."""
    fields = {"text": "p", "good": "a", "bad": "b"}
    votes = {"choice": [{"value": "good", "user_id": "ann"}], "style": [{"value": "bad", "user_id": "ann"}]}
    file = write(tmp_path / "argilla.jsonl", sdk_record(votes, fields=fields))
    answer = ask("data", "convert", file, str(tmp_path / "a.jsonl"))
    assert answer.status == 2
    assert "are not clear from the names: text, good, bad" in answer.err
    assert "--prompt FIELD --responses FIELD,FIELD" in answer.err
    options = ("--from", "argilla", "--prompt", "text", "--responses", "good, bad", "--question", "style")
    answer = ask("data", "convert", file, str(tmp_path / "a.jsonl"), *options)
    assert answer.out.endswith("left out: nothing; status unknown, taken as submitted: 1 responses\n")
    assert json.loads((tmp_path / "a.jsonl").read_text())["rankings"] == [[1, 0]]
    groups = {"poor": ["llm_2"], "fine": ["llm_1", "llm_3"]}
    file = write(tmp_path / "studio.jsonl", task(ITEMS, annotation(1, ranker(groups))))
    assert "--groups BEST,WORSE" in ask("data", "convert", file, str(tmp_path / "b.jsonl")).err
    assert ask("data", "convert", file, str(tmp_path / "b.jsonl"), "--groups", "fine,poor").status == 0
    assert json.loads((tmp_path / "b.jsonl").read_text())["rankings"] == [[[0, 2], 1]]


def test_a_command_line_that_cannot_be_done_is_refused(ask: Ask, tmp_path: Path):
    """An unknown tool, one file only, a file that is not there, and one that is."""
    file = write(tmp_path / "export.jsonl", server_record())
    assert "did you mean argilla?" in ask("data", "convert", file, "out.jsonl", "--from", "argila").err
    assert "rlhf data convert FILE OUT.jsonl" in ask("data", "convert", file).err
    assert "there is no file" in ask("data", "convert", str(tmp_path / "none.json"), str(tmp_path / "out.jsonl")).err
    answer = ask("data", "convert", file, file)
    assert answer.status == 2
    assert "would be lost" in answer.err
