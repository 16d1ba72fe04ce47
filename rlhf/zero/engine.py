"""A model sharded by ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, §5), trained or frozen.

In stage 3 every weight is sharded from the moment it is read. In stages 1 and 2 weights are whole on every rank, and a
frozen model is a plain module.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import safe_get_local_fp32_param, set_z3_leaf_modules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.config.stages import Precision
from rlhf.config.zero import BUCKET, ZeroSettings
from rlhf.errors import DivergedError, PreflightError
from rlhf.zero import group, shards

STAGE_3 = ZeroSettings()
DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Keeps early, tiny second moments from making huge steps: Huang et al. 2024 (arXiv:2403.17031).
ADAM_EPSILON = 1e-5

_groups: Any = deepspeed_groups
_make_secondary_group = _groups._create_zero_param_parallel_group


def _make_secondary_group_once(ranks: int) -> None:
    if _groups._get_zero_param_intra_parallel_group() is None:
        _make_secondary_group(ranks)


# DeepSpeed makes the ranks' group of a secondary partition for every model that is read, and refuses the second time.
_groups._create_zero_param_parallel_group = _make_secondary_group_once


def deepspeed_config(precision: Precision, zero: ZeroSettings, **overrides: Any) -> dict[str, Any]:
    """Return DeepSpeed's configuration for this group of ranks; ``overrides`` are top-level fields."""
    zero = zero.of_ranks(group.world_size())
    defaults = {"contiguous_gradients": True, "overlap_comm": True, "reduce_bucket_size": BUCKET}
    sharding: dict[str, Any] = defaults | zero.sharding
    sharding["stage"] = zero.stage
    # Gloo has no asynchronous reduction to overlap with.
    sharding["overlap_comm"] &= torch.cuda.is_available()
    offloads = {"offload_optimizer": zero.offload_optimizer, "offload_param": zero.offload_parameters}
    for name, device in offloads.items():
        more: dict[str, Any] = sharding.pop(name, {})
        if device != "none":
            path = {"nvme_path": str(zero.nvme_path)} if device == "nvme" else {}
            sharding[name] = more | {"device": device} | path
    if zero.secondary_partition > 1:
        sharding["zero_hpz_partition_size"] = zero.secondary_partition
    own = {
        "zero_optimization": sharding,
        "bf16": {"enabled": precision == "bf16"},
        # In bf16, which has three digits, a sum over micro batches or ranks loses gradients that are small beside it.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # It knows torch's AdamW, and not a subclass that leaves groups out.
        "zero_allow_untested_optimizer": True,
        # torch's AdamW computes on the host too; DeepSpeed's needs a compiler there.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    return zero.others | own | overrides


@contextmanager
def sharded_loading(precision: Precision, zero: ZeroSettings = STAGE_3) -> Generator[None]:
    """Inside, ``from_pretrained`` in stage 3 shards each weight as it reads it: no rank holds the whole model."""
    # transformers keeps only a weak reference: the configuration acts for as long as this variable exists.
    sharded = zero.of_ranks(group.world_size()).stage == 3
    config = HfDeepSpeedConfig(deepspeed_config(precision, zero)) if sharded else None
    try:
        yield
    finally:
        del config


@contextmanager
def plain_linear() -> Generator[None]:
    """Inside, ``torch.nn.functional.linear`` is torch's own again.

    Sharded loading replaces the function for the whole process by a slower one, which a whole model does not need and
    would pay for at every token.
    """
    replaced = nn.functional.linear
    # DeepSpeed keeps torch's function there from the first replacement on.
    nn.functional.linear = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", replaced)
    try:
        yield
    finally:
        nn.functional.linear = replaced


def checkpoint_activations(model: nn.Module) -> None:
    """Keep of each layer's activations its input alone, and compute the rest again in the backward pass.

    transformers' own switch acts in training mode alone, in which PPO's models never are. The layer's ``forward`` is
    replaced and not its call: DeepSpeed's hooks gather its weights outside, once for the backward pass.

    Raises:
        PreflightError: the model has no layers that transformers knows how to compute again.
    """
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise PreflightError(
            f"{type(model).__name__} has no layers whose activations can be computed again",
            "activation_checkpointing",
            "leave activation_checkpointing out",
        )
    for layer in layers:
        layer.forward = partial(_checkpointed, layer.forward)


def _checkpointed(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    return checkpoint(forward, *arguments, use_reentrant=False, **named)


def mark_leaves(model: nn.Module) -> None:
    """Gather each decoder layer as a whole: hooks on every linear layer cost more than the mathematics."""
    names = {
        name
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
        for name in (getattr(part, "_no_split_modules", None) or ())
    }
    present = {type(part).__name__ for part in model.modules()}
    if names & present:
        set_z3_leaf_modules(model, sorted(names & present))
    for part in model.modules():
        # A leaf gathers its weights again for the backward pass when a gradient reaches its input: with frozen
        # embeddings that never happens in the first layer, whose weights would be missing.
        if isinstance(part, PreTrainedModel) and hasattr(part, "get_input_embeddings"):
            part.enable_input_require_grads()
            break


@dataclass(frozen=True)
class Schedule:
    """When a weight begins to train, and how fast."""

    first_step: int = 0
    """The optimiser step, counted from 0, from which it trains."""
    share: float = 1.0
    """Its learning rate as a share of the model's."""
    part: str = ""
    """The model that it belongs to, where several are parts of one module and take steps of their own."""


def set_schedule(parameter: nn.Parameter, schedule: Schedule) -> None:
    """Give a weight a schedule; :class:`GradualAdamW` and :func:`unfreeze` follow it."""
    vars(parameter)["schedule"] = schedule


def trained(module: nn.Module, part: str = "") -> list[tuple[str, Any]]:
    """Return the weights that train, now or later, by name; of all parts, or of one."""
    return [
        (name, parameter)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad or "schedule" in vars(parameter)
        if not part or vars(parameter).get("schedule", Schedule()).part == part
    ]


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return the optimiser's groups of the weights that train, those of one schedule in each."""
    groups: dict[Schedule, list[nn.Parameter]] = {}
    for _, parameter in trained(module):
        groups.setdefault(vars(parameter).get("schedule", Schedule()), []).append(parameter)
    return [{"params": parameters, "schedule": schedule} for schedule, parameters in groups.items()]


def unfreeze(module: nn.Module, step: int, turn: str = "") -> None:
    """Let those weights require a gradient whose schedule has begun at optimiser step ``step``.

    turn  the part whose weights may; "" for all
    """
    for _, parameter in trained(module):
        if schedule := vars(parameter).get("schedule"):
            parameter.requires_grad_(_takes_steps(schedule, step, turn))


def _takes_steps(schedule: Schedule, step: int, turn: str) -> bool:
    return schedule.first_step <= step and turn in ("", schedule.part)


class GradualAdamW(torch.optim.AdamW):
    """AdamW whose groups each take their first step when their ``schedule`` says, so with moments that begin there.

    steps  optimiser steps taken so far, which the caller counts
    turn   the part whose groups take steps; "" for all
    """

    steps = 0
    turn = ""

    def step(self, closure: Any = None) -> Any:
        """Take a step with the groups that have begun; DeepSpeed calls it once for each group."""
        groups = self.param_groups
        # Taking their gradients away would take DeepSpeed's buffers, where it offloads in stages 1 and 2.
        self.param_groups = [one for one in groups if _takes_steps(one["schedule"], self.steps, self.turn)]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


class Engine:
    """A module under ZeRO, in eval mode; with a learning rate, AdamW trains the weights that require a gradient.

    name                      the module's name in errors
    activation_checkpointing  as :func:`checkpoint_activations`
    """

    def __init__(
        self,
        module: nn.Module,
        precision: Precision,
        *,
        name: str = "model",
        learning_rate: float | None = None,
        max_grad_norm: float = 1.0,
        zero: ZeroSettings = STAGE_3,
        activation_checkpointing: bool = False,
    ) -> None:
        zero = zero.of_ranks(group.world_size())
        self._name = name
        self._finite: list[Tensor] = []
        if activation_checkpointing:
            checkpoint_activations(module)
        optimizer = None
        if learning_rate is not None:
            groups = parameter_groups(module)
            optimizer = GradualAdamW(groups, lr=learning_rate, eps=ADAM_EPSILON, weight_decay=0.0, fused=True)
        elif zero.stage != 3:
            self._engine = self.module = module.to(group.device()).eval()
            return
        else:
            zero = zero.model_copy(update={"offload_optimizer": "none"})
        if zero.stage == 3:
            mark_leaves(module)
        config = deepspeed_config(precision, zero, gradient_clipping=max_grad_norm)
        self._engine: Any = deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
        self.module: Any = self._engine.module
        # In training too: with dropout, layer drop or router noise, two passes over the same tokens differ, which PPO
        # would take for a change of the policy. Gradients flow in either mode.
        self._engine.eval()
        self._optimizer = optimizer
        self._turn = ""
        self._follow_schedule()

    def _follow_schedule(self) -> None:
        if self._optimizer is not None:
            self._optimizer.steps, self._optimizer.turn = self._engine.global_steps, self._turn
            unfreeze(self.module, self._engine.global_steps, self._turn)

    def take_turn(self, part: str) -> None:
        """Let the weights of one part alone require a gradient and take the steps that follow; "" for all parts.

        DeepSpeed takes the gradients of the others for zeros, so that they count in no norm.
        """
        self._turn = part
        self._follow_schedule()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run the module's forward pass."""
        return self._engine(*arguments, **named)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro batch's gradients.

        loss  this rank's and micro batch's *share of a sum*: DeepSpeed averages over ranks, which is undone here
        last  whether :meth:`step` comes next
        """
        # Read in :meth:`step`: reading here would wait for the GPU at every micro batch.
        self._finite.append(torch.isfinite(loss.detach()))
        # The boundary is set by hand: the caller decides for each update how many micro batches it has.
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * group.world_size())

    def step(self, learning_rate: float) -> float:
        """Take the optimiser step on what :meth:`backward` added up; return the gradients' norm before clipping.

        Raises:
            DivergedError: on every rank, when any rank's loss or the gradients' norm is not finite; no step was taken.
        """
        not_taken, advice = "the optimiser step was not taken", "lower the learning rates"
        name = self._turn or self._name
        finite = bool(torch.stack(self._finite).all())
        self._finite.clear()
        if not group.all_true(finite):
            raise DivergedError(f"the {name}'s loss is not a finite number; {not_taken}", "", advice)
        for parameters in self._engine.optimizer.param_groups:
            parameters["lr"] = learning_rate * parameters["schedule"].share
        # DeepSpeed takes no step where the norm over all ranks is not finite.
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise DivergedError(f"the {name}'s gradients are not finite numbers; {not_taken}", "", advice)
        self._follow_schedule()
        return norm

    def trained_shards(self, module: nn.Module, part: str = "") -> Iterator[tuple[str, Tensor]]:
        """Yield the name of every trained weight, as :func:`trained`, and this rank's fp32 shard of it, flat and of one
        length on all ranks.

        A collective in stages 1 and 2, where DeepSpeed cuts the weights at other places.

        module  the engine's, or a part of it, whose names are meant
        """
        for name, parameter in trained(module, part):
            if hasattr(parameter, "ds_id"):
                begun = parameter.requires_grad
                parameter.requires_grad_(True)  # DeepSpeed returns nothing of a weight that does not train yet
                shard = safe_get_local_fp32_param(parameter)
                parameter.requires_grad_(begun)
            else:
                shard = shards.equal_shard(self._engine.optimizer, parameter)
            yield name, shard

    def checkpoint_bytes(self) -> int:
        """Return about how many bytes all ranks write in :meth:`save`."""
        return checkpoint_bytes(self.module)

    def save(self, folder: Path, name: str) -> None:
        """Write this rank's shards of the weights that train and of the optimiser's state, of all parts."""
        shards.save(self._engine, trained(self.module), folder, name)

    def load(self, folder: Path, name: str) -> None:
        """Read what any number of ranks wrote in :meth:`save`; frozen weights stay as they are. A collective."""
        shards.load(self._engine, trained(self.module), folder, name)
        self._follow_schedule()


def checkpoint_bytes(module: nn.Module) -> int:
    """Return about how many bytes all ranks write of a trained module: weights in fp32, and Adam's two moments.

    module  under ZeRO already
    """
    return sum(whole_shape(weight).numel() * 3 * 4 for _, weight in trained(module))


def is_sharded(module: nn.Module) -> bool:
    """Return whether a module's weights lie in shards, as in stage 3."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a weight, which may be sharded."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextmanager
def gathered(parameters: list[nn.Parameter], *, modify: bool = False) -> Generator[None]:
    """Inside, the parameters are whole on every rank; with ``modify`` rank 0's changes are kept on all."""
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None):
        yield
    for parameter in parameters:
        if modify and not hasattr(parameter, "ds_id"):
            whole = parameter.detach().to(group.device())
            dist.broadcast(whole, src=0)
            parameter.data.copy_(whole)


def whole_weights(module: nn.Module, *, trained_only: bool) -> dict[str, Tensor]:
    """Return the module's weights by name, whole and on the CPU, on rank 0; empty elsewhere. A collective."""
    weights: dict[str, Tensor] = {}
    for name, parameter in trained(module) if trained_only else module.named_parameters():
        with gathered([parameter]):
            if group.is_main():
                weights[name] = parameter.detach().cpu().clone()
    return weights


def whole_weight(parameter: Any) -> Tensor:
    """Return a parameter's weights, whole and on this rank's device: with one rank, or unsharded, they are not copied.

    A collective.
    """
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    if group.world_size() == 1:
        return parameter.ds_tensor.detach().view(parameter.ds_shape).to(group.device())
    with gathered([parameter]):
        return parameter.detach().clone()


def whole_from_shards(module: nn.Module, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in the model's type, whole and on the CPU, on rank 0, from all ranks' shards. A collective.

    shards  laid out as those of :meth:`Engine.trained_shards`
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if name not in shards:
            continue
        whole, shape = group.all_concatenated(shards[name]), whole_shape(parameter)
        if group.is_main():
            weights[name] = whole[: shape.numel()].view(shape).to(parameter.dtype)
    return weights
