"""A parsed command line with its pipeline and store."""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from rlhf.config.loading import load_pipeline
from rlhf.config.pipeline import (
    PipelineConfig,
)
from rlhf.errors import RequestError
from rlhf.pipeline.plan import Planned, plan
from rlhf.pipeline.stage import stages
from rlhf.store import Store
from rlhf.terminal import (
    printable_lines,
)

DEFAULT_CONFIG = Path("configs/quickstart.yaml")


class Parser(argparse.ArgumentParser):
    """argparse with our errors and exit status."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise RequestError(message, "command line", f"{self.prog} --help")


class Request:
    """A parsed command line with its pipeline and store, loaded when first asked for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out = Console(highlight=False)
        words: Sequence[str] = getattr(arguments, "words", ())
        self.overrides = [word for word in words if "=" in word]
        self.names = [word for word in words if "=" not in word]
        self.known = stages()
        self._config: PipelineConfig | None = None
        self._store: Store | None = None

    @property
    def config(self) -> PipelineConfig:
        """The pipeline file with its overrides."""
        if self._config is None:
            types = {name: stage.settings for name, stage in self.known.items()}
            self._config = load_pipeline(self.arguments.config, self.overrides, types)
        return self._config

    def store(self, *, create: bool = False) -> Store:
        """The pipeline's store."""
        if self._store is None or create:
            notices = self._store.notices if self._store else []
            settings = self.config.store
            self._store = Store.open(settings.uri, create=create, scratch=settings.scratch)
            self._store.notices.extend(notices)
        return self._store

    def tell_notices(self) -> None:
        """Say on standard error what the store found damaged."""
        if self._store is not None:
            for notice in self._store.notices:
                print(printable_lines(notice), file=sys.stderr)

    def planned(self, targets: Sequence[str]) -> dict[str, Planned]:
        """Plan the targets, or where there are none the whole pipeline."""
        return plan(self.config, self.known, self.store(), targets)

    def planned_stage(self, name: str) -> Planned:
        """Plan a stage and what it needs, and return the stage."""
        return self.planned([name])[name]

    def answer(self, document: Any, show: Callable[[], None]) -> None:
        """Print one JSON document under ``--json``, or what ``show`` prints."""
        if self.arguments.json:
            print_exactly(json.dumps(document, indent=2, ensure_ascii=False), lambda: json.dumps(document, indent=2))
        else:
            show()


def print_exactly(text: str, in_ascii: Callable[[], str]) -> None:
    """Print a document for a program to read, in ASCII where standard output has not all of its characters."""
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = in_ascii()
    print(text)


def path_as_typed(path: Path) -> Path:
    """Return the path relative to the working folder, where it lies below that."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def command_line(request: Request, *words: str) -> str:
    """Return a command to type next: this program, the words, and the pipeline and settings of this call."""
    program = Path(sys.argv[0]).absolute()
    shown = str(path_as_typed(program)) if program.name == "rlhf" and shutil.which("rlhf") is None else "rlhf"
    path: Path = request.arguments.config
    option = [] if path == DEFAULT_CONFIG else ["--config", str(path)]
    return shlex.join([shown, *words, *request.overrides, *option])


def single_name(request: Request, what: str) -> str:
    """Return the only name on the command line.

    Raises:
        RequestError: there is none, or there are several.
    """
    if len(request.names) != 1:
        raise RequestError(f"exactly one {what} is needed", "command line", f"rlhf {request.arguments.command} --help")
    return request.names[0]
