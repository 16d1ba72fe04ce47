"""Storage that is full, or that may only be read."""

import random
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlhf.errors import size
from rlhf.store import Store
from tests.faults.processes import child, finish, surroundings
from tests.pipeline.helpers import make, write_pipeline
from tests.store.helpers import files_under, write_files

WEIGHTS = 50_000


@pytest.mark.rounds(5, 100)
def test_a_disk_full_at_any_byte_commits_nothing_and_the_same_command_goes_on(tmp_path: Path, seed: int):
    """Exit status 75 with what is needed and what is free; when there is room the same command succeeds."""
    disk = tmp_path / "disk"
    within = surroundings('mount -t tmpfs -o size=2m tmpfs "$0"', disk)
    model = write_files(tmp_path / "model", {"config.json": b"{}", "tokenizer.json": b"{}"})
    save_file({"weight": np.zeros(WEIGHTS, np.float32)}, model / "model.safetensors")
    config = tmp_path / "toy.yaml"
    config.write_text(f"store: {{uri: {disk / 'store'}}}\nwords: {{}}\ncount: {{}}\ntotal: {{}}\n")
    rng = random.Random(seed)
    # Before anything is copied, or among the last few pages: the second copy, manifest, record and ref.
    room = rng.randint(0, 4 * WEIGHTS) if seed % 5 == 0 else 4 * WEIGHTS + 4096 * rng.randint(0, 5)
    (told,) = finish(child("fill", disk, model, config, str(room), within=within))
    assert told["status"] == 75, told["err"]
    assert " needed, " in told["err"]
    assert " free" in told["err"]
    assert "Free some space" in told["err"]
    # The record is the commit: with it written, room for the ref alone may still be missing.
    assert told["records"] == ("/refs/" in told["err"])
    assert told["damaged"] == 0
    if room < 4 * WEIGHTS:
        assert f"{size(told['free'])} free" in told["err"]
        assert told["blobs"] == 0
    assert told["again"]["status"] == 0, told["again"]["err"]
    assert told["verified"] == 0


def test_a_store_mounted_read_only_answers_everything_and_runs_nothing(tmp_path: Path):
    """Also to root, whom no mode of a file stops: what only reads works, and a run ends before any work."""
    path = write_pipeline(tmp_path)
    make(path)
    make(path, "total.factor=2")
    store = tmp_path / "store"
    before = files_under(store)
    within = surroundings('mount --bind "$0" "$0" && mount -o remount,ro,bind "$0"', store)
    (told,) = finish(child("only_read", path, tmp_path / "out", within=within))
    answers = told["answers"]
    assert {name: answer["status"] for name, answer in answers.items()} == {
        "plan": 0,
        "status": 0,
        "explain total": 0,
        "lineage": 0,
        "verify": 0,
        "export": 0,
        "gc": 75,
        "run": 75,
    }
    assert told["exported"] == ["README.md", "config.json"]
    assert "cached" in answers["plan"]["out"]
    for refused in ("run", "gc"):
        assert str(store) in answers[refused]["err"]
        assert "read-only" in answers[refused]["err"].lower()
    assert told["modules"] is False
    assert files_under(store) == before
    assert Store.open(store).verify().damaged == []
