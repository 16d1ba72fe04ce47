import resource
from pathlib import Path

import pytest

from rlhf.collect.collection import AnnotationJournal
from rlhf.errors import DiskFullError, LeaseHeldError, RecordError, RequestError


def filled(path: Path) -> bytes:
    with AnnotationJournal(path) as journal:
        journal.append("r0", "ann", [0, [1, 2]])
        journal.append("r0", "Zoë", None)
        journal.append("r1", "ann", [1, 0])
    return path.read_bytes()


def test_what_is_written_is_read_again_and_numbered(tmp_path: Path):
    """One line an answer, and the next process goes on counting."""
    path = tmp_path / "a.jsonl"
    filled(path)
    with AnnotationJournal(path) as journal:
        assert [(one.sequence, one.row, one.annotator, one.ranking, one.skipped) for one in journal.answers] == [
            (1, "r0", "ann", [0, [1, 2]], False),
            (2, "r0", "Zoë", None, True),
            (3, "r1", "ann", [1, 0], False),
        ]
        assert journal.notice == ""
        assert journal.append("r1", "bob", [0, 1]).sequence == 4


def test_wherever_a_death_cuts_the_file_all_whole_lines_are_kept_and_one_can_go_on(tmp_path: Path):
    """Every length of the file; what was cut off is told by file and line."""
    path = tmp_path / "a.jsonl"
    whole = filled(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        cut = whole[:length]
        ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
        # Only a line's end is missing where the next byte would have been it.
        kept = sum(end <= length or end - 1 == length for end in ends)
        with AnnotationJournal(path) as journal:
            assert len(journal.answers) == kept, length
            assert bool(journal.notice) == (not cut.endswith(b"\n") and kept == cut.count(b"\n") and length > 0)
            if journal.notice:
                assert journal.notice.startswith(f"{path}:{kept + 1}: the last line was cut off")
            journal.append("r9", "ann", [1, 0])
        with AnnotationJournal(path) as journal:
            assert len(journal.answers) == kept + 1
            assert journal.notice == ""


def test_one_process_at_a_time(tmp_path: Path):
    """The second is told to try again later; when the first has ended, the file is free."""
    path = tmp_path / "a.jsonl"
    with AnnotationJournal(path), pytest.raises(LeaseHeldError, match="another rlhf annotate") as caught:
        AnnotationJournal(path)
    assert caught.value.exit_status == 75
    AnnotationJournal(path).close()


@pytest.mark.parametrize(
    "line", ["{}", "nonsense", '{"sequence": 2, "row": "r", "annotator": "a", "ranking": null, "skipped": true}', ""]
)
def test_a_line_that_is_no_answer_is_named_and_nothing_is_changed(tmp_path: Path, line: str):
    """Damage, or somebody else's file: by file and line."""
    path = tmp_path / "a.jsonl"
    data = line.encode() + b"\n" + filled(tmp_path / "b.jsonl")
    path.write_bytes(data)
    with pytest.raises(RecordError, match="no answer") as caught:
        AnnotationJournal(path)
    assert caught.value.where == f"{path}:1"
    assert path.read_bytes() == data


def test_a_folder_that_is_not_there_is_told(tmp_path: Path):
    """By the path that was meant."""
    with pytest.raises(RequestError, match="answers cannot be kept") as caught:
        AnnotationJournal(tmp_path / "no" / "a.jsonl")
    assert str(tmp_path / "no") in caught.value.where


def test_an_answer_for_which_there_is_no_room_leaves_no_trace(tmp_path: Path):
    """A limit on the size of files in the middle of a line; afterwards the same answer is taken."""
    path = tmp_path / "a.jsonl"
    whole = filled(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with AnnotationJournal(path) as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, hard))
        try:
            with pytest.raises(DiskFullError):
                journal.append("r1", "bob", [0, 1])
            with pytest.raises(DiskFullError):
                journal.append("r1", "bob", [0, 1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert journal.append("r1", "bob", [0, 1]).sequence == 4
    with AnnotationJournal(path) as journal:
        assert len(journal.answers) == 4
