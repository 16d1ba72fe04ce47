"""A reward that is a Python function of the user's: ``reward(prompts, responses) -> list[float]``."""

import hashlib
import importlib.util
import inspect
import sys
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
            RewardError: the function raised, or answered something else than one finite number a response.
        """
        return checked_scores(lambda: self._function(list(prompts), list(responses)), self._named, len(responses))


def load_function(named: str, what: str = "reward", takes: str = "prompts, responses") -> Callable[..., Any]:
    """Import the file, under a name of its own, and pick the function.

    what   the function's use, for messages
    takes  its two arguments, for messages

    Raises:
        PreflightError: there is no such file or function, the file cannot be imported, or the function does not take
            two arguments.
    """
    file, _, name = named.rpartition(":")
    path = Path(file).expanduser().absolute()
    # Its place is part of the name: files of two folders may be called alike.
    module_name = f"rlhf_{what}_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise PreflightError(f"there is no file {file} with a {what} function", str(path), "correct its path")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look their module up there.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise PreflightError(
            f"the file with the {what} function cannot be imported: {type(error).__name__}: {error}",
            str(path),
            f"python {path}",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise PreflightError(f"{file} has no function {name}", str(path), f"define {name}({takes}) there")
    if not _takes_two(function):
        raise PreflightError(f"{name} cannot be called with {takes}", str(path), f"define {name}({takes})")
    return function


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind([], [])
    except TypeError:
        return False
    except ValueError:  # written in C without a signature: the first call tells
        return True
    return True
