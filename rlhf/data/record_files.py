"""List the files of a source that hold records. A file is read, known to hold none, or refused by name, not skipped."""

import os
import re
import shlex
from collections import defaultdict
from pathlib import Path

from rlhf.config.base import ARROW_SUFFIXES, COMPRESSED_SUFFIXES, FILE_SUFFIXES, TEXT_SUFFIXES
from rlhf.errors import RequestError, SettingsError

NAMED_FILES = 5
"""Number of files that an error names before it counts the rest."""

_READ = (
    f"{', '.join(TEXT_SUFFIXES)} (also with {', '.join(COMPRESSED_SUFFIXES)}), .parquet, {', '.join(ARROW_SUFFIXES)}"
)

_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""Files of the ``datasets`` library and the hub beside data; so is ``state.json`` beside ``dataset_info.json``."""

_DOCUMENTS = (".bib", ".cff", ".jpg", ".md", ".pdf", ".png", ".py", ".rst", ".svg", ".yaml", ".yml")
_CHECKSUMS = (".crc", ".md5", ".sha1", ".sha256", ".sha512")
_NOTICES = {
    *("authors", "changelog", "citation", "copying", "licence", "license", "md5sums", "notice", "readme", "sha256sums")
}
"""Names of documents, as they are or with ``.txt``."""

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "val", "valid", "validation"), "validation"),
    **dict.fromkeys(("eval", "evaluation", "heldout", "holdout", "test", "testing"), "test"),
}
"""Words in the names of files and folders, and the split they indicate."""

_TO_JSONL = (
    "python -c \"import pandas; pandas.read_csv({file!r}{more}).to_json({new!r}, orient='records', lines=True)\""
)


def record_files(path: Path, *, mixes_splits: bool = False) -> list[Path]:
    """Return the file itself, or all files of the folder that hold records, in the order of their paths.

    Hidden files are passed over, as are markers such as ``_SUCCESS``, checksums, documents and the metadata of the
    ``datasets`` library.

    mixes_splits  whether training and held-out data may be in one folder

    Raises:
        SettingsError: there is nothing at the path, or nothing in it to read.
        RequestError: a file of the folder is of a kind that is not read, two files have the same data, or the folder
            mixes splits and may not.

    """
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises for a name that is too long
        raise SettingsError(f"there is no file or folder {path}", str(path), "correct the path")
    if path.is_file():
        if not path.name.casefold().endswith(FILE_SUFFIXES):
            raise _unread(path, [path])
        return [path]
    files, unread = _listed(path)
    if unread:
        raise _unread(path, unread)
    if not files:
        raise SettingsError(
            f"records are read from files whose names end in {_READ}, and there is none",
            str(path),
            "name such a file, or a folder that holds some",
        )
    names: dict[Path, Path] = {}
    contents: dict[tuple[int, int], Path] = {}
    for file in files:
        plain = file.with_suffix("") if file.suffix.casefold() in COMPRESSED_SUFFIXES else file
        if (other := names.setdefault(plain.with_suffix(""), file)) != file:
            copies = "a file and its compressed copy" if plain.suffix == other.suffix else "a file in two forms"
            raise RequestError(f"{copies} would both be read", _named([other, file]), f"remove {file}")
        status = file.stat()
        if (other := contents.setdefault((status.st_dev, status.st_ino), file)) != file:
            raise RequestError("a file would be read twice, by a link", _named([other, file]), f"remove {file}")
    if not mixes_splits:
        _refuse_mixed_splits(path, files)
    return files


def _listed(root: Path) -> tuple[list[Path], list[Path]]:
    """Return the files to read, and those that may hold records and cannot be read."""

    def refuse(error: OSError) -> None:
        raise SettingsError(
            f"the folder cannot be listed: {error.strerror}", str(error.filename), "allow it to be read"
        ) from error

    files: list[Path] = []
    unread: list[Path] = []
    for name, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        # Neither this walk nor the folder's digest in the key follows a link to a folder.
        unread += [link for folder in folders if (link := Path(name, folder)).is_symlink()]
        for file in (Path(name, file) for file in names if not file.startswith(".")):
            plain, suffix = file.name.casefold(), file.suffix.casefold()
            # Beside a saved data set the library caches the results of ``map`` and ``filter``: the same rows again.
            is_cache = file.match("cache-*.arrow") and "state.json" in names
            if is_cache or file.name in _METADATA or (file.name == "state.json" and "dataset_info.json" in names):
                continue
            if plain.endswith(FILE_SUFFIXES):
                (files if file.is_file() else unread).append(file)
                continue
            is_marker = plain.startswith("_") and not suffix
            is_notice = suffix in ("", ".txt") and file.stem.casefold() in _NOTICES
            if not (is_marker or is_notice or suffix in (*_DOCUMENTS, *_CHECKSUMS)):
                unread.append(file)
    return sorted(files), sorted(unread)


def _unread(source: Path, files: list[Path]) -> RequestError:
    first = files[0]
    suffix = first.suffix.casefold()
    if first.is_symlink() and not first.is_file():
        next_step = "name the folder that the link leads to" if first.is_dir() else "restore the target of the link"
    elif suffix in (".csv", ".tsv"):
        more = ", sep='\\t'" if suffix == ".tsv" else ""
        next_step = _TO_JSONL.format(file=str(first), more=more, new=str(first.with_suffix(".jsonl")))
    elif suffix in (*COMPRESSED_SUFFIXES, ".zip", ".tar", ".tgz", ".7z", ".lz4"):
        next_step = f"unpack it: {shlex.quote(str(first))}"
    else:
        next_step = "convert it to JSONL, or rename it if it is JSONL"
    if source != first:
        next_step += "; or move it out of the folder, or name the file to read"
    subject = "the file is" if source == first else f"the folder holds {len(files)} file{'s' * (len(files) > 1)}"
    return RequestError(
        f"{subject} of a kind that is not read; names of those that are end in {_READ}", _named(files), next_step
    )


def _refuse_mixed_splits(root: Path, files: list[Path]) -> None:
    splits: defaultdict[str, list[Path]] = defaultdict(list)
    for file in files:
        path = re.sub(r"(?i)(held|hold)[\W_]?(out)", r"\1\2", str(file.relative_to(root)))
        words = re.split(r"[\W_\d]+", re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=test|rain)(?=set)", "_", path).casefold())
        # The last word of a path that indicates a split decides; "" where none does.
        splits[next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), "")].append(file)
    if len(splits) == 1 or not {"validation", "test"} & splits.keys():
        return
    places: dict[str, str] = {}
    for split, members in sorted(splits.items()):
        common = Path(os.path.commonpath(members))  # of one file the file itself
        is_alone = sum(file.is_relative_to(common) for file in files) == len(members)
        places[split or "other"] = str(common) if is_alone else f"a folder of their own for {_named(members)}"
    train = places.get("train") or places.get("other") or next(iter(places.values()))
    raise RequestError(
        f"the folder mixes {' and '.join(places)} data, and held-out data would be trained on",
        "; ".join(f"{split}: {place}" for split, place in places.items()),
        f"name {train}, and the held-out records as data.heldout.demonstrations, .comparisons or .prompts",
    )


def _named(files: list[Path]) -> str:
    more = f" and {len(files) - NAMED_FILES} more" if len(files) > NAMED_FILES else ""
    return ", ".join(map(str, files[:NAMED_FILES])) + more
