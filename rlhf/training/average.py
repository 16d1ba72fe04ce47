"""An exponential moving average of a sharded model's weights: each rank averages its own shards, in fp32."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.zero import group
from rlhf.zero.engine import trained_shards, whole_from_shards


class MovingAverage:
    """After n updates: decay^n · first weights + (1 - decay) · Σ decay^(n - i) · weights after update i.

    Polyak and Juditsky 1992 average a stochastic approximation's iterates; the exponential window is that of Kingma and
    Ba 2015 (arXiv:1412.6980), section 7.2. Without its bias correction: the first weights are no zeros, and count.

    module  under ZeRO-3 already
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        self._shards: dict[str, Tensor] = {name: shard.detach().clone() for name, shard in trained_shards(module)}

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in."""
        for name, shard in trained_shards(self._module):
            self._shards[name].lerp_(shard, 1 - self._decay)

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights by name, whole and on the CPU, on rank 0; empty on the other ranks. A collective."""
        return whole_from_shards(self._module, self._shards)

    def checkpoint_bytes(self) -> int:
        """About what all ranks write in :meth:`save`."""
        return group.world_size() * sum(shard.nbytes for shard in self._shards.values())

    def save(self, checkpoint: Path) -> None:
        """Write this rank's shards."""
        save_file({name: shard.cpu() for name, shard in self._shards.items()}, self._file(checkpoint))

    def load(self, checkpoint: Path) -> None:
        """Go on from what :meth:`save` wrote."""
        for name, shard in load_file(self._file(checkpoint)).items():
            self._shards[name].copy_(shard)

    @staticmethod
    def _file(checkpoint: Path) -> Path:
        return checkpoint / f"average-{group.rank()}.safetensors"
