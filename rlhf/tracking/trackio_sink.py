"""trackio: a database in ``trackio/`` of the folder that all runs share, or the Space of ``TRACKIO_SPACE_ID``.

Samples are traces: conversations with their score. trackio writes on a thread of its own and reports its errors as
warnings in the log of rank 0, so that this sink is not switched off by them.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.tracking.sinks import Bins, TrackedStage


class TrackioSink:
    """See the module."""

    title = "trackio"

    def __init__(self, stage: TrackedStage) -> None:
        self._stage = stage

    def start(self, _resumed_at: int) -> int:
        """Start or continue the run."""
        stage = self._stage
        os.environ.setdefault("TRACKIO_DIR", str(stage.folder / "trackio"))
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        import trackio  # pyright: ignore[reportMissingImports]  an extra

        self._trackio: Any = trackio
        self._run: Any = trackio.init(
            stage.project,
            name=stage.run,
            group=stage.group,
            config=dict(stage.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return self._run._next_step - 1

    def log(self, step: int, metrics: Mapping[str, float], _at: float) -> None:
        """Send a row; trackio stamps it with its own time."""
        self._run.log(dict(metrics), step=step)

    def distributions(self, step: int, bins: Bins) -> None:
        """Send histograms."""
        arrays = {name: tuple(map(np.asarray, each)) for name, each in bins.items()}
        self._run.log({name: self._trackio.Histogram(np_histogram=each) for name, each in arrays.items()}, step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send each prompt with its response as a trace."""
        self._run.log({"samples": [self._trace(row) for row in rows]}, step=step)

    def alert(self, step: int, name: str, line: str) -> None:
        """Send an alarm."""
        self._run.alert(title=f"alarm {name}", text=line, step=step)

    def finish(self) -> None:
        """Close the run, which waits for what is still to be written."""
        self._run.finish()

    def _trace(self, row: Mapping[str, Any]) -> Any:
        prompt = row["prompt"]
        asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        said = {"role": "assistant", "content": row["response"]}
        return self._trackio.Trace([*asked, said], metadata={"score": row["score"], "ended": row["ended"]})
