"""What ``explain``, ``lineage`` and ``diff`` show on a terminal, out of the documents that their ``--json`` prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from rlhf.terminal import duration, printable, short_key

Document = Mapping[str, Any]


def explain_view(document: Document) -> Text:
    """Why a stage is cached or would run; of a result that stands, also why it was made."""
    head = f"{document['stage']}: {document['state']}, {document['why']}"
    since = document["since"]
    lines = [head]
    if document["differences"]:
        lines = [f"{document['stage']}: {document['state']}; since its latest result, {short_key(since)}:"]
        lines += _differences(document["differences"], set())
    if document["made"] and document["state"] == "cached":
        lines.append(f"it was made after {short_key(document['made']['since'])}, because:")
        lines += _differences(document["made"]["differences"], set()) or ["  nothing differs"]
    return Text("\n".join(map(printable_indented, lines)))


def printable_indented(line: str) -> str:
    """A line safe to print, its indentation kept."""
    return " " * (len(line) - len(line.lstrip(" "))) + printable(line.lstrip(" "))


def _differences(found: Sequence[Document], told: set[str], indent: str = "  ") -> list[str]:
    """Differences one a line, those behind a changed input below it; a stage's are told once."""
    lines: list[str] = []
    for one in found:
        line = f"{indent}{one['what']}"
        stage, inside = one.get("stage"), one.get("differences", [])
        if stage and not inside and one.get("new"):
            lines.append(f"{line}: {stage} made it anew from the same, and it came out otherwise")
        elif inside and stage in told:
            lines.append(f"{line}, by {stage}: as above")
        elif inside:
            told.add(str(stage))
            lines += [f"{line}, by {stage}:", *_differences(inside, told, f"{indent}  ")]
        else:
            lines.append(line)
    return lines


def lineage_view(document: Document) -> Group:
    """A tree of what a result came from, then where it began, what made it and what it cost."""
    origins: dict[str, Text] = {}
    tree = _grow(None, document, "", {}, origins)
    facts = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    facts.add_column(no_wrap=True, style="dim")
    facts.add_column(overflow="fold")
    for name, text in origins.items():
        facts.add_row(Text(printable(name)), text)
    nodes = _nodes(document)
    for name, values in (
        ("code", {node["provenance"].get("commit") for node in nodes}),
        ("hosts", {host for node in nodes for host in _hosts(node["provenance"])}),
        ("devices", {device for node in nodes for device in node["provenance"].get("devices", ())}),
        ("versions", {f"{name} {one}" for node in nodes for name, one in _versions(node["provenance"])}),
    ):
        if known := sorted(str(value) for value in values if value):
            facts.add_row(name, Text(printable(", ".join(known))))
    total = document["provenance"].get("total")
    if total:
        facts.add_row("cost", Text(_cost(total)))
    return Group(tree, Text(), facts)


def _grow(tree: Tree | None, node: Document, role: str, told: dict[str, str], origins: dict[str, Text]) -> Tree:
    made, key = node["provenance"], node["key"]
    stage = node["stage"] or "from outside"
    text = Text(printable(role), "dim")
    text.append(printable(str(stage)), "bold")
    text.append(f" {short_key(key) if key else short_key(node['artifact'])}", "cyan")
    if key in told:
        text.append("  as above", "dim")
    elif made:
        text.append(f"  {printable(_circumstances(made))}", "default")
    grown = Tree(text, highlight=False) if tree is None else tree.add(text)
    if key in told:
        return grown
    told[str(key)] = role
    for name, origin in made.get("origin", {}).items():
        origins[f"{stage}: {name}"] = Text(printable(_origin(origin, node["settings"].get("sources", {}).get(name))))
    # A local model is a source named `base`, and its origin is the model's.
    for name, digest in node["settings"].get("sources", {}).items():
        if name not in made.get("origin", {}):
            origins[f"{stage}: {name}"] = Text(f"digest {digest}")
    for name, inner in node["inputs"].items():
        part = made.get("read", {}).get(name, {}).get("part")
        _grow(grown, inner, f"{name}{f' ({part})' if part and part != name else ''}: ", told, origins)
    return grown


def _circumstances(made: Document) -> str:
    ranks, gpus = made.get("ranks"), made.get("gpus")
    took = duration(made.get("seconds", 0.0))
    where = f"on {', '.join(_hosts(made))}"
    given = f"{ranks} rank{'s' if ranks != 1 else ''}, {gpus or 'no'} GPU{'s' if gpus != 1 else ''}" if ranks else ""
    failed = made.get("earlier_attempts", [])
    spent = sum(attempt["seconds"] for attempt in failed)
    before = f"after {len(failed)} attempt{'s' if len(failed) != 1 else ''} of {duration(spent)}" if failed else ""
    when = str(made.get("finished", ""))[:16].replace("T", " ")
    return "  ".join(part for part in (when, took, given, before, where) if part)


def _origin(origin: Document, digest: str | None) -> str:
    file = origin.get("file", {})
    found = {
        "": origin.get("source"),
        "at": origin.get("revision"),
        "digest": digest,
        "sha256": origin.get("sha256") or file.get("sha256"),
        "licence": origin.get("license") or file.get("licence"),
    }
    return ", ".join(f"{name} {value}".strip() for name, value in found.items() if value)


def _hosts(made: Document) -> list[str]:
    return list(made.get("hosts") or ([made["host"]] if made.get("host") else []))


def _versions(made: Document) -> list[tuple[str, str]]:
    python = {"Python": made["python"]} if made.get("python") else {}
    return list((python | made.get("versions", {})).items())


def _nodes(node: Document) -> list[Document]:
    return [node, *(inner for one in node["inputs"].values() for inner in _nodes(one))]


def _cost(total: Document) -> str:
    hours = total["gpu_hours"]
    gpu = "GPU-hours unknown" if hours is None else f"{hours:.4g} GPU-hours"
    return f"{duration(total['seconds'])}, {gpu}, for {total['results']} results and the attempts that led to them"


def diff_view(document: Document) -> Group:
    """What two results were made from where it differs, and their metrics side by side."""
    a, b = document["a"], document["b"]
    sides = Text(f"a  {a['stage']} {short_key(a['key'])}\nb  {b['stage']} {short_key(b['key'])}")
    if a == b:
        return Group(sides, Text("they are one result"))
    lines = _differences(document["differences"], set()) or ["  nothing differs"]
    parts: list[RenderableType] = [sides, Text("\n".join(["made from, a → b:", *map(printable_indented, lines)]))]
    if document["circumstances"]:
        told = [f"  {name} {_plain(one['a'])} → {_plain(one['b'])}" for name, one in document["circumstances"].items()]
        parts.append(Text("\n".join(["made with, a → b:", *map(printable_indented, told)])))
    if document["metrics"]:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        table.add_column("metric", overflow="fold")
        for name in ("a", "b", "b - a"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, one in document["metrics"].items():
            values = [_number(one["a"]), _number(one["b"]), _number(one["difference"], "+")]
            table.add_row(Text(printable(name)), *values)
        parts += [Text(), table]
    return Group(*parts)


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.4g}"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "unknown" if value is None else str(value)
