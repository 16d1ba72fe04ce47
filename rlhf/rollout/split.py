"""Rollouts of a policy of which no rank has room for a whole copy: several ranks hold one together."""

import os
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rlhf.attempt import liveness
from rlhf.config.stages import Precision
from rlhf.models import splitting
from rlhf.models.splitting import Peers
from rlhf.rollout.rollout import Generator
from rlhf.zero import group
from rlhf.zero.engine import gathered, trained, whole_shape

Weights = Sequence[tuple[str, nn.Parameter]]
_LAYER = re.compile(r"^.*?\.\d+\.")


def ranks_of_node() -> int:
    """Return the ranks that every node has; 1 where nodes have different numbers. A collective."""
    mine = torch.tensor(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    most, least = int(group.all_max(mine)), -int(group.all_max(-mine))
    return most if most == least else 1


def peers_of(ranks: int) -> Peers:
    """Return those with which this rank holds one copy: ``ranks`` that follow each other. A collective."""
    mine, _ = dist.new_subgroups(ranks)
    return Peers(mine, group.rank() % ranks, ranks)


class SplitGenerator(Generator):
    """Samples by transformers' models, from copies that several ranks of a node each hold together.

    Weights are handed over a layer at a time: whole on a rank is one layer, never the policy. A copy's ranks answer the
    same prompts by the same numbers, and get the same logits to the bit, so that they draw the same tokens.

    model  the policy, sharded and not yet under an engine, without an :func:`~rlhf.models.splittable.obstacle`
    ranks  that hold a copy; they divide those of a node
    """

    def __init__(
        self, folder: Path, model: Any, precision: Precision, temperature: float, at_once: int, ranks: int
    ) -> None:
        super().__init__(folder, precision, temperature, at_once, source=model)
        self.ranks, self._peers = ranks, peers_of(ranks)
        self._copy, self._parts = splitting.split(model, whole_shape, self._peers, group.device())
        self._filled = False

    def _present(self) -> Any:
        """Return the copy with the policy's present weights. A collective."""
        changed: Weights = trained(self._source) if self._filled else list(self._source.named_parameters())
        for layer in by_layer(changed):
            with gathered([weight for _, weight in layer]):
                for name, weight in layer:
                    self._parts[name].fill(self._copy.get_parameter(name), weight)
            liveness.beat()
        self._filled = True
        return self._copy


def by_layer(weights: Weights) -> Iterator[Weights]:
    """Yield the weights of each layer together, and those outside of layers one by one."""
    for _, layer in groupby(weights, lambda named: found[0] if (found := _LAYER.match(named[0])) else named[0]):
        yield list(layer)
