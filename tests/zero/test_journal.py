import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from rlhf.attempt.context import Context
from rlhf.config.collect import CompareSettings
from rlhf.rollout.sequences import Sequences
from rlhf.tracking import read_metrics
from rlhf.training.limits import IterationLimit
from rlhf.training.loop import Journal


@pytest.fixture
def context(tmp_path: Path) -> Context[CompareSettings]:
    """Of a stage whose attempt is the test's folder."""
    return Context(
        "ppo",
        "key",
        CompareSettings(function="f.py:f"),
        {},
        tmp_path,
        tmp_path,
        tmp_path,
        attempts=(tmp_path,),
    )


def test_samples_with_line_ends_of_other_alphabets_are_read_again(
    group: None, context: Context[CompareSettings], tmp_path: Path
) -> None:
    """A model may write U+2028: its rows are still one line each when a killed stage goes on, and a torn one goes."""
    path = context.folder.samples
    rows = [{"step": 0, "response": "a\u2028b\x85c"}, {"step": 1, "response": "later"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + '{"step": 0, "resp')
    Journal(context, 3, unit="step", shown=())
    assert [json.loads(row) for row in path.read_bytes().splitlines()] == rows[:1]


def test_a_row_has_the_gpus_highest_memory_since_the_row_before_and_on_a_cpu_none(
    group: None, context: Context[CompareSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In GB; torch's own counters are begun anew with each row, and without a GPU there is no such metric."""
    journal = Journal(context, 3, unit="step", shown=())
    journal.log(1, {"loss": 1.0})
    held = {"reserved": 3_000_000_000, "allocated": 2_500_000_000}
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda: held["reserved"])
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: held["allocated"])
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda: held.update(reserved=10**9, allocated=5 * 10**8))
    journal.log(2, {"loss": 1.0})
    journal.log(3, {"loss": 1.0})
    rows = read_metrics(context.folder.metrics)
    measured = [{name: value for name, value in row.items() if name.startswith("memory/")} for row in rows]
    assert measured == [
        {},
        {"memory/reserved_gb": 3.0, "memory/peak_gb": 2.5},
        {"memory/reserved_gb": 1.0, "memory/peak_gb": 0.5},
    ]


def test_a_row_compares_its_time_with_the_limit(
    group: None, context: Context[CompareSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share of the time that had to be; tokens are those of responses."""
    limit = cast(IterationLimit, SimpleNamespace(seconds=lambda sequences: 1.5))
    mask = torch.tensor([[True, True], [True, False]])
    sequences = Sequences(ids=mask.long(), attention_mask=mask.long(), mask=mask)
    journal = Journal(context, 1, unit="step", shown=(), limit=limit)
    clock = iter([10.0, 14.0, 20.0, 22.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    for part in ("rollout", "train"):
        with journal.timed(part):
            pass
    journal.log(1, {}, sequences)
    row = read_metrics(context.folder.metrics)[0]
    assert (row["perf/of_limit"], row["perf/tokens_per_s"]) == (0.25, 0.5)


def test_a_journal_that_continues_at_a_checkpoint_sends_each_point_of_its_file_once(
    group: None, context: Context[CompareSettings], tmp_path: Path
) -> None:
    """To TensorBoard, which had a step more than the checkpoint; tokens are counted on from there."""
    where = {"project": "tiny", "pipeline": "tiny", "group": "tiny-1", "folder": tmp_path}
    context = replace(context, tracking={"sinks": ("tensorboard",), **where})
    mask = torch.tensor([[True, True], [True, False]])
    sequences = Sequences(ids=mask.long(), attention_mask=mask.long(), mask=mask)
    for steps in ((1, 2, 3), (3, 4)):
        journal = Journal(context, 4, unit="step", shown=())
        for step in steps:
            with journal.timed("rollout"):
                pass
            journal.log(step, {"loss": 1 / step}, sequences)
        journal.finish()
        context.folder.checkpoint(2).mkdir(parents=True, exist_ok=True)
        (context.folder.checkpoint(2) / "complete.json").write_text('{"ranks": 1, "sizes": {}}')
    rows = read_metrics(context.folder.metrics)
    assert [(row["step"], row["num_tokens"]) for row in rows] == [(step, 3 * step) for step in (1, 2, 3, 4)]
    (events,) = (tmp_path / "tensorboard" / "tiny-1").iterdir()
    read = EventAccumulator(str(events), {"tensors": 0}).Reload()
    for name in ("loss", "num_tokens"):
        points = [(event.step, make_ndarray(event.tensor_proto).item()) for event in read.Tensors(name)]
        assert points == [(row["step"], row[name]) for row in rows]
