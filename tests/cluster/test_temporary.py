"""Temporary and home folders that Ray cannot use are named, with their variable, before Ray is started."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from rlhf.cluster.session import TEMPORARY_VARIABLES, check_temporary_folder
from rlhf.errors import DiskFullError, PreflightError


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TEMPORARY_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variable", TEMPORARY_VARIABLES)
def test_a_path_is_refused_from_the_byte_on_that_a_socket_has_no_room_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
):
    """As Ray names its sockets, by the time and the process; letters of several bytes count as such."""
    socket = f"/ray/session_2026-11-28_04-10-39_943285_{os.getpid()}/sockets/plasma_store"
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: (tmp_path / "probe").open("wb"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**9, 0, 10**9))
    longest = 107 - len(socket)
    monkeypatch.setenv(variable, "/" + "x" * (longest - 1))
    check_temporary_folder()
    for folder in ("/" + "x" * longest, "/" + "ä" * ((longest + 1) // 2)):
        monkeypatch.setenv(variable, folder)
        with pytest.raises(
            PreflightError, match=f"would take {len(os.fsencode(folder)) + len(socket)} bytes"
        ) as caught:
            check_temporary_folder()
        assert caught.value.where == f"{variable}={folder}"
        assert caught.value.exit_status == 2
        assert f"at most {longest} bytes" in caught.value.next_step


@pytest.mark.parametrize(("folder", "said"), [("/proc/none", "cannot be written"), ("relative", "absolute path")])
def test_a_folder_that_cannot_be_used_is_named_with_its_variable(
    monkeypatch: pytest.MonkeyPatch, folder: str, said: str
):
    """Ray's own variable goes before the general one."""
    monkeypatch.setenv("TMPDIR", folder)
    with pytest.raises(PreflightError, match=said) as caught:
        check_temporary_folder()
    assert caught.value.where == f"TMPDIR={folder}"
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.setenv("RAY_TMPDIR", folder)
    with pytest.raises(PreflightError, match=said) as caught:
        check_temporary_folder()
    assert caught.value.where == f"RAY_TMPDIR={folder}"


class Usage(NamedTuple):
    """What ``shutil.disk_usage`` returns."""

    total: int
    used: int
    free: int


def test_a_full_folder_may_have_room_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Its error is that of a full disk, with what is free."""
    monkeypatch.setenv("TMPDIR", str(tmp_path)[:30])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 65_536, 65_536))
    with pytest.raises(DiskFullError, match=r"no room: 65\.5 kB are free"):
        check_temporary_folder()


def test_an_empty_variable_counts_as_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch):
    """Ray would make its folder in the working folder, and wait for half a minute."""
    for name in TEMPORARY_VARIABLES:
        monkeypatch.setenv(name, "")
    check_temporary_folder()
    assert not [name for name in TEMPORARY_VARIABLES if name in os.environ]
