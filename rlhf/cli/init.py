"""The command init: a commented pipeline file for your data, your model and your machine."""

import json
import os
import re
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from rlhf.cli.run import DEFAULT_CONFIG, Request, command_line
from rlhf.config.base import FILE_SUFFIXES, KNOWN_WORDS, MOVIE_SNIPPETS, is_local
from rlhf.config.pipeline import NAME_PATTERN
from rlhf.config.schema import json_schema
from rlhf.config.stages import ModelSettings
from rlhf.config.yaml_tree import scalar
from rlhf.errors import RequestError, is_no_room
from rlhf.pipeline.transfer import check_model
from rlhf.store.backend import temporary_beside
from rlhf.terminal import printable_lines

SCHEMA = "rlhf.schema.json"
"""The file beside a pipeline file by which editors explain and check it."""
MACHINES = ("cpu", "gpu", "cluster")
DEFAULTS = {"data": MOVIE_SNIPPETS, "model": "smollm2-135m", "for": "cpu"}
_READY = {"smollm2-135m": "quickstart", "scratch": "tiny"}
"""The pipelines that come with the package, for movie snippets on a CPU, by their model."""
_QUESTIONS = {
    "data": f"your data: a folder with demonstrations, comparisons and prompts, or {MOVIE_SNIPPETS}",
    "model": "your model: a folder, NAME@COMMIT of the hub, smollm2-135m, or scratch for a tiny new one",
    "for": f"where it runs: {', '.join(MACHINES)}",
}


class _Model(NamedTuple):
    base: str
    revision: str | None


def init(request: Request) -> None:
    """Write a commented pipeline file for your data, model and machine: rlhf init [FILE]."""
    path = _target(request)
    data, model, machine = _answers(request)
    name = path.stem if re.fullmatch(NAME_PATTERN, path.stem) else "mine"
    if (data, machine) == (None, "cpu") and model.base in _READY:
        text = files("rlhf").joinpath("configs", f"{_READY[model.base]}.yaml").read_text(encoding="utf-8")
    else:
        text = _filled(name, data, model, machine)
    schema = json_schema({name: stage.settings for name, stage in request.known.items()})
    beside = path.with_name(SCHEMA)
    if not request.arguments.force and not _is_ours(beside, schema["title"]):
        raise RequestError(
            f"{beside} is there already, and is no schema of pipeline files",
            str(beside),
            f"--force replaces it; or name a file in another folder, where {SCHEMA} can be written beside it",
        )
    # The pipeline file last: where it is, all was written.
    _write(beside, json.dumps(schema) + "\n")
    _write(path, f"# yaml-language-server: $schema={SCHEMA}\n{text}")
    request.arguments.config = path
    print(printable_lines(f"wrote {path}, and {SCHEMA} beside it for editors"))
    print(printable_lines(f"next: {command_line(request, 'plan')}\n      {command_line(request, 'run')}"))


def _target(request: Request) -> Path:
    """Return the file to write.

    Raises:
        RequestError: several are named, settings are given, the file is there and ``--force`` is not, or its name is
            that of the schema beside it.
    """
    config: Path = request.arguments.config
    named = [*map(Path, request.names), *([] if config == DEFAULT_CONFIG else [config])]
    if request.overrides or len(named) > 1:
        raise RequestError("init takes one file and no settings", "command line", "rlhf init FILE; settings go there")
    path = named[0].expanduser() if named else DEFAULT_CONFIG
    path = path / DEFAULT_CONFIG.name if path.is_dir() else path
    if path.name == SCHEMA:
        then = "name another: rlhf init FILE"
        raise RequestError(f"{SCHEMA} is what editors read beside the pipeline file", str(path), then)
    if os.path.lexists(path) and not request.arguments.force:
        then = "--force replaces it, or name another: rlhf init FILE"
        raise RequestError(f"{path} is there already", str(path), then)
    return path


def _answers(request: Request) -> tuple[dict[str, str | None] | None, _Model, str]:
    """Return the sources of data (None for movie snippets), the model and the machine: as given, else as asked for."""
    checks: dict[str, Callable[[str], object]] = {"data": _sources, "model": _model, "for": _machine}
    given = {"data": request.arguments.data, "model": request.arguments.model, "for": request.arguments.for_}
    missing = [name for name, value in given.items() if value is None]
    if missing and not request.arguments.yes and not (sys.stdin.isatty() and sys.stdout.isatty()):
        named = ", ".join(f"--{name}" for name in missing)
        raise RequestError(
            f"init asks for {', '.join(missing)}, and there is no terminal to ask at",
            "standard input",
            f"rlhf init --yes takes the defaults of what is not given by {named}",
        )
    for name, check in checks.items():
        if given[name] is None:
            given[name] = DEFAULTS[name] if request.arguments.yes else _asked(name, check)
    data, model = _sources(given["data"]), _model(given["model"])
    return data, model, _machine(given["for"])


