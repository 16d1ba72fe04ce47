"""accelerate's state, which is the process's."""

import gc
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState


def forget() -> None:
    """Begin the next trainer as a new process would."""
    # Private, but what accelerate's own tests use.
    states: list[Any] = [AcceleratorState, GradientState, PartialState]
    for state in states:
        state._reset_state()
    gc.collect()
