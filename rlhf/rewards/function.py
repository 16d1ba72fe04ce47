"""A reward that is a Python function of the user's: ``reward(prompts, responses) -> list[float]``."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import PreflightError
from rlhf.rewards.checked import checked_scores


class FunctionReward:
    """The function ``name`` of a Python file, ``file.py:name``."""

    def __init__(self, named: str) -> None:
        self._named = named
        self._function = load_function(named)

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        """One score a response.

        Raises:
            StageError: the function raised, or answered something else than one finite number a response.
        """
        return checked_scores(lambda: self._function(list(prompts), list(responses)), self._named, len(responses))


def load_function(named: str) -> Callable[..., Any]:
    """Import the file, under a name of its own, and pick the function.

    Raises:
        PreflightError: there is no such file or function, or the file cannot be imported.
    """
    file, _, name = named.rpartition(":")
    path = Path(file).expanduser().absolute()
    spec = importlib.util.spec_from_file_location(f"rlhf_reward_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise PreflightError(f"there is no file {file} with a reward function", str(path), "correct its path")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PreflightError(
            f"the file with the reward function cannot be imported: {type(error).__name__}: {error}",
            str(path),
            f"python {path}",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise PreflightError(f"{file} has no function {name}", str(path), f"define {name}(prompts, responses) there")
    return function
