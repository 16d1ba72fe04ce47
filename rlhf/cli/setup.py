"""Commands before a first run: print the settings, check the machine."""

import json
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf.cli.run import Request, print_exactly
from rlhf.cluster.session import check_temporary_folder
from rlhf.config.base import Settings, describe, suggestion
from rlhf.config.pipeline import (
    ClusterSettings,
    StoreSettings,
    TrackingSettings,
    resolved,
)
from rlhf.config.schema import json_schema
from rlhf.config.yaml_tree import to_yaml
from rlhf.errors import RequestError, RlhfError, size
from rlhf.terminal import memory_table, plain_table, printable, printable_lines

NEEDED = ("torch", "transformers", "trl", "peft", "deepspeed", "ray", "datasets", "accelerate", "wandb")


def diagnose(store: Path, address: str | None) -> list[dict[str, Any]]:
    """Return the checks of this machine: ``name``, ``ok``, the value ``found``, and what to do ``next`` if not ok."""
    import torch

    checks: list[dict[str, Any]] = []

    def add(name: str, found: str, *, ok: bool = True, then: str = "") -> None:
        checks.append({"name": name, "ok": ok, "found": found, "next": "" if ok else then})

    fits = (3, 11) <= sys.version_info[:2] < (3, 14)
    add("python", platform.python_version(), ok=fits, then="use Python 3.11, 3.12 or 3.13")
    for name in NEEDED:
        try:
            add(name, version(name))
        except PackageNotFoundError:
            add(name, "not installed", ok=False, then="make setup, or install the wheel anew")
    add("cpu cores", str(os.cpu_count()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    add("memory", f"{memory:.1f} GiB", ok=memory >= 6, then="the quickstart needs 6 GiB")

    existing = next(path for path in (store, *store.resolve().parents) if path.exists())
    free, writable = shutil.disk_usage(existing).free, os.access(existing, os.W_OK)
    room = f"{store}: {size(free)} free{'' if writable else ', not writable'}"
    then = "free some space, or set store.uri" if writable else f"make {existing} writable, or set store.uri"
    add("store", room, ok=free >= 5 * 10**9 and writable, then=then)
    if not address:
        try:
            check_temporary_folder()
            add("temporary", "Ray can use it")
        except RlhfError as error:
            add("temporary", f"{error.where}: {error.what}", ok=False, then=error.next_step)

    gpus = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    add("gpus", gpus or "none: everything runs on the CPU")
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").exists()
    add("wandb", "a key is there: online" if has_key else "no key: runs are kept offline, beside their attempts")
    add("cluster", address or "none named: Ray is started on this machine")
    return checks


def config(request: Request) -> None:
    """Print the settings with every default filled in, the meaning of each, or the schema of pipeline files."""
    options = request.arguments
    if options.markdown and not options.fields:
        raise RequestError("--markdown is a form of --fields", "command line", "rlhf config --fields --markdown")
    if options.fields and options.schema:
        raise RequestError("--fields and --schema print different things", "command line", "name one")
    if options.schema:
        schema = json_schema({name: stage.settings for name, stage in request.known.items()})
        print_exactly(json.dumps(schema, indent=2, ensure_ascii=False), lambda: json.dumps(schema, indent=2))
    elif options.fields:
        _print_fields(request)
    else:
        values = resolved(request.config)
        print_exactly(to_yaml(values).rstrip("\n"), lambda: to_yaml(values, ascii_only=True).rstrip("\n"))


def _print_fields(request: Request) -> None:
    sections: dict[str, type[Settings]] = {"store": StoreSettings, "cluster": ClusterSettings}
    sections |= {"tracking": TrackingSettings} | {name: stage.settings for name, stage in request.known.items()}
    for name in request.names:
        if name not in sections:
            raise RequestError(f"no section is named {name!r}", "command line", suggestion(name, sections))
    for name in request.names or sections:
        lines = _as_markdown if request.arguments.markdown else _as_text
        for line in lines(name, sections[name], request.out.width):
            request.out.print(line, markup=False, soft_wrap=True)


def _as_text(section: str, model: type[Settings], width: int) -> Iterator[str]:
    """Yield a line for each setting, and its meaning below it."""
    for field in describe(model):
        shown = f"{section}.{field.path}" + (f" with {field.form}" if field.form else "")
        line = f"{shown}: {field.type}; default {field.default}; {field.role}"
        yield from textwrap.wrap(line, width, subsequent_indent=" " * 8, **_WHOLE_WORDS)
        for text in field.help.splitlines():
            yield from textwrap.wrap(text, width, initial_indent=" " * 4, subsequent_indent=" " * 4, **_WHOLE_WORDS)


_WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def _as_markdown(section: str, model: type[Settings], _: int) -> Iterator[str]:
    """Yield a section with a table of its settings."""
    yield f"## {section}\n\n{_in_cell(model.__doc__ or '')}\n"
    yield "| setting | takes | default | in the key | meaning |\n| --- | --- | --- | --- | --- |"
    for field in describe(model):
        name = f"`{field.path}`" + (f" with {field.form}" if field.form else "")
        in_key = "no" if field.role == "runtime" else "yes"
        meaning = "<br>".join(map(_in_cell, field.help.splitlines()))
        yield f"| {name} | {_in_cell(field.type)} | {_in_cell(f'`{field.default}`')} | {in_key} | {meaning} |"
    yield ""


def _in_cell(text: str) -> str:
    """Return a docstring's text as one line of Markdown that fits into a table."""
    return " ".join(text.replace("``", "`").replace("|", "\\|").split())


def doctor(request: Request) -> int:
    """Say whether this machine can run the pipeline, and how much memory its training stages will take."""
    from rlhf.cluster.session import Session

    if request.arguments.cluster:
        return _cluster_doctor(request)
    entries = diagnose(request.store().root, Session(request.config.cluster).address)
    memory = _memory(request)
    entries += [_memory_check(row) for row in memory]
    if not request.answer({"checks": entries, "memory": memory}):
        _print_checks(request, entries)
        if any(row["total"] for row in memory):
            request.out.print()
            request.out.print(memory_table(memory))
    return 0 if all(entry["ok"] for entry in entries) else 1


def _print_checks(request: Request, entries: Sequence[Mapping[str, Any]]) -> None:
    for entry in entries:
        mark = Text("ok ", "green") if entry["ok"] else Text("bad", "red")
        line = printable_lines(f" {entry['name']}: {entry['found']}  {entry['next']}")
        request.out.print(mark.append(line, "default"))


def _cluster_doctor(request: Request) -> int:
    """Say whether the nodes of the cluster agree with each other and this process, and reach each other.

    Raises:
        RequestError: no cluster is named.
    """
    from rlhf.cluster.findings import findings
    from rlhf.cluster.session import Session
    from rlhf.cluster.survey import survey

    session, progress = Session(request.config.cluster), Console(stderr=True, highlight=False)
    if session.address is None:
        raise RequestError(
            "no cluster is named whose nodes could be checked",
            "cluster.address and RAY_ADDRESS are not set",
            "set RAY_ADDRESS=HOST:PORT of the cluster's head; `rlhf doctor` checks this machine alone",
        )
    root = request.store().root.resolve()
    existing = next(path for path in (root, *root.parents) if path.exists())
    with session, progress.status("attaching to Ray") as status:
        session.start()
        asked = survey(existing, status.update if progress.is_terminal else progress.print)
    entries, nodes = findings(asked), asked.documents()
    entries += [{"name": "token", "ok": True, "found": notice, "next": ""} for notice in session.notices]
    if not request.answer({"checks": entries, "nodes": nodes, "pairs": [asdict(link) for link in asked.links]}):
        _print_checks(request, entries)
        request.out.print()
        request.out.print(_nodes_table(nodes))
    return 0 if all(entry["ok"] for entry in entries) else 1


def _nodes_table(nodes: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of a cluster's nodes, from the "nodes" of ``rlhf doctor --cluster --json``."""
    table = plain_table()
    for column in ("node", "address", "network", "python", "cores", "GPUs", "clock, ms"):
        table.add_column(column, justify="right" if column in ("cores", "GPUs", "clock, ms") else "left")
    for node in nodes:
        clock = node.get("clock_seconds")
        cells = [node["node"], node.get("address"), node.get("interface"), node.get("python"), node.get("cpus")]
        cells += [len(node.get("gpus", ())), None if clock is None else f"{1000 * clock:+.0f}"]
        table.add_row(*(Text(printable("–" if cell is None else str(cell))) for cell in cells))
    return table


def _memory(request: Request) -> list[dict[str, Any]]:
    """Return the forecasts of memory; empty where the pipeline cannot be planned, which ``rlhf plan`` explains."""
    from rlhf.pipeline.fitting import forecasts

    try:
        return forecasts(request.planned([]), request.store())
    except RlhfError:
        return []


def _memory_check(row: Mapping[str, Any]) -> dict[str, Any]:
    name, ranks = f"memory of {row['stage']}", row["ranks"]
    if row["total"] is None:
        return {"name": name, "ok": True, "found": "unknown until there is a model", "next": "rlhf run model"}
    memory = f"{size(row['total'])} on each of {ranks} ranks" if ranks > 1 else size(row["total"])
    if row["device"] is not None:
        memory += f" of {size(row['device'])}"
    if row["tensor_parallel"] == "gathered":
        memory += ", without a copy of the policy to sample from"
    elif isinstance(row["tensor_parallel"], int) and row["tensor_parallel"] > 1:
        memory += f", {row['tensor_parallel']} of which hold a copy of the policy together"
    change = " ".join(f"{row['stage']}.{setting}" for setting in row["change"])
    return {"name": name, "ok": not row["refused"], "found": memory, "next": change}