def _asked(name: str, check: Callable[[str], object]) -> str:
    """Ask until the answer passes its check."""
    print(_QUESTIONS[name])
    while True:
        try:
            answer = input(f"--{name} [{DEFAULTS[name]}] ").strip() or DEFAULTS[name]
        except EOFError:
            print()
            raise RequestError("the input ended before an answer", "standard input", "rlhf init --yes") from None
        try:
            check(answer)
        except RequestError as error:
            print(printable_lines(str(error)))
        else:
            return answer


def _machine(answer: str) -> str:
    if answer not in MACHINES:
        raise RequestError(f"--for is {answer!r}", "command line", f"--for {' or '.join(MACHINES)}")
    return answer


def _model(answer: str) -> _Model:
    """Split ``NAME@COMMIT``; raise a RequestError for a model that ``rlhf plan`` or the stage model would refuse."""
    base, _, revision = answer.rpartition("@") if "@" in answer and not is_local(answer) else (answer, "", "")
    if base not in KNOWN_WORDS and is_local(base):
        base = _plain(base)
        if not Path(base).expanduser().is_dir():
            raise RequestError(f"there is no folder {base}", "--model", "name a folder with a model, or NAME@COMMIT")
        check_model(Path(base).expanduser())
    try:
        ModelSettings(base=base, revision=revision or None)
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise RequestError(reason, "--model", "--model owner/name@COMMIT, or a folder") from None
    return _Model(base, revision or None)


def _plain(path: str) -> str:
    """Return a path whose first name is no ~: pathlib drops ./ before it, and would take it for a home folder."""
    hidden = not path.startswith("~") and str(Path(path)).startswith("~")
    return str(Path.cwd() / path) if hidden else path


def _sources(answer: str) -> dict[str, str | None] | None:
    """Return the files of each kind of records in a folder; None for movie snippets.

    Raises:
        RequestError: there is no such folder, or it lacks a kind, or has two files of one.
    """
    if answer == MOVIE_SNIPPETS:
        return None
    folder = Path(_plain(answer)).expanduser()
    if not folder.is_dir():
        raise RequestError(f"there is no folder {answer}", "--data", f"name a folder with data, or {MOVIE_SNIPPETS}")
    found = {kind: _source(folder, kind) for kind in ("demonstrations", "comparisons", "prompts", "judge")}
    lacking = [kind for kind in ("demonstrations", "comparisons") if found[kind] is None]
    if lacking:
        what = f"the folder has no {' and no '.join(lacking)}"
        then = f"a file for each, such as {lacking[0]}.jsonl (or .json, .parquet, a folder {lacking[0]}/)"
        raise RequestError(what, str(folder), then)
    # Demonstrations have prompts, which is what PPO needs where nobody brought others.
    found["prompts"] = found["prompts"] or found["demonstrations"]
    return {kind: None if path is None else str(path) for kind, path in found.items()}


def _source(folder: Path, kind: str) -> Path | None:
    names = {kind + suffix for suffix in ("", *FILE_SUFFIXES)}
    named = [path for path in sorted(folder.iterdir()) if path.name.casefold() in names]
    for path in named:
        if not path.is_file() and not path.is_dir():
            what = f"{path.name} is neither a file nor a folder, nor a link to one"
            raise RequestError(what, str(folder), "remove it, or name another folder")
    paths = [path for path in named if path.is_file() or any(path.iterdir())]
    if len(paths) > 1:
        listed = ", ".join(path.name for path in paths)
        raise RequestError(f"the folder has {kind} more than once: {listed}", str(folder), "leave one there")
    return paths[0] if paths else None


def _filled(name: str, data: dict[str, str | None] | None, model: _Model, machine: str) -> str:
    """Return the template filled in; on a cluster with whole paths, since other nodes have other working folders."""
    from jinja2 import Environment, StrictUndefined

    def written(path: str | None) -> str:
        if path is None:
            return "null"
        local = path not in KNOWN_WORDS and Path(path).expanduser().exists()
        path = str(Path(path).expanduser().absolute()) if local and machine == "cluster" else path
        try:
            path.encode()
        except UnicodeEncodeError as error:
            what = "the path is not in UTF-8, and a pipeline file could not name it"
            raise RequestError(what, path, "rename it, or name a link to it") from error
        return scalar(path)

    template = files("rlhf").joinpath("cli", "init.yaml.jinja").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701 - writes YAML
    return environment.from_string(template).render(
        name=name,
        machine=machine,
        store=written(str(Path("store").absolute())),
        sources=data and {kind: written(path) for kind, path in data.items()},
        model=written(model.base),
        revision=json.dumps(model.revision) if model.revision else None,
    )


def _is_ours(path: Path, title: str) -> bool:
    """Return whether there is no file at a path, or a schema of this title, which init wrote before."""
    if not os.path.lexists(path):
        return True
    if not path.is_file():
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("title") == title


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        RequestError: the folder is not there or cannot be written.
    """
    try:
        with temporary_beside(path) as part:
            part.write_text(text, encoding="utf-8")
            part.replace(path)
    except OSError as error:
        if is_no_room(error):
            raise
        then = "name a file in a folder that you can write: rlhf init PATH"
        raise RequestError(f"the file cannot be written: {error.strerror}", str(path), then) from error
