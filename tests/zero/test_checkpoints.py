import json
from pathlib import Path

from rlhf.attempt.folder import AttemptFolder
from rlhf.training.checkpoint_writer import MARKER, is_complete, newest_complete, step_of


def written(attempt: Path, step: int, *, marked: bool = True) -> Path:
    """A checkpoint of two files, as all ranks and rank 0 leave it."""
    checkpoint = AttemptFolder(attempt).checkpoint(step)
    (checkpoint / "policy").mkdir(parents=True)
    for name in ("policy/shard-0", "policy/shard-1"):
        (checkpoint / name).write_bytes(b"weights")
    if marked:
        sizes = {"policy/shard-0": 7, "policy/shard-1": 7}
        (checkpoint / MARKER).write_text(json.dumps({"ranks": 2, "sizes": sizes}))
    return checkpoint


def test_the_highest_step_of_all_attempts_is_the_newest(tmp_path: Path) -> None:
    """By number and not by name or attempt: 100 is more than 20, and an older attempt may have come further."""
    first, second = tmp_path / "1", tmp_path / "2"
    for attempt, step in ((first, 20), (first, 100), (second, 30)):
        written(attempt, step)
    newest = newest_complete([first, second])
    assert newest == AttemptFolder(first).checkpoint(100)
    assert step_of(AttemptFolder(first).checkpoint(100)) == 100


def test_a_checkpoint_that_was_cut_off_is_never_read(tmp_path: Path) -> None:
    """Without its marker, with half a marker, with a file missing or of another size, or by a name of no step."""
    whole = written(tmp_path, 1)
    written(tmp_path, 2, marked=False)
    (written(tmp_path, 3) / MARKER).write_text('{"ranks": 2, "sizes": {"policy/shard-0": 7, "poli')
    (written(tmp_path, 4) / "policy" / "shard-1").unlink()
    (written(tmp_path, 5) / "policy" / "shard-0").write_bytes(b"weig")
    written(tmp_path, 6).rename(tmp_path / "checkpoints" / "checkpoint-6.partial")
    assert is_complete(whole)
    assert newest_complete([tmp_path]) == whole


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    """A fresh key starts from the beginning."""
    assert newest_complete([]) is None
    assert newest_complete([tmp_path / "missing"]) is None
