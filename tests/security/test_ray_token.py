"""Who may run code on a Ray cluster: whoever has its token, and the token is one user's alone."""

import os
import stat
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlhf.cluster import ray_token
from rlhf.cluster.ray_token import default_path, entrance, known_token, prepare_token
from rlhf.errors import PreflightError
from tests.pipeline.helpers import REPOSITORY


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without a token, and an environment that says nothing of one."""
    for name in (ray_token.MODE, ray_token.TOKEN, ray_token.TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_token_is_made_before_ray_does_and_is_private():
    """Also under a umask that lets everybody read: it never exists with another mode."""
    before = os.umask(0)
    try:
        assert prepare_token() is None
    finally:
        os.umask(before)
    assert mode_of(default_path()) == 0o600
    assert mode_of(default_path().parent) == 0o700
    assert len(default_path().read_text()) == 64
    assert list(default_path().parent.iterdir()) == [default_path()]


def test_a_token_is_made_once():
    """A second one would lock the first one's cluster."""
    prepare_token()
    first = default_path().read_text()
    assert prepare_token() is None
    assert default_path().read_text() == first


def test_a_readable_token_becomes_private_and_the_user_is_told():
    """As Ray left it for everybody to read; others may have it, and only the user knows whether that matters."""
    default_path().parent.mkdir()
    default_path().write_text("a" * 64)
    default_path().chmod(0o644)
    notice = prepare_token()
    assert notice is not None
    assert "could be read by others" in notice
    assert "a" * 64 not in notice
    assert mode_of(default_path()) == 0o600
    assert prepare_token() is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_a_token_of_another_user_is_refused():
    """Who knows it could run code in our name."""
    default_path().parent.mkdir()
    default_path().write_text("a" * 64)
    os.chown(default_path(), 65534, 65534)
    with pytest.raises(PreflightError, match="another user"):
        prepare_token()


def test_what_the_environment_says_of_the_token_is_left_as_it_is(home: Path, monkeypatch: pytest.MonkeyPatch):
    """A token in the environment, a file of the user's, or no authentication at all, which is said aloud."""
    monkeypatch.setenv(ray_token.TOKEN, "b" * 64)
    assert prepare_token() is None
    assert known_token() == "b" * 64
    monkeypatch.delenv(ray_token.TOKEN)

    monkeypatch.setenv(ray_token.TOKEN_PATH, str(home / "mine"))
    with pytest.raises(PreflightError, match="no token in the file"):
        prepare_token()
    (home / "mine").write_text("c" * 64 + "\n")
    assert prepare_token() is None
    assert known_token() == "c" * 64
    monkeypatch.delenv(ray_token.TOKEN_PATH)

    monkeypatch.setenv(ray_token.MODE, "disabled")
    notice = prepare_token()
    assert notice is not None
    assert "runs code as you" in notice
    assert not default_path().exists()


SERVE = """
import sys
import ray
from rlhf.cluster.session import Session
from rlhf.config.pipeline import ClusterSettings

with Session(ClusterSettings(cpus=1, gpus=0)) as session:
    session.start()
    print(ray.get_runtime_context().gcs_address, *session.notices, flush=True)
    sys.stdin.read()
"""
ATTACH = """
import sys
import ray
from rlhf.cluster.session import Session
from rlhf.config.pipeline import ClusterSettings
from rlhf.errors import RlhfError

try:
    with Session(ClusterSettings(address=sys.argv[1])) as session:
        session.start()
        print("in", ray.get(ray.remote(lambda: 7).remote()), *session.notices)
except RlhfError as error:
    print(type(error).__name__, error.what)
"""


@contextmanager
def cluster(home: Path, **environment: str) -> Generator[tuple[str, str]]:
    """A cluster that a session starts for a user with this home: its address, and what the session had to tell."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE],
        env=os.environ | {"HOME": str(home)} | environment,
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address, _, notices = process.stdout.readline().strip().partition(" ")
        yield address, notices
    finally:
        process.stdin.close()
        assert process.wait(60) == 0
        process.stdout.close()


def attach(address: str, home: Path, **environment: str) -> str:
    """What somebody with this home says who attaches to the cluster."""
    answer = subprocess.run(
        [sys.executable, "-c", ATTACH, address],
        env=os.environ | {"HOME": str(home)} | environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


@pytest.mark.slow
def test_a_cluster_that_is_started_lets_in_who_has_its_token_and_nobody_else(tmp_path: Path):
    """Through Ray itself: without a token and with a wrong one it is refused by us, before Ray waits."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    other.mkdir()
    with cluster(mine) as (address, notices):
        assert notices == ""
        path = mine / ".ray" / "auth_token"
        assert mode_of(path) == 0o600
        assert entrance(address) == "guarded"
        assert entrance(address, "0" * 64) == "guarded"
        assert entrance(address, path.read_text()) == "open"
        assert "asks for a token, and none is known here" in attach(address, other)
        assert "asks for a token, and another is known" in attach(address, other, RAY_AUTH_TOKEN="0" * 64)
        assert attach(address, mine) == "in 7"
    assert entrance(address) == "unknown"


@pytest.mark.slow
def test_a_cluster_without_authentication_is_named_to_who_starts_it_and_who_attaches(tmp_path: Path):
    """It may be meant so, in a network of one's own; it must not go unnoticed."""
    with cluster(tmp_path, RAY_AUTH_MODE="disabled") as (address, notices):
        assert "runs code as you" in notices
        assert entrance(address) == "open"
        answer = attach(address, tmp_path)
        assert answer.startswith("in 7")
        assert "asks for no token" in answer


@pytest.mark.parametrize("folder", ["/dev/null/none", "/proc/none"])
def test_a_home_folder_that_cannot_hold_a_token_is_named(monkeypatch: pytest.MonkeyPatch, folder: str):
    """With its variable, the cause, and the variable that makes it unnecessary."""
    monkeypatch.setenv("HOME", folder)
    with pytest.raises(PreflightError, match=r"cannot be kept in the home folder: (Not a|No such)") as caught:
        prepare_token()
    assert caught.value.where == f"{folder}/.ray/auth_token (HOME={folder})"
    assert ray_token.TOKEN_PATH in caught.value.next_step
