"""How an iteration's time grows: ``python -m benchmarks.growth [--out FOLDER] [--small]``.

Three series, each of runs of :mod:`benchmarks.ppo` in a process of their own: over the model's size, over the length of
responses, and over the number of rollouts. ``growth.json`` has their figures and is written after each run;
``growth.svg`` draws time and limit. ``--draw FOLDER`` draws the figures of an earlier call. ``--small`` takes sizes for
a CPU. Micro batches are as large as memory allows, but 3b, with checkpointed activations, has 8.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator

from benchmarks.limits import SHAPES

SERIES: dict[str, list[dict[str, Any]]] = {
    "size": [
        {"shape": "tiny", "rollouts": 128, "prompt": 256, "response": 256},
        {"shape": "135m"},
        {"shape": "1b", "rollouts": 128},
        {"shape": "3b", "activation-checkpointing": True, "micro-batch": 8},
    ],
    "response": [{"shape": "1b", "rollouts": 32, "response": length} for length in (128, 512, 2048, 4096)],
    "rollouts": [{"shape": "1b", "rollouts": count} for count in (32, 128, 512, 1024)],
}
SMALL: dict[str, list[dict[str, Any]]] = {
    "size": [{"shape": "tiny"}],
    "response": [{"shape": "tiny", "response": length} for length in (16, 64)],
    "rollouts": [{"shape": "tiny", "rollouts": count} for count in (4, 16)],
}
AXES = {
    "size": "model by parameters, 128 rollouts of 256 + 256 tokens",
    "response": "tokens of a response, 1b, 32 rollouts",
    "rollouts": "rollouts of 256 + 256 tokens, 1b",
}


def measured(flags: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the figures of a run of :mod:`benchmarks.ppo`; None where it failed, which its output says."""
    given = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "benchmarks.ppo", "--iterations=2", f"--json={file}", *given]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            print(done.stdout[-2000:], flush=True)
            return None
        return json.loads(file.read_text())


def place(series: str, flags: Mapping[str, Any]) -> float:
    """Return a run's place on its series' axis."""
    return SHAPES[flags["shape"]].parameters if series == "size" else flags[series]


def draw(runs: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw each series: whole iterations and their parts over the axis, and the limit."""
    names = [name for name in AXES if any(run["series"] == name for run in runs)]
    figure = Figure(figsize=(4.2 * len(names), 3.6), layout="constrained")
    panels: list[Any] = list(figure.subplots(1, len(names), squeeze=False)[0])
    for panel, name in zip(panels, names, strict=True):
        mine = [run for run in runs if run["series"] == name]
        places = [run["place"] for run in mine]
        for part, style in (("whole", "o-"), ("rollout", ".:"), ("score", "x:"), ("train", "+:")):
            panel.loglog(places, [run["parts"][part]["s"] for run in mine], style, label=part)
        panel.loglog(places, [run["parts"]["whole"]["limit, s"] for run in mine], "k--", label="limit of the whole")
        labels = [run["flags"]["shape"] if name == "size" else f"{run['place']:,}" for run in mine]
        panel.set_xticks(places, labels)
        panel.minorticks_off()
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        panel.set_xlabel(AXES[name])
        panel.set_ylabel("seconds an iteration")
        panel.grid(visible=True, which="major", alpha=0.3)
    panels[0].legend()
    figure.suptitle(runs[0]["device"])
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Run the series and draw them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for growth.json and growth.svg")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="draw the growth.json there, and run nothing")
    given = parser.parse_args()
    if given.draw:
        draw(json.loads((given.draw / "growth.json").read_text()), given.draw / "growth.svg")
        return
    given.out.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    known: dict[str, dict[str, Any] | None] = {}
    for series, settings in (SMALL if given.small else SERIES).items():
        for flags in settings:
            start, name = time.monotonic(), json.dumps(flags)
            # Series meet in a run.
            figures = known[name] = known[name] if name in known else measured(flags)
            if figures is None:
                continue
            parts = {row["part"]: row for row in figures["parts"]}
            device = figures["ceilings"]["device"]
            run = {"series": series, "place": place(series, flags), "flags": flags, "parts": parts, "device": device}
            runs.append(run)
            (given.out / "growth.json").write_text(json.dumps(runs, indent=1) + "\n")
            whole = parts["whole"]
            print(
                f"{series} {run['place']:g}: {whole['s']:.3g} s, limit {whole['limit, s']:.3g} s "
                f"({time.monotonic() - start:.0f} s)",
                flush=True,
            )
    draw(runs, given.out / "growth.svg")


if __name__ == "__main__":
    main()
