"""accelerate's state, which is the process's."""

import gc
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState


def forget() -> None:
    """Begin the next trainer as a new process would."""
    # Private, but what accelerate's own tests use.
    states: list[Any] = [AcceleratorState, GradientState, PartialState]
    for state in states:
        state._reset_state()
    gc.collect()


@contextmanager
def of_a_plain_script() -> Generator[None]:
    """Inside, a trainer is in no group and not under DeepSpeed, whatever this process was told, or trained before."""
    forget()
    with pytest.MonkeyPatch.context() as environment:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "ACCELERATE_USE_DEEPSPEED"):
            environment.delenv(name, raising=False)
        yield
    forget()
