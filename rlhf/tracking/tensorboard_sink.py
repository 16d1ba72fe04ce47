"""TensorBoard: event files in ``tensorboard/<group>/<stage>-<key>`` of the folder that all runs share.

A resumed run adds a file, and TensorBoard drops the steps of the earlier ones that it repeats (``purge_step``).
Scalars are written as doubles: the older form is in single precision, which cannot count tokens.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.tracking.sinks import NOTHING, Bins, TrackedStage


class TensorBoardSink:
    """See the module."""

    title = "TensorBoard"

    def __init__(self, stage: TrackedStage) -> None:
        self._config = stage.config
        self._folder = stage.folder / "tensorboard" / stage.group / stage.run

    def start(self, resumed_at: int) -> int:
        """Begin an event file behind the steps of earlier ones, up to the checkpoint.

        The last step written is none of them: a kill may have cut it off.
        """
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from torch.utils.tensorboard import SummaryWriter

        files = sorted(self._folder.glob("events.out.tfevents.*"))
        events = (event for file in files for event in EventFileLoader(str(file)).Load())
        # The first event of a file has no summary, but the step from which earlier files are purged.
        written = max((event.step for event in events if event.HasField("summary")), default=0)
        last = min(written - 1, resumed_at)
        # In the first file too: TensorBoard takes only a second start for a restart.
        self._writer = SummaryWriter(str(self._folder), purge_step=last + 1)
        if last == NOTHING:
            self._text("settings", json.dumps(self._config, indent=2), step=0)
        return last

    def log(self, step: int, metrics: Mapping[str, float], at: float) -> None:
        """Write a row."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step, walltime=at, new_style=True, double_precision=True)
        self._writer.flush()

    def distributions(self, step: int, bins: Bins) -> None:
        """Write histograms; their moments are those of the bins' centres."""
        for name, (counts, edges) in bins.items():
            centres = (np.asarray(edges[1:]) + edges[:-1]) / 2
            self._writer.add_histogram_raw(
                name,
                min=edges[0],
                max=edges[-1],
                num=sum(counts),
                sum=float(centres @ counts),
                sum_squares=float(centres**2 @ counts),
                bucket_limits=list(edges[1:]),
                bucket_counts=list(counts),
                global_step=step,
            )

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write prompts and responses as text."""
        names = ("score", "ended", "prompt", "response")
        self._text("samples", "\n".join(json.dumps({name: row[name] for name in names}) for row in rows), step)

    def alert(self, step: int, name: str, line: str) -> None:
        """Write an alarm as text."""
        self._text(f"alarm/{name}", line, step)

    def finish(self) -> None:
        """Close the file."""
        self._writer.close()

    def _text(self, name: str, text: str, step: int) -> None:
        """Write a text, which TensorBoard reads as Markdown: indented lines are shown as they are."""
        self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), step)
