"""Commands that start a project: init, and a check of the surroundings."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.text import Text

from rlhf.cli.run import Request, print_exactly
from rlhf.cluster.session import check_temporary_folder
from rlhf.config.base import Settings, suggestion
from rlhf.config.fields import describe
from rlhf.config.pipeline import (
    ClusterSettings,
    StoreSettings,
    TrackingSettings,
    resolved,
)
from rlhf.config.yaml_tree import to_yaml
from rlhf.errors import RequestError, RlhfError, size

NEEDED = ("torch", "transformers", "trl", "peft", "deepspeed", "ray", "datasets", "accelerate", "wandb")


def diagnose(store: Path, address: str | None) -> list[dict[str, Any]]:
    """What was looked at: ``name``, ``ok``, what was ``found``, and what to do ``next`` where it is not well."""
    return [
        _python(),
        *(_package(name) for name in NEEDED),
        _cpus(),
        _memory(),
        _disk(store),
        *([] if address else [_temporary()]),
        _accelerators(),
        _tracking(),
        {"name": "cluster", "ok": True, "found": address or "none named: Ray is started on this machine", "next": ""},
    ]


def _entry(name: str, found: str, *, ok: bool = True, then: str = "") -> dict[str, Any]:
    return {"name": name, "ok": ok, "found": found, "next": "" if ok else then}


def _python() -> dict[str, Any]:
    fits = (3, 11) <= sys.version_info[:2] < (3, 13)
    return _entry("python", platform.python_version(), ok=fits, then="use Python 3.11 or 3.12")


def _package(name: str) -> dict[str, Any]:
    try:
        return _entry(name, version(name))
    except PackageNotFoundError:
        return _entry(name, "not installed", ok=False, then="make setup")


def _cpus() -> dict[str, Any]:
    return _entry("cpu cores", str(os.cpu_count()))


def _memory() -> dict[str, Any]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return _entry("memory", f"{total:.1f} GiB", ok=total >= 6, then="the quickstart needs 6 GiB")


def _disk(store: Path) -> dict[str, Any]:
    existing = next(path for path in (store, *store.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    writable = os.access(existing, os.W_OK)
    then = "free some space, or set store.uri" if writable else f"make {existing} writable, or set store.uri"
    return _entry(
        "store",
        f"{store}: {size(free)} free{'' if writable else ', not writable'}",
        ok=free >= 5 * 10**9 and writable,
        then=then,
    )


def _temporary() -> dict[str, Any]:
    try:
        check_temporary_folder()
    except RlhfError as error:
        return _entry("temporary", f"{error.where}: {error.what}", ok=False, then=error.next_step)
    return _entry("temporary", "Ray can use it")


def _accelerators() -> dict[str, Any]:
    import torch

    count = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
    return _entry("gpus", names or "none: everything runs on the CPU")


def _tracking() -> dict[str, Any]:
    key = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").exists()
    return _entry("wandb", "a key is there: online" if key else "no key: runs are kept offline, beside their attempts")


def config(request: Request) -> None:
    """Print the settings with every default filled in, or what each of them means."""
    if not request.arguments.fields:
        values = resolved(request.config)
        print_exactly(to_yaml(values).rstrip("\n"), lambda: to_yaml(values, ascii_only=True).rstrip("\n"))
        return
    sections: dict[str, type[Settings]] = {
        "store": StoreSettings,
        "cluster": ClusterSettings,
        "tracking": TrackingSettings,
    }
    sections |= {name: stage.settings for name, stage in request.known.items()}
    for name in request.names:
        if name not in sections:
            raise RequestError(f"no section is named {name!r}", "command line", suggestion(name, sections))
    for name in request.names or sections:
        for field in describe(sections[name]):
            request.out.print(f"{name}.{field.path}: {field.type}; default {field.default}; {field.role}", markup=False)
            request.out.print(f"    {field.help}", markup=False)


def doctor(request: Request) -> int:
    """Say whether this machine can run the pipeline."""
    from rlhf.cluster.session import Session

    entries = diagnose(request.store().root, Session(request.config.cluster).address)

    def show() -> None:
        for entry in entries:
            mark = Text("ok ", "green") if entry["ok"] else Text("bad", "red")
            request.out.print(mark.append(f" {entry['name']}: {entry['found']}  {entry['next']}", "default"))

    request.answer({"checks": entries}, show)
    return 0 if all(entry["ok"] for entry in entries) else 1
