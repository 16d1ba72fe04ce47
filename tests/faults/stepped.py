"""A store whose every operation on its storage is a moment at which something else may happen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from rlhf.store import Backend, Store
from rlhf.store.backend import LocalBackend


class _Stepped:
    def __init__(self, backend: Backend, before: Callable[[int], None]) -> None:
        self._backend, self._before, self._count = backend, before, 0

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._backend, name)

        def stepped(*arguments: Any, **named: Any) -> Any:
            self._count += 1
            self._before(self._count)
            return operation(*arguments, **named)

        return stepped


def stepped(root: Path, before: Callable[[int], None]) -> Store:
    """Open a store that calls ``before`` with the number of each operation, from 1, just before it."""
    return Store(root, cast("Backend", _Stepped(LocalBackend(root), before)))
