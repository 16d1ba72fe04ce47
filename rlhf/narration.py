"""What ``explain``, ``lineage`` and ``diff`` print on a terminal, made from the documents of their ``--json``."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from rlhf.terminal import duration, plain_table, printable, short_key

Document = Mapping[str, Any]


def explain_view(document: Document) -> Text:
    """Return why a stage is cached or would run; for a cached result, also why it was made."""
    state = f"{document['stage']}: {document['state']}"
    if document["differences"]:
        lines = [f"{state}; since its latest result, {short_key(document['since'])}:"]
        lines += _differences(document["differences"], set())
    else:
        lines = [f"{state}, {document['why']}"]
    if document["made"] and document["state"] == "cached":
        lines.append(f"it was made after {short_key(document['made']['since'])}, because:")
        lines += _differences(document["made"]["differences"], set()) or ["  nothing differs"]
    return Text("\n".join(map(printable, lines)))


def _differences(differences: Sequence[Document], explained: set[str], indent: str = "  ") -> list[str]:
    """Return a line for each difference, followed by the differences behind a changed input, once for each stage."""
    lines: list[str] = []
    for difference in differences:
        line = f"{indent}{difference['what']}"
        stage, inside = difference.get("stage"), difference.get("differences", [])
        if stage and not inside and difference.get("new"):
            lines.append(f"{line}: {stage} made it anew from the same inputs, with another result")
        elif inside and stage in explained:
            lines.append(f"{line}, by {stage}: as above")
        elif inside:
            explained.add(str(stage))
            lines += [f"{line}, by {stage}:", *_differences(inside, explained, f"{indent}  ")]
        else:
            lines.append(line)
    return lines


def lineage_view(document: Document) -> Group:
    """Return a tree of what a result was made from, then its sources, code, hosts, versions and cost."""
    origins: dict[str, Text] = {}
    shown: dict[str, Document] = {}
    tree = _grow(None, document, "", shown, origins)
    facts = plain_table(header=False)
    facts.add_column(no_wrap=True, style="dim")
    facts.add_column(overflow="fold")
    for name, text in origins.items():
        facts.add_row(Text(printable(name)), text)
    made = shown.values()
    versions = [{"Python": provenance.get("python")} | provenance.get("versions", {}) for provenance in made]
    for name, values in (
        ("code", {provenance.get("commit") for provenance in made}),
        ("hosts", {host for provenance in made for host in provenance["hosts"]}),
        ("devices", {device for provenance in made for device in provenance.get("devices", ())}),
        ("versions", {f"{package} {version}" for each in versions for package, version in each.items() if version}),
    ):
        if known := sorted(str(value) for value in values if value):
            facts.add_row(name, Text(printable(", ".join(known))))
    if total := document["provenance"].get("total"):
        hours = total["gpu_hours"]
        gpu = "GPU-hours unknown" if hours is None else f"{hours:.4g} GPU-hours"
        cost = f"{duration(total['seconds'])}, {gpu}, for {total['results']} results and the attempts that led to them"
        facts.add_row("cost", Text(cost))
    return Group(tree, Text(), facts)


def _grow(tree: Tree | None, node: Document, role: str, shown: dict[str, Document], origins: dict[str, Text]) -> Tree:
    """Add a result and all that it was made from to the tree; keep their provenance and sources by key and name."""
    made, key = node["provenance"], node["key"]
    stage = node["stage"] or "from outside"
    text = Text(printable(role), "dim")
    text.append(printable(str(stage)), "bold")
    text.append(f" {short_key(key or node['artifact'])}", "cyan")
    hosts = list(made.get("hosts") or filter(None, [made.get("host")]))
    if key in shown:
        text.append("  as above", "dim")
    elif made:
        ranks, gpus = made.get("ranks"), made.get("gpus")
        count = (
            f"{ranks} rank{'s' if ranks != 1 else ''}, {gpus or 'no'} GPU{'s' if gpus != 1 else ''}" if ranks else ""
        )
        failed = made.get("earlier_attempts", [])
        spent = duration(sum(attempt["seconds"] for attempt in failed))
        before = f"after {len(failed)} attempt{'s' if len(failed) != 1 else ''} of {spent}" if failed else ""
        when = str(made.get("finished", ""))[:16].replace("T", " ")
        parts = (when, duration(made.get("seconds", 0.0)), count, before, f"on {', '.join(hosts)}")
        text.append(f"  {printable('  '.join(part for part in parts if part))}", "default")
    branch = Tree(text, highlight=False) if tree is None else tree.add(text)
    if key in shown:
        return branch
    shown[str(key)] = {**made, "hosts": hosts}
    digests = node["settings"].get("sources", {})
    for name, origin in made.get("origin", {}).items():
        file = origin.get("file", {})
        facts = {
            "": origin.get("source"),
            "at": origin.get("revision"),
            "digest": digests.get(name),
            "sha256": origin.get("sha256") or file.get("sha256"),
            "licence": origin.get("license") or file.get("licence"),
        }
        line = ", ".join(f"{label} {value}".strip() for label, value in facts.items() if value)
        origins[f"{stage}: {name}"] = Text(printable(line))
    # A local model is a source named `base`, and its origin is the model's.
    for name, digest in digests.items():
        if name not in made.get("origin", {}):
            origins[f"{stage}: {name}"] = Text(f"digest {digest}")
    for name, inner in node["inputs"].items():
        part = made.get("read", {}).get(name, {}).get("part")
        _grow(branch, inner, f"{name}{f' ({part})' if part and part != name else ''}: ", shown, origins)
    return branch


def diff_view(document: Document) -> Group:
    """Return what two results were made from as far as it differs, and their metrics side by side."""
    a, b = document["a"], document["b"]
    sides = Text(f"a  {a['stage']} {short_key(a['key'])}\nb  {b['stage']} {short_key(b['key'])}")
    if a == b:
        return Group(sides, Text("they are one result"))
    lines = _differences(document["differences"], set()) or ["  nothing differs"]
    parts: list[RenderableType] = [sides, Text("\n".join(map(printable, ["made from, a → b:", *lines])))]
    if document["circumstances"]:
        lines = ["made with, a → b:"]
        for name, values in document["circumstances"].items():
            was, now = (
                ", ".join(map(str, value)) if isinstance(value, list) else "unknown" if value is None else str(value)
                for value in (values["a"], values["b"])
            )
            lines.append(f"  {name} {was} → {now}")
        parts.append(Text("\n".join(map(printable, lines))))
    if document["metrics"]:
        table = plain_table()
        table.add_column("metric", overflow="fold")
        for name in ("a", "b", "b - a"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, values in document["metrics"].items():
            numbers = ((values["a"], ""), (values["b"], ""), (values["difference"], "+"))
            cells = ("–" if number is None else f"{number:{sign}.4g}" for number, sign in numbers)
            table.add_row(Text(printable(name)), *cells)
        parts += [Text(), table]
    return Group(*parts)
