"""What a stage reports its metrics to: the metrics file always, a W&B run beside it on request."""

from collections.abc import Mapping

from rlhf.tracking.metrics_log import MetricsLog
from rlhf.tracking.wandb_run import WandbRun


class Tracker:
    """Sends every metric to the file first, which must not fail, and then to W&B, which may. Rank 0 alone has one."""

    def __init__(self, metrics_log: MetricsLog, wandb_run: WandbRun | None = None) -> None:
        self.metrics_log = metrics_log
        self.wandb_run = wandb_run

    def rewind(self, step: int) -> None:
        """Continue after a step: later rows leave the file. W&B keeps both drawings of a repeated step."""
        self.metrics_log.rewind(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report metrics under their step, an update or an iteration as the stage counts."""
        self.metrics_log.log(step, metrics)
        if self.wandb_run is not None:
            self.wandb_run.log(step, metrics)

    def finish(self, *, failed: bool = False) -> None:
        """Close the W&B run, within a bounded time; the file needs no closing."""
        if self.wandb_run is not None:
            self.wandb_run.finish(failed=failed)
