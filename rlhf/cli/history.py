"""Commands that show what a run does or did: watch, report, samples."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.cli.run import Request, path_as_typed, reported
from rlhf.errors import InterruptedRunError, NextCommand, RequestError
from rlhf.history.reading import Row, StageHistory, evaluated_samples, pipeline_history, prompt_text
from rlhf.terminal import Display
from rlhf.watching import Follower, detail, samples_view

SHOWN = 10
"""Samples that a terminal shows of many."""


def watch(request: Request) -> int | None:
    """Show a run of another process or machine, from the store alone, until it ends."""
    store = request.store()
    block = detail(store, lambda: request.out.width, here=False)
    try:
        with Display(request.out, list(request.planned(request.names)), detail=block) as display:
            Follower(request.names, lambda: request.planned(request.names), store, display).follow()
    except KeyboardInterrupt:
        return InterruptedRunError.exit_status
    return None


def report(request: Request) -> None:
    """Write a page that shows what the runs of the pipeline did."""
    out: str | None = request.arguments.out
    path = reported(request, request.planned(request.names), Path(out) if out else None)
    request.out.print(path_as_typed(path), soft_wrap=True, markup=False)


def samples(request: Request) -> None:
    """Show prompts and responses with their scores: rlhf samples [STAGE]."""
    if len(request.names) > 1:
        raise RequestError("samples takes one stage", "command line", "rlhf samples ppo")
    options = request.arguments
    if options.worst and options.best:
        raise RequestError("--worst and --best exclude each other", "command line", "give one of them")
    history, rows = _kept(request)
    found = _chosen(rows, options.iteration, options.prompt, options.worst, options.best)
    if not found:
        steps = sorted({row["step"] for row in rows if "step" in row})
        kept = f"iterations {steps[0]} to {steps[-1]}" if steps else "of no iteration"
        raise RequestError(
            f"no sample of {history.name} fits",
            f"{len(rows)} samples, {kept}",
            "another --iteration or --prompt; without either the last iteration is shown",
        )
    if request.answer({"stage": history.name, "key": history.planned.key, "samples": found}):
        return
    few = found if options.prompt is not None else found[:SHOWN]
    request.out.print(samples_view(few))
    if len(found) > len(few):
        request.out.print(f"\n{len(found) - len(few)} more: --json prints all, --worst and --best choose")


def _kept(request: Request) -> tuple[StageHistory, Sequence[Row]]:
    """Return the stage whose samples are asked for, or else the last that keeps samples as it trains; and they."""
    store, name = request.store(), request.names[0] if request.names else None
    histories = list(pipeline_history(request.planned(request.names), store).values())
    if name is not None:
        histories = [history for history in histories if history.name == name]
    for history in reversed(histories):
        if history.samples:
            return history, history.samples
    for history in reversed(histories):
        if history.planned.stage.kind == "report" and (rows := evaluated_samples(history.record, store).rows):
            return history, rows
    what = f"{name} has kept no samples" if name else "no stage has kept samples yet"
    why = f"{name} {histories[0].why}" if name else f"pipeline {request.config.name}"
    done = name is not None and histories[0].record is not None
    following = (
        "name evaluate, or the stage that tuned the policy" if done else NextCommand("run", (name,) if name else ())
    )
    raise RequestError(what, f"{why}; store {store.address}", following)


def _chosen(rows: Sequence[Row], iteration: int | None, prompt: str | None, worst: bool, best: bool) -> list[Row]:
    """Return the rows that fit; without an option those of the last iteration."""
    if iteration is None and prompt is None and not (worst or best):
        iteration = rows[-1].get("step")
    if iteration is not None:
        rows = [row for row in rows if row.get("step") == iteration]
    if prompt is not None:
        rows = [row for row in rows if prompt.casefold() in prompt_text(row["prompt"]).casefold()]
    if worst or best:
        return sorted(rows, key=lambda row: _rank(row["score"]), reverse=best)
    if prompt is not None:  # each prompt through the iterations, whose order sorting keeps
        return sorted(rows, key=lambda row: prompt_text(row["prompt"]))
    return list(rows)


def _rank(score: Any) -> float:
    """Return a score for sorting; one that is no number is the lowest."""
    return score if isinstance(score, (int, float)) and not math.isnan(score) else -math.inf
