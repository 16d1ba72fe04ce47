"""The command demo: a small pipeline that learns from rankings before one's eyes."""

import json
from importlib.resources import files
from pathlib import Path

from rich.text import Text

from rlhf.cli.run import DEMO, Request, bring_up_to_date, print_places, samples_of
from rlhf.errors import RequestError, is_no_room
from rlhf.history.reading import stage_history
from rlhf.pipeline.plan import Planned, result_of
from rlhf.terminal import printable_lines, samples_table
from rlhf.watching import curves

CURVE_LINES = 5
PROMPTS_SHOWN = 3
MEASURES = {"score": "score of the reward model", "judge": "rating by a judge that no stage trained against"}


def demo(request: Request) -> None:
    """Learn from rankings before your eyes, in a few minutes on two cores: writes rlhf-demo/ and runs it."""
    if request.names:
        raise RequestError("demo takes settings and no stages", "command line", "rlhf demo ppo.iterations=40")
    folder = DEMO.parent
    if not DEMO.exists():
        write_demo(folder)
    # First, since it refuses records that are gone.
    cached = all(planned.record for planned in request.planned([]).values())
    request.out.print(_introduction(folder))
    planned = bring_up_to_date(request, height=CURVE_LINES)
    _show(request, planned)
    print_places(request, planned)
    if cached:
        what = f"nothing had to run: all {len(planned)} results were in the store; delete {folder} to begin anew"
    else:
        what = f"with a setting changed only what depends on it runs: rlhf demo ppo.kl.coef=0.5; {DEMO} has the others"
    request.out.print(what, soft_wrap=True, markup=False)


def write_demo(folder: Path) -> None:
    """Write the records, and after them the pipeline file.

    Raises:
        RequestError: the folder cannot be written.
    """
    from rlhf.data.replies import write_records

    text = files("rlhf").joinpath("configs", DEMO.name).read_text(encoding="utf-8")
    part = DEMO.with_suffix(".part")
    try:
        write_records(folder)
        part.write_text(text, encoding="utf-8")
        part.replace(DEMO)
    except OSError as error:
        if is_no_room(error):
            raise
        what = f"the demo's files cannot be written: {error.strerror}"
        raise RequestError(what, str(folder.absolute()), "change to a folder that you can write: rlhf demo") from error


def _introduction(folder: Path) -> Text:
    """Return what will be learned, with the first ranking of the first customer."""
    with (folder / "comparisons.jsonl").open(encoding="utf-8") as file:
        first = json.loads(next(file))
    ranked = [first["responses"][index] for index in first["rankings"][0]]
    lines = [
        "A model made from nothing learns to answer a shop's customers. First it imitates the shop's old replies "
        "(sft), many of them rude. Three customers, who are simulated, have ranked replies; a reward model (rm) learns "
        "what they like, and ppo trains the model to please it.",
        "",
        f"One ranking, by {first['annotators'][0]}, of replies to: {first['prompt']}",
        *(f"  {place}. {response}" for place, response in enumerate(ranked, 1)),
        "",
    ]
    return Text(printable_lines("\n".join(lines)))


def _show(request: Request, stages: dict[str, Planned]) -> None:
    """Print the curves of ppo, held-out prompts with the replies before and after it, and by how much they improved."""
    store, out = request.store(), request.out
    history = stage_history(stages["ppo"], store)
    out.print(Text(f"\nppo, {len(history.metrics)} iterations", "bold"))
    out.print(curves(history.metrics, out.width, CURVE_LINES))
    out.print(Text("\nThe first held-out prompts, with the replies before ppo and after\n", "bold"))
    report = result_of(stages["evaluate"])
    out.print(samples_table(samples_of(report, store)[:PROMPTS_SHOWN]))
    out.print()
    for name, measure in MEASURES.items():
        if f"{name}/delta_low" in report.metrics:
            before, after, delta, low, high = (
                report.metrics[f"{name}/{part}"] for part in ("before", "after", "delta", "delta_low", "delta_high")
            )
            out.print(
                f"{measure}: {before:.2f} → {after:.2f}, by {delta:+.2f} (95 % interval {low:.2f} to {high:.2f})",
                soft_wrap=True,
            )
