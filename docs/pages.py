"""Write the folder of Markdown that the site is made of: the pages of docs/, and those made from the source.

    python docs/pages.py FOLDER

Made from the source: every setting, every error message, every metric that a page explains, and the interfaces that
packages with stages of their own use. So these pages cannot be out of date.
"""

import ast
import contextlib
import importlib
import inspect
import io
import re
import shutil
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from rlhf import errors
from rlhf.cli.main import main as rlhf

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

PUBLIC = {
    "rlhf.pipeline.stage": ("Stage", "Input", "taking"),
    "rlhf.attempt.context": ("Context",),
    "rlhf.config.base": ("Settings", "semantic", "runtime", "source"),
    "rlhf.config.stages": ("TrainingSettings", "WorkerSettings"),
    "rlhf.data.records": ("read_rows",),
    "rlhf.errors": ("RlhfError", "RequestError", "PreflightError", "StageError", "DivergedError", "TryAgainError"),
}
"""What a stage of another package uses (CONTRIBUTING.md)."""


class Message(NamedTuple):
    """A message of an error in the source; ``‹name›`` stands for what is filled in."""

    what: str
    where: str
    next: str
    module: str


def settings() -> str:
    """Return the page of all settings."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        rlhf(["config", "--fields", "--markdown", "--config", str(ROOT / "configs" / "tiny.yaml")])
    intro = "What `rlhf config --fields --markdown` prints. A setting that is not *in the key* changes no result."
    return f"# Every setting\n\n{intro}\n\n{_linked(printed.getvalue())}"


def _linked(text: str) -> str:
    """Return the text with a link for each page of docs/ that it names in parentheses."""
    return re.sub(r"\bdocs/([\w-]+)\.md", r"[\1](\1.md)", text)


def messages() -> dict[str, list[Message]]:
    """Return the messages of each error class, by its name, in the order of the text."""
    family = {
        name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, errors.RlhfError)
    }
    found: dict[str, set[Message]] = defaultdict(set)
    for folder in ("rlhf", "stages"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            module = file.relative_to(ROOT).as_posix()
            if module.startswith(("rlhf/stages/", "rlhf/configs/")):
                continue
            tree = ast.parse(file.read_text(encoding="utf-8"))
            for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
                known = _assigned(function)
                for call in ast.walk(function):
                    if isinstance(call, ast.Call) and (name := _name(call.func)) in family:
                        parts = [*call.args, *(ast.Constant("") for _ in range(3))][:3]
                        where, then = (next(iter(_texts(part, known)), "") for part in parts[1:])
                        found[name] |= {Message(what, where, then, module) for what in _texts(parts[0], known)}
    return {name: sorted(rows, key=lambda row: row.what.lstrip("‹'\"`").casefold()) for name, rows in found.items()}


def _assigned(function: ast.FunctionDef) -> dict[str, list[ast.expr]]:
    """Return the values that a function gives its variables."""
    values: dict[str, list[ast.expr]] = defaultdict(list)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id].append(node.value)
    return values


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _texts(node: ast.expr, known: dict[str, list[ast.expr]]) -> Iterator[str]:
    """Yield the texts that an expression can be; nothing where the source does not say."""
    match node:
        case ast.Constant(str(text)):
            yield text
        case ast.JoinedStr():
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else f"‹{_shown(part)}›" for part in node.values
            )
        case ast.IfExp():
            yield from _texts(node.body, known)
            yield from _texts(node.orelse, known)
        case ast.BinOp(op=ast.Add()):
            for left in _texts(node.left, known):
                yield from (left + right for right in _texts(node.right, known))
        case ast.Name() if node.id in known:
            rest = {name: values for name, values in known.items() if name != node.id}
            for value in known[node.id]:
                yield from _texts(value, rest)
        case ast.Call() if _name(node.func) == "NextCommand" and isinstance(node.args[0], ast.Constant):
            yield f"rlhf {node.args[0].value}"
        case ast.Call() if _name(node.func) == "str" and node.args:
            yield f"‹{_shown(node.args[0])}›"
        case _:
            pass


def _shown(part: ast.expr) -> str:
    """Return the name of what a message fills in: the last word of the expression that names it."""
    node = part.value if isinstance(part, ast.FormattedValue) else part
    while isinstance(node, ast.Subscript):
        node = node.value
    words = re.findall(r"[A-Za-z]\w*", ast.unparse(node.args[-1] if isinstance(node, ast.Call) and node.args else node))
    return words[-1].replace("_", " ") if words else "…"


def error_messages() -> str:
    """Return the page of all error messages."""
    lines = [
        "# Error messages",
        "",
        "Search for the words of a message that are the same each time; ‹name› stands for what is filled in. The file",
        "is the one that says it. Messages that the source puts together from parts are not listed.",
        "",
        "`--debug` adds the traceback. What a rank printed before it stopped is in its attempt's `log-<rank>.txt`",
        "([store](commands.md#layout-of-the-store)). Symptoms without a message: [PPO](ppo.md#when-it-goes-wrong),",
        "[clusters](cluster.md).",
    ]
    for name, rows in sorted(messages().items()):
        kind = getattr(errors, name)
        lines += ["", f"## {name}", "", f"{inspect.getdoc(kind)} Exit status {kind.exit_status}.", ""]
        lines += ["| message | where | next |", "| --- | --- | --- |"]
        for row in rows:
            cells = (_cell(row.what), _cell(row.where), _cell(row.next))
            lines.append(f"| {cells[0]} <small>{row.module}</small> | {cells[1]} | {cells[2]} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"([|<>*_\[\]\\])", r"\\\1", " ".join(text.split()))


def metrics() -> str:
    """Return the glossary: the tables of metrics of all pages."""
    lines = ["# Metrics", "", "Every metric that a stage writes, from the pages that explain them."]
    for page, title, table in metric_tables():
        lines += ["", f"## {title}", "", f"[{title}]({page}) says more.", "", *table]
    return "\n".join(lines) + "\n"


def metric_tables() -> Iterator[tuple[str, str, list[str]]]:
    """Yield the page, its title, and the lines of each table of docs/ whose first column is headed *metric*."""
    for page in sorted(DOCS.glob("*.md")):
        lines = page.read_text(encoding="utf-8").splitlines()
        title, table = lines[0].removeprefix("# ").split(":")[0], list[str]()
        for line in [*lines, ""]:
            if line.startswith("| metric ") or (table and line.startswith("|")):
                table.append(line)
            elif table:
                yield page.name, title, table
                table = []


def interfaces() -> str:
    """Return the page of what packages with stages of their own use."""
    lines = [
        "# Interfaces for stages",
        "",
        "What a package that adds a stage uses ([how](contributing.md#adding-a-stage)).",
    ]
    for module, names in PUBLIC.items():
        lines += ["", f"## {module}"]
        for name in names:
            lines += ["", *_described(getattr(importlib.import_module(module), name), name)]
    return "\n".join(lines) + "\n"


def _described(thing: Any, name: str) -> Iterator[str]:
    """Yield what a class or a function is for, with its fields and methods or its signature."""
    (body,) = ast.parse(inspect.getsource(thing)).body
    yield f"### {name}"
    yield ""
    if isinstance(body, ast.FunctionDef):
        yield from (
            f"    {name}({ast.unparse(body.args)}) -> {ast.unparse(body.returns) if body.returns else None}",
            "",
        )
    yield from (_marked(inspect.getdoc(thing) or ""), "")
    if not isinstance(body, ast.ClassDef):
        return
    for node, following in pairwise([*body.body, None]):
        match node, following:
            case ast.AnnAssign(target=ast.Name(id=field)), _ if not field.isupper():
                default = f" = {ast.unparse(node.value)}" if node.value else ""
                help_ = following.value if isinstance(following, ast.Expr) else None
                text = str(help_.value) if isinstance(help_, ast.Constant) else ""
                yield f"- `{field}: {ast.unparse(node.annotation)}{default}`<br>{_one_line(text)}"
            case ast.FunctionDef(name=method), _ if not method.startswith("_"):
                text = inspect.getdoc(getattr(thing, method)) or ""
                yield f"- `{method}({ast.unparse(node.args)})`<br>{_one_line(text)}"
            case _:
                pass


def _one_line(text: str) -> str:
    return " ".join(_marked(text).split())


def _marked(text: str) -> str:
    """Return a docstring's text as Markdown."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    return _linked(text)


def write(folder: Path) -> None:
    """Write all pages, pictures included, to a folder, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in [*DOCS.glob("*.md"), *DOCS.glob("*.svg"), *DOCS.glob("*.png"), *DOCS.glob("*.css")]:
        shutil.copyfile(file, folder / file.name)
    for name in ("CONTRIBUTING", "CHANGELOG"):
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8")
        (folder / f"{name.lower()}.md").write_text(text.replace("](docs/", "]("), encoding="utf-8")
    made = {"settings": settings, "errors": error_messages, "metrics": metrics, "interfaces": interfaces}
    for name, page in made.items():
        (folder / f"{name}.md").write_text(page(), encoding="utf-8")
    listed = set(re.findall(r"[\w-]+\.md", str(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"])))
    if lost := {page.name for page in folder.glob("*.md")} - listed:
        raise SystemExit(f"error: no menu leads to {', '.join(sorted(lost))}; next: add it to nav in zensical.toml")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
