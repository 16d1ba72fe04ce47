"""Stages of a few lines that need neither torch nor data: words, a count of them, and a total that may misbehave."""

import json
import os
import time
from pathlib import Path
from typing import Any, Literal

from rlhf.attempt.context import Context
from rlhf.config.base import Settings, runtime, semantic, source
from rlhf.config.stages import WorkerSettings
from rlhf.errors import PreflightError, RecordError
from rlhf.pipeline.stage import Input, Stage, taking

Behaviour = Literal["well", "refuses", "raises", "exits", "pickles", "writes nothing", "returns nan", "returns nothing"]
GATE_SECONDS = 60


class StyleSettings(Settings):
    """A nested section."""

    upper: bool = semantic(False)
    """Write in capitals."""
    verbose: bool = runtime(False)
    """Changes nothing."""


class WordsSettings(Settings):
    """What is written."""

    left: str = semantic("one two")
    """The left text."""
    right: str = semantic("three")
    """The right text."""
    file: str | None = source(None)
    """A file that is read."""
    style: StyleSettings = semantic(StyleSettings())
    """How it is written."""
    seed: int = semantic(0, ge=0)
    """Seed."""
    label: str = runtime("")
    """Changes nothing."""


class CountSettings(Settings):
    """How words are counted."""

    step: int = semantic(1, ge=1)
    """What a word counts."""


class TotalSettings(Settings):
    """How the total is made."""

    factor: float = semantic(1.0)
    """What the count is multiplied with."""
    behaviour: Behaviour = runtime("well")
    """What goes wrong."""
    gate: str | None = runtime(None)
    """A file that is waited for; beside it, ``.started`` tells that the stage runs."""


class GroupSettings(Settings):
    """A stage of workers."""

    workers: WorkerSettings = runtime(WorkerSettings())
    """Its ranks."""
    check: Literal["refuses", "raises"] = runtime("refuses")
    """What its preflight does."""


class MeetSettings(Settings):
    """A stage of workers that waits for another one."""

    mine: str = semantic()
    """A file that it makes."""
    other: str = semantic()
    """The file of the other, which it waits for."""
    fails: bool = runtime(False)
    """What it does then."""
    seconds: float = runtime(0.0)
    """How long it goes on."""
    workers: WorkerSettings = runtime(WorkerSettings(cpus=1))
    """Its ranks."""


def words(context: Context[WordsSettings]) -> dict[str, float]:
    settings = context.settings
    content = Path(settings.file).read_text() if settings.file else ""
    for side, text in {"left": settings.left, "right": settings.right}.items():
        written = text.upper() if settings.style.upper else text
        (context.output / side).mkdir()
        (context.output / side / "text.txt").write_text(written + content)
    context.note(f"wrote {settings.left!r}")
    return {"words/sides": 2.0}


def count(context: Context[CountSettings]) -> dict[str, float]:
    found = len((context.inputs["words"] / "text.txt").read_text().split()) * context.settings.step
    (context.output / "count.json").write_text(json.dumps(found))
    return {"count/words": float(found)}


def total(context: Context[TotalSettings]) -> dict[str, float]:
    settings = context.settings
    wait_for(settings.gate)
    value = json.loads((context.inputs["count"] / "count.json").read_text()) * settings.factor
    context.note("about to write")
    context.progress("adding up", 1, 2)
    match settings.behaviour:
        case "well":
            (context.output / "config.json").write_text(json.dumps(value))
        case "refuses":
            raise RecordError("a row is malformed", "rows.jsonl:7", "correct it")
        case "raises":
            raise KeyError("no such thing")
        case "exits":
            print("last words", flush=True)
            os._exit(7)
        case "pickles":
            (context.output / "weights.pkl").write_bytes(b"")
        case "writes nothing":
            pass
        case "returns nan":
            (context.output / "config.json").write_text("{}")
            return {"total/value": float("nan")}
        case "returns nothing":
            (context.output / "config.json").write_text("{}")
            return None  # type: ignore[return-value] - what a careless stage does
    return {"total/value": value}


def wait_for(gate: str | None) -> None:
    if gate is None:
        return
    Path(f"{gate}.started").write_text(str(os.getpid()))
    end = time.monotonic() + GATE_SECONDS
    while not Path(gate).exists():
        if time.monotonic() > end:
            raise TimeoutError(gate)
        time.sleep(0.02)


def group(context: Context[GroupSettings]) -> dict[str, float]:
    raise AssertionError(f"{context.stage} must not run")


def meet(context: Context[MeetSettings]) -> dict[str, float]:
    """Ends well only if another stage runs at the same time."""
    mine, other = Path(context.settings.mine), Path(context.settings.other)
    mine.touch()
    end = time.monotonic() + GATE_SECONDS
    while not other.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{other} never came")
        time.sleep(0.02)
    if context.settings.fails:
        raise RecordError("the first of two fails", "rows.jsonl:1", "correct it")
    time.sleep(context.settings.seconds)
    (context.output / "config.json").write_text("{}")
    return {}


def check_group(context: Context[GroupSettings]) -> dict[str, float]:
    """A preflight, which sees the inputs that the stage will have, and says so."""
    found = json.loads((context.inputs["policy"] / "config.json").read_text())
    if context.settings.check == "refuses":
        raise PreflightError(f"a policy of {found} is too small", "group", "train a larger one")
    raise ValueError("a mistake in the check itself")


def _words_sources(settings: Any) -> dict[str, str]:
    return {"file": settings.file} if settings.file else {}


WORDS = Stage("words", 1, WordsSettings, "tests.pipeline.toys:words", "data", inputs=taking(), sources=_words_sources)
COUNT = Stage("count", 1, CountSettings, "tests.pipeline.toys:count", "data", inputs=taking(words="words/left"))
TOTAL = Stage(
    "total",
    1,
    TotalSettings,
    "tests.pipeline.toys:total",
    "policy",
    inputs=taking(count=Input("count", ("data",))),
)
GROUP = Stage(
    "group",
    1,
    GroupSettings,
    "tests.pipeline.toys:group",
    "policy",
    inputs=taking(policy="total"),
    runs="workers",
    preflight="tests.pipeline.toys:check_group",
)
MEET = Stage("meet", 1, MeetSettings, "tests.pipeline.toys:meet", "policy", inputs=taking(), runs="workers")
KNOWN = {stage.name: stage for stage in (WORDS, COUNT, TOTAL, GROUP)}
