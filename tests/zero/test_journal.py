import json
from pathlib import Path

from rlhf.config.collect import CompareSettings
from rlhf.pipeline.context import Context
from rlhf.zero.journal import SAMPLES, Journal


def test_samples_with_line_ends_of_other_alphabets_are_read_again(group: None, tmp_path: Path) -> None:
    """A model may write U+2028: its rows are still one line each when a killed stage goes on, and a torn one goes."""
    context = Context(
        "ppo",
        "key",
        CompareSettings(function="f.py:f"),
        {},
        tmp_path,
        tmp_path,
        tmp_path,
        attempts=(tmp_path,),
        tracking={"mode": "disabled"},
    )
    path = tmp_path / SAMPLES
    rows = [{"step": 0, "response": "a\u2028b\x85c"}, {"step": 1, "response": "later"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + '{"step": 0, "resp')
    Journal(context, 3, unit="step", shown=())
    assert [json.loads(row) for row in path.read_bytes().splitlines()] == rows[:1]
