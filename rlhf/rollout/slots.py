"""The slots that responses are decoded in: a cache with a position of its own in each row, and each slot's state."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _SlotLayer(CacheLayerMixin):
    """Keys and values ``[slot, head, place, size]`` of one layer."""

    def __init__(self, keys: Tensor, values: Tensor, reach: "_Reach") -> None:
        super().__init__()
        self.keys, self.values, self._reach = keys, values, reach
        self.both = keys, values
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one token's keys and values in each row, and return those of the places that are read."""
        reach, rows = self._reach, len(key_states)
        for own, states in zip(self.both, (key_states, value_states), strict=True):
            width = own.shape[3]
            own.view(-1, width).index_copy_(0, reach.places[own.shape[1]], states.reshape(-1, width))
        keys, values = (own[:rows, :, : reach.length] for own in self.both)
        return keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the layer is there from the start."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 - transformers' signature
        """Return the number of columns that are read, and that they begin at the first."""
        return self._reach.length, 0

    def get_seq_length(self) -> int:
        """Return 0: rows differ, and every step is given its positions."""
        return 0

    def get_max_length(self) -> int:
        """Return the number of places."""
        return self.both[0].shape[2]


class _Reach:
    """Which places a step writes and reads."""

    def __init__(self, slots: int, length: int, heads: set[int], device: torch.device) -> None:
        self.length = 0
        """Places of a slot that are read."""
        self.places: dict[int, Tensor] = {}
        """The places of all slots' heads that are written, ``[row · head]``, by the number of heads."""
        # The first place of each slot and head.
        self._first = {count: torch.arange(slots * count, device=device).view(slots, count) * length for count in heads}

    def move_to(self, positions: Tensor, length: int) -> None:
        """Let each row write at its position, and all rows read the first ``length`` places."""
        self.length, rows = length, len(positions)
        self.places = {heads: (first[:rows] + positions[:, None]).flatten() for heads, first in self._first.items()}


class LayerShape(NamedTuple):
    """Heads and size of a head of a layer's keys, and of its values."""

    keys: tuple[int, int]
    values: tuple[int, int]


class Space:
    """The cache and the state of the slots, and what they have written.

    samples  most prompts of a call
    time     tokens of the longest response
    length   places of a slot
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        dtype: torch.dtype,
        device: torch.device,
        *,
        slots: int,
        samples: int,
        time: int,
        length: int,
    ) -> None:
        self.slots, self.samples, self.time, self.length = slots, samples, time, length
        # Zeros: a place that was never written may hold a number that makes 0 · inf of a masked one.
        zeros = [
            [torch.zeros(slots, heads, length, width, dtype=dtype, device=device) for heads, width in shape]
            for shape in shapes
        ]
        self.columns = torch.arange(length, device=device)
        self.reach = _Reach(slots, length, {heads for shape in shapes for heads, _ in shape}, device)
        self.layers = [_SlotLayer(keys, values, self.reach) for keys, values in zeros]
        self.cache = Cache(layers=list(self.layers))
        # Behind the samples a row that slots without a running sample write to, behind the time a column for the same.
        self.ids = torch.zeros(samples + 1, time + 1, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(samples + 1, time + 1, device=device)
        self.numbers = torch.zeros(samples + 1, time + 1, dtype=torch.float64, device=device)
        self.state = torch.zeros(5, slots, dtype=torch.long, device=device)
        """``[token, position, tokens written, sample, running]`` of each slot; the sample of none is their number."""
        self.graphs: dict[tuple[int, int], Any] = {}
        self.pool: Any = None
        self.aside: Any = None
        """The stream that graphs are captured on; one for all, since memory is kept for each."""

    def begin(self, numbers: Tensor, pad: int) -> None:
        """Empty the slots and what they have written."""
        self.ids.fill_(pad)
        self.logprobs.zero_()
        self.numbers[: len(numbers), : self.time] = numbers.to(self.numbers.device)
        self.state.zero_()
        self.state[3] = self.samples

    def put(self, slots: Tensor, states: Tensor) -> None:
        """Set the state of slots, ``[5, slot]``."""
        self.state[:, slots] = states

    def copy(self, slots: Tensor, layers: Iterable[tuple[Tensor, Tensor]], rows: Tensor) -> None:
        """Copy rows of other keys and values into slots, from the first place on."""
        for layer, others in zip(self.layers, layers, strict=True):
            for own, other in zip(layer.both, others, strict=True):
                own[slots, :, : other.shape[2]] = other[rows]

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Move slots."""
        self.copy(targets, [layer.both for layer in self.layers], sources)
        self.state[:, targets] = self.state[:, sources]

    @property
    def bytes(self) -> int:
        """Return the bytes of the cache."""
        return sum(own.numel() * own.element_size() for layer in self.layers for own in layer.both)
