"""What may be in an artifact: regular files of a few types that can be read without running anybody's code."""

import os
from pathlib import Path

from rlhf.errors import DamageError, RequestError
from rlhf.store.records import refuse_escape

ALLOWED_SUFFIXES = frozenset({".safetensors", ".json", ".jsonl", ".parquet", ".txt", ".md", ".jinja", ".model", ".svg"})
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"})


def payload_paths(folder: Path) -> dict[str, Path]:
    """Find every file of a payload folder: relative POSIX path -> path, sorted.

    Raises RequestError for a symbolic link, an empty folder, anything that is neither file nor folder, and a file type
    that an artifact must not hold.
    """
    if not folder.is_dir():
        raise _refused(folder, "is not a folder", "Give the folder that holds the artifact's files.")
    found: dict[str, Path] = {}
    _collect(folder, "", found)
    return dict(sorted(found.items()))


def _collect(folder: Path, prefix: str, found: dict[str, Path]) -> None:
    with os.scandir(folder) as listing:
        entries = list(listing)
    if not entries:
        raise _refused(folder, "is empty", "Write the result into it, or remove it: an artifact holds files only.")
    for entry in entries:
        path, name = Path(entry.path), prefix + entry.name
        if entry.is_symlink():
            raise _refused(path, "is a symbolic link", "Put the file itself there.")
        if entry.is_dir():
            _collect(path, f"{name}/", found)
        elif not entry.is_file():
            raise _refused(path, "is neither a file nor a folder", "Remove it.")
        else:
            _refuse_type(path)
            try:
                refuse_escape(name)
            except DamageError as error:
                raise _refused(path, error.what, "Rename the file.") from error
            found[name] = path


def _refuse_type(path: Path) -> None:
    if path.suffix in PICKLE_SUFFIXES:
        raise _refused(
            path,
            "may be a pickle, which runs code when it is loaded",
            "Save tensors with safetensors (save_pretrained does), all else as JSON, JSONL, Parquet or text.",
        )
    if path.suffix not in ALLOWED_SUFFIXES:
        raise _refused(
            path,
            f"is of a type that no artifact holds ({path.suffix or 'no suffix'})",
            f"Use {_listed(ALLOWED_SUFFIXES)}.",
        )


def _listed(suffixes: frozenset[str]) -> str:
    *most, last = sorted(suffixes)
    return f"{', '.join(most)} or {last}"


def _refused(path: Path, why: str, next_step: str) -> RequestError:
    return RequestError(f"{path.name!r} cannot go into an artifact: it {why}.", where=str(path), next_step=next_step)
