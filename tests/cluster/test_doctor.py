import os
from pathlib import Path

import pytest

from rlhf.cli.setup import diagnose


def test_every_finding_has_the_same_shape_and_a_bad_one_a_way_out(tmp_path: Path):
    """What is well needs no advice; what is not never lacks it."""
    entries = diagnose(tmp_path / "not" / "yet", None)
    assert [set(entry) for entry in entries] == [{"name", "ok", "found", "next"}] * len(entries)
    assert all(bool(entry["next"]) != entry["ok"] for entry in entries)
    found = {entry["name"]: entry for entry in entries}
    assert {"python", "torch", "ray", "deepspeed", "cpu cores", "memory", "store", "gpus", "cluster"} <= set(found)
    assert found["python"]["ok"]
    assert found["cpu cores"]["found"] == str(os.cpu_count())
    assert found["store"]["found"].startswith(str(tmp_path))
    assert not (tmp_path / "not").exists(), "looking made a folder"


def test_the_cluster_to_attach_to_is_named():
    """Nobody starts a job on a cluster that the environment named unseen."""
    entries = diagnose(Path("store"), "head:6379")
    assert {"name": "cluster", "ok": True, "found": "head:6379", "next": ""} in entries


def test_a_temporary_folder_that_ray_cannot_use_is_bad(monkeypatch: pytest.MonkeyPatch):
    """As a run would say, unless Ray runs elsewhere."""
    monkeypatch.setenv("RAY_TMPDIR", "/proc/none")
    (entry,) = [entry for entry in diagnose(Path("store"), None) if entry["name"] == "temporary"]
    assert not entry["ok"]
    assert entry["found"].startswith("RAY_TMPDIR=/proc/none: Ray's temporary folder cannot be written")
    assert "temporary" not in [entry["name"] for entry in diagnose(Path("store"), "head:6379")]
