"""A run whose lease is somebody else's."""

import dataclasses
import threading
import time
from pathlib import Path

import pytest

from rlhf.cluster.session import Session
from rlhf.store import ActionRecord, Store
from rlhf.store.lease import Holder
from tests.faults.running import Toy, expected_total

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


LONG = "steps.steps=100"
BEAT = 0.2
"""Seconds between two moves of the run's counter."""


class Usurper(threading.Thread):
    """Takes a running stage's lease over, as from another machine, and commits a result a while later."""

    def __init__(self, toy: Toy) -> None:
        super().__init__(daemon=True)
        self.toy = toy
        self.ended = False
        """Whether the run's own group was gone before the usurper committed."""

    def run(self) -> None:
        toy = self.toy
        while (rank := toy.rank(0)) is None or (rank.step or 0) < 2:
            time.sleep(0.02)
        planned = toy.planned(LONG)["steps"]
        key = planned.key
        assert key is not None
        lease = toy.folder / "store" / "leases" / key
        ours = dataclasses.replace(Holder.here(), host="elsewhere", machine="another", token="another", pid=1).to_json()
        taken = lease.with_name(".taken")
        while lease.read_bytes() != ours:  # a beat of the run that had looked just before may have come after it
            taken.write_bytes(ours)
            taken.replace(lease)
            time.sleep(3 * BEAT)

        end = time.monotonic() + 30
        while rank.is_here() and time.monotonic() < end:
            time.sleep(0.05)
        self.ended = not rank.is_here()
        time.sleep(3)  # the run looks for a result at once, and shall wait for it
        output = toy.folder / "theirs"
        output.mkdir()
        (output / "config.json").write_bytes(expected_total())
        store = Store.open(toy.folder / "store")
        store.commit(
            ActionRecord(
                key=key,
                stage="steps",
                version=1,
                settings=dict(planned.settings),
                inputs={role: dict(entry) for role, entry in planned.inputs.items()},
                artifact=store.put_artifact(output, "policy").digest,
                metrics={},
                provenance={"host": "elsewhere"},
                seconds=1.0,
                attempt="theirs",
            )
        )
        lease.unlink()


def test_a_lost_lease_ends_the_stage_and_its_successors_result_is_adopted(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The group stops computing what somebody else computes, and the run waits for whom, and goes on with that."""
    monkeypatch.setattr("rlhf.store.lease.BEAT_SECONDS", BEAT)
    toy = Toy(tmp_path)
    usurper = Usurper(toy)
    usurper.start()
    planned = toy.run(session, "steps.seconds=1", LONG)
    usurper.join(10)
    assert usurper.ended
    shown = toy.output.getvalue()
    assert "steps: the lease was lost to process 1 of " in shown
    assert "steps: Waiting for process 1 of " in shown
    assert "made by another run" in shown
    record = planned["steps"].record
    assert record is not None
    assert record.attempt == "theirs"
    assert list((tmp_path / "store" / "leases").iterdir()) == []
