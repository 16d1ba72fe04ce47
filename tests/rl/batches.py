"""Random batches of right-padded responses, in float64."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

# Infinities of both signs and NaN: none of them survives being multiplied by 0.
JUNK = (float("nan"), float("inf"), float("-inf"), 1e30)


@dataclass(frozen=True)
class Batch:
    """Response lengths, their mask ``[batch, time]``, and a source of further random tensors of that shape."""

    lengths: list[int]
    mask: Tensor
    generator: torch.Generator

    def tensor(self, scale: float = 1.0, junk: float | None = None) -> Tensor:
        """Normal values ``[batch, time]``, with ``junk`` in the padding."""
        values = torch.randn(self.mask.shape, generator=self.generator, dtype=torch.float64) * scale
        return values if junk is None else self.with_padding(values, junk)

    def with_padding(self, values: Tensor, junk: float) -> Tensor:
        """The same values, with ``junk`` in the padding."""
        return torch.where(self.mask, values, junk)


@st.composite
def batches(draw: st.DrawFn, min_length: int = 0) -> Batch:
    """Batches of 1 to 5 responses of up to 7 tokens; rows may be empty unless ``min_length`` says otherwise."""
    time = draw(st.integers(max(min_length, 1), 7))
    lengths = draw(st.lists(st.integers(min_length, time), min_size=1, max_size=5))
    mask = torch.arange(time)[None, :] < torch.tensor(lengths)[:, None]
    return Batch(lengths, mask, torch.Generator().manual_seed(draw(st.integers(0, 2**32))))
