"""Where metrics go: a file in the attempt, which must not fail, and sinks, which may (sinks.py)."""

from rlhf.tracking.metrics import MetricsLog, MetricsRow, read_metrics, with_floats
from rlhf.tracking.sinks import SinkThread, TrackedStage, check_installed, finish, start_sinks

__all__ = [
    "MetricsLog",
    "MetricsRow",
    "SinkThread",
    "TrackedStage",
    "check_installed",
    "finish",
    "read_metrics",
    "start_sinks",
    "with_floats",
]
