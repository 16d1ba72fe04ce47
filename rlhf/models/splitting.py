"""Split a causal language model over several ranks, each of which holds its part of the large matrices.

Of two matrices that follow each other the first is split by its outputs and the second by its inputs, so that both take
one sum over the ranks (Shoeybi et al. 2019, arXiv:1909.08053, §3). Which is which is said by transformers' plan for the
type of model. The parts here are plain tensors, which are filled from a model in training: transformers' own are
DTensors over all ranks of a job, filled from files.
"""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf.models.heads import body_of, unwrapped

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_WHOLE = ("replicate", "replicated_with_grad_allreduce")
_BY_OUTPUTS = ("colwise", "colwise_gather_output")
_BY_INPUTS = ("rowwise", "rowwise_split_input")


@dataclass(frozen=True)
class Peers:
    """The ranks that hold one model together."""

    group: Any
    """Theirs, of ``torch.distributed``."""
    rank: int
    """This process's number among them."""
    ranks: int

    def sum(self, values: Tensor) -> Tensor:
        """Replace values by their sum over the ranks, and return them. A collective, as the others are."""
        dist.all_reduce(values, group=self.group)
        return values

    def joined(self, values: Tensor, width: int) -> Tensor:
        """Return the ranks' values side by side in the last dimension, as far as ``width``."""
        values = values.contiguous()
        parts = [torch.empty_like(values) for _ in range(self.ranks)]
        dist.all_gather(parts, values, group=self.group)
        return torch.cat(parts, dim=-1)[..., :width]

    def least(self, value: int, device: torch.device) -> int:
        """Return the smallest of the ranks' integers."""
        smallest = torch.tensor(value, device=device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=self.group)
        return int(smallest)


@dataclass(frozen=True)
class Part:
    """Which part of a weight a rank holds.

    All ranks' parts are of one shape: beyond the weight's end they hold zeros.
    """

    peers: Peers
    dim: int | None = None
    """The dimension that is split; None for the whole weight."""
    first_alone: bool = False
    """Whether the first rank alone has the weight, and the others zeros: it is added to what is summed over ranks."""

    def of(self, whole: Tensor) -> Tensor:
        """Return a copy of a whole weight's part."""
        if self.first_alone and self.peers.rank:
            return torch.zeros_like(whole)
        if self.dim is None:
            return whole.clone()
        size = -(-whole.shape[self.dim] // self.peers.ranks)
        start = min(self.peers.rank * size, whole.shape[self.dim])
        own = whole.narrow(self.dim, start, min(size, whole.shape[self.dim] - start))
        part = whole.new_zeros([*whole.shape[: self.dim], size, *whole.shape[self.dim + 1 :]])
        part.narrow(self.dim, 0, own.shape[self.dim]).copy_(own)
        return part


def split(
    model: Any, shape_of: Callable[[nn.Parameter], torch.Size], peers: Peers, device: torch.device
) -> tuple[Any, dict[str, Part]]:
    """Return a copy of a model that computes with this rank's parts, and the part of each weight by name.

    The copy's weights are empty. With the parts in their place its forward pass is a collective, and returns the same
    logits on all ranks, to the bit.

    model     of a type that is splittable, with an adapter of LoRA or without one; its weights may be sharded
    shape_of  returns the shape of a whole weight
    """
    styles, parts = _styles(model), dict[str, Part]()
    for name, _ in model.named_parameters():
        owner = next((owner for owner in styles if name.startswith(f"{owner}.")), None)
        parts[name] = Part(peers) if owner is None else _part(peers, styles[owner], name.removeprefix(owner))
    shapes = {owner: shape_of(_weight(model.get_submodule(owner))) for owner in styles}
    empty = {id(weight): nn.Parameter(weight.new_empty(0), requires_grad=False) for weight in model.parameters()}
    copied = copy.deepcopy(model, empty).to(device).eval()
    for owner, style in styles.items():
        _exchange(copied.get_submodule(owner), style, shapes[owner], peers)
    return copied, parts


def _styles(model: Any) -> dict[str, str]:
    """Return how modules are split by their names in a model, which may be in PEFT's wrapper.

    The embeddings and the head, most of which plans leave to the class of the model, are split by tokens.
    """
    plain = unwrapped(model)
    body = body_of(plain)[1]
    plan: Mapping[str, str] = body.config.base_model_tp_plan
    names = {part: name for name, part in model.named_modules()}
    styles = {names[plain.get_input_embeddings()]: "embedding", names[plain.get_output_embeddings()]: "head"}
    for name, part in body.named_modules():
        style = plan.get(_NUMBER.sub(".*", name))
        if style is not None and names[part] not in styles and style not in _WHOLE:
            assert style in _BY_OUTPUTS + _BY_INPUTS, f"{name} is split as {style}"
            styles[names[part]] = style
    return styles


def _weight(module: Any) -> Any:
    return getattr(module, "base_layer", module).weight


def _part(peers: Peers, style: str, name: str) -> Part:
    """Return the part of a weight of a module that is split; of LoRA's two matrices one is split, the other whole."""
    if style in _BY_INPUTS:
        bias = name.endswith(".bias")
        return Part(peers, None if bias or ".lora_B." in name else 1, first_alone=bias)
    return Part(peers, None if ".lora_A." in name else 0)


def _exchange(module: Any, style: str, shape: torch.Size, peers: Peers) -> None:
    """Let a module's forward pass exchange what the ranks have of its inputs or outputs.

    shape  of the whole module's weight
    """
    if style == "embedding":
        module.padding_idx = None  # which torch would look for among this rank's rows; it matters to gradients alone
        module.forward = partial(_looked_up, module.forward, peers, -(-shape[0] // peers.ranks))
    elif style in ("head", "colwise_gather_output"):
        module.forward = partial(_joined, module.forward, peers, shape[0])
    elif style in _BY_INPUTS:
        inputs = -(-shape[1] // peers.ranks) if style == "rowwise_split_input" else None
        module.forward = partial(_summed, module.forward, peers, inputs)


def _looked_up(forward: Callable[[Tensor], Tensor], peers: Peers, size: int, ids: Tensor) -> Tensor:
    own = ids - peers.rank * size
    rows = forward(own.clamp(0, size - 1))
    return peers.sum(rows.masked_fill(((own < 0) | (own >= size))[..., None], 0.0))


def _joined(forward: Callable[[Tensor], Tensor], peers: Peers, width: int, states: Tensor) -> Tensor:
    return peers.joined(forward(states), width)


def _summed(forward: Callable[[Tensor], Tensor], peers: Peers, inputs: int | None, states: Tensor) -> Tensor:
    """Return the sum of the ranks' outputs.

    inputs  of this rank, where ``states`` are those of all ranks
    """
    if inputs is not None:
        own = states[..., peers.rank * inputs : (peers.rank + 1) * inputs]
        states = nn.functional.pad(own, (0, inputs - own.shape[-1]))
    return peers.sum(forward(states).contiguous())
