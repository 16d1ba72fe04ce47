"""Count the bytes of tensors that are alive, on a CPU, as ``torch.cuda.max_memory_allocated`` does on a GPU."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Context manager that counts storages made inside, each once, until they are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def take_peak(self) -> int:
        """Return the most bytes since the last call."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_identity(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            counts = isinstance(tensor, Tensor) and tensor.device.type != "meta"
            if counts and (key := _identity(tensor)) not in self._known | given:
                self._known.add(key)
                self.now += _storage(tensor).nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(_storage(tensor), self._gone, key, _storage(tensor).nbytes())
        return result

    def _gone(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.now -= count


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _identity(tensor: Tensor) -> int:
    return _storage(tensor)._cdata  # pyright: ignore[reportPrivateUsage] - the address of the data may be 0
