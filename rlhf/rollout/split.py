"""Rollouts of a policy of which no rank has room for a whole copy: several ranks hold one together, or none does."""

import math
import os
import re
from collections.abc import Generator as Yields
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf.attempt import liveness
from rlhf.config.stages import Precision
from rlhf.models import splitting, text
from rlhf.models.splitting import Peers
from rlhf.rollout.drawing import Responses
from rlhf.rollout.rollout import Generator, Sampler
from rlhf.rollout.sampling import sample_in_batch
from rlhf.zero import group
from rlhf.zero.engine import gathered, whole_shape

Weights = Sequence[tuple[str, nn.Parameter]]
_LAYER = re.compile(r"^.*?\.\d+\.")


def ranks_of_node() -> int:
    """Return the ranks of a node, or the most that divide those of each where nodes differ. A collective."""
    mine = torch.tensor([int(os.environ.get("LOCAL_WORLD_SIZE", "1"))])
    return math.gcd(*group.all_concatenated(mine).tolist())


def peers_of(ranks: int) -> Peers:
    """Return those with which this rank holds one copy: ``ranks`` that follow each other. A collective."""
    mine, _ = dist.new_subgroups(ranks)
    return Peers(mine, group.rank() % ranks, ranks)


class SplitGenerator(Generator):
    """Samples by transformers' models, from copies that several ranks of a node each hold together.

    Weights are handed over a layer at a time before each rollout: whole on a rank is one layer, never the policy; and
    they are dropped after it, since memory is short. A copy's ranks answer the same prompts by the same numbers, and
    get the same logits to the bit, so that they draw the same tokens.

    model  the policy, sharded and not yet under an engine, without an :func:`~rlhf.models.splittable.obstacle`
    ranks  that hold a copy; they divide those of a node
    """

    def __init__(
        self, folder: Path, model: Any, precision: Precision, temperature: float, at_once: int, ranks: int
    ) -> None:
        super().__init__(folder, precision, temperature, at_once, source=model)
        self.ranks, self._peers = ranks, peers_of(ranks)
        self._copy, self._parts = splitting.split(model, whole_shape, self._peers, group.device())

    @property
    def holds_weights(self) -> bool:
        """Whether the weights that were taken last are still there."""
        return False

    def answer(self, prompts: Sequence[list[int]], noise: Tensor) -> Responses:
        """Sample a response to each prompt, with the ranks that hold the copy. A collective."""
        responses = super().answer(prompts, noise)
        for weight in self._copy.parameters():
            weight.data = weight.new_empty(0)
        return responses

    def _present(self) -> Any:
        """Return the copy with the policy's present weights. A collective."""
        for layer in by_layer(list(self._source.named_parameters())):
            with gathered([weight for _, weight in layer]):
                for name, weight in layer:
                    self._copy.get_parameter(name).data = self._parts[name].of(weight.detach())
            liveness.beat()
        return self._copy


class GatheredSampler(Sampler):
    """Samples through the layers of the sharded policy itself, which all ranks gather for every token.

    There is no copy, so that it takes any model, and little memory; its price is that the ranks hand each other all
    weights once for each token of a batch.

    module   of the policy's engine
    model    the policy, a part of the module
    at_once  prompts that one rank answers at a time
    """

    def __init__(self, folder: Path, module: nn.Module, model: Any, temperature: float, at_once: int) -> None:
        self.tokenizer = text.load_tokenizer(folder)
        self._module, self._model, self._temperature, self._at_once = module, model, temperature, at_once

    def take_weights(self) -> None:
        """Do nothing: the weights are the policy's own."""

    def answer(self, prompts: Sequence[list[int]], noise: Tensor) -> Responses:
        """Sample a response to each prompt, together with all ranks: none ends before the others. A collective."""
        tokens = {"eos_token_id": self.tokenizer.eos_token_id, "pad": self.tokenizer.pad_token_id}
        starts = range(0, len(prompts), self._at_once)
        with _called_through(self._module, self._model) as model:
            parts = [
                sample_in_batch(
                    model,
                    prompts[start : start + self._at_once],
                    noise[start : start + self._at_once],
                    self._temperature,
                    **tokens,
                    goes_on=lambda runs: not group.all_true(not runs),
                )
                for start in starts
            ]
        ids, logprobs = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return Responses(ids, logprobs)


class _Through:
    """A model that is called as a part of a module is."""

    def __init__(self, module: nn.Module, model: Any) -> None:
        self.config, self.device, self._module = model.config, group.device(), module

    def __call__(self, **inputs: Any) -> Any:
        return self._module(**inputs)


@contextmanager
def _called_through(module: nn.Module, model: Any) -> Yields[_Through]:
    """Inside, a module's forward pass is that of the model within.

    DeepSpeed begins to gather anew at a hook of the module that its engine was given.
    """
    own = vars(module).get("forward")
    vars(module)["forward"] = model
    try:
        yield _Through(module, model)
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


def by_layer(weights: Weights) -> Iterator[Weights]:
    """Yield the weights of each layer together, and those outside of layers one by one."""
    for _, layer in groupby(weights, lambda named: found[0] if (found := _LAYER.match(named[0])) else named[0]):
        yield list(layer)
