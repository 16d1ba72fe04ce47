"""The ranks of a worker group: who they are, what they exchange, and the precision they compute in.

Every function here is a collective: all ranks must call it, in the same order.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.attempt.context import Context

T = TypeVar("T")


def rank() -> int:
    """This process's rank in its worker group."""
    return dist.get_rank()


def world_size() -> int:
    """How many ranks the worker group has."""
    return dist.get_world_size()


def is_main() -> bool:
    """Whether this is rank 0, which writes what is written once."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    dist.barrier()


def device() -> torch.device:
    """The device this rank computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def all_sum(value: Tensor) -> Tensor:
    """The sum of ``value`` over ranks, on every rank."""
    total = value.detach().clone().to(device())
    dist.all_reduce(total)
    return total


def all_max(value: Tensor) -> Tensor:
    """The largest of each entry of ``value`` over ranks, on every rank."""
    largest = value.detach().clone().to(device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def all_concatenated(shard: Tensor) -> Tensor:
    """The ranks' flat tensors, all of one length, one after the other, on every rank, on the CPU."""
    mine = shard.detach().to(device()).contiguous()
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine)
    return torch.cat(parts).cpu()


def from_main(compute: Callable[[], T]) -> T:
    """What ``compute`` returns on rank 0, on every rank; what it raises there is raised on every rank."""
    answer: list[Any] = [None, None]
    if is_main():
        try:
            answer[0] = compute()
        except Exception as error:  # noqa: BLE001 - raised again below, on all ranks alike
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, device=device())
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def all_true(condition: bool) -> bool:
    """Whether the condition holds on every rank."""
    flag = torch.tensor(float(condition), device=device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def spread(count: int, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute ``count`` rows together: each rank its share, the result whole on every rank, on the CPU.

    compute  of row indices: the rows at these indices, ``[len(indices), ...]``, of one shape on all ranks. Every rank
             computes equally many rows (some twice where the world size does not divide ``count``), so that
             collectives inside meet
    """
    return gather_rows(compute(my_rows(count)), count)


def my_rows(count: int) -> Tensor:
    """Return this rank's share of ``count`` row indices: every W-th, from its rank on.

    Every rank has equally many; the last row stands for the missing ones where W does not divide ``count``.
    """
    world = world_size()
    padded = -(-count // world) * world
    return torch.arange(padded).clamp(max=count - 1)[rank() :: world]


def gather_rows(rows: Tensor, count: int) -> Tensor:
    """Return all ranks' rows ``[count, ...]`` in order, on the CPU. A collective.

    rows  this rank's, of the indices of :func:`my_rows`
    """
    rows = rows.to(device()).contiguous()
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows)
    return torch.stack(parts, dim=1).flatten(0, 1)[:count].cpu()


def share_of(items: list[T]) -> list[T]:
    """This rank's items: every W-th, from its rank on. The length must be a multiple of the world size."""
    return items[rank() :: world_size()]


BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""As torch names them, on x86 and on ARM. Without any of them torch emulates bf16: on a CPU of two cores with AVX2, a
matrix product took 9 times as long as in fp32, and its gradients 20 times."""


def precision_of(context: Context[Any]) -> str:
    """What a stage computes in; one without such a setting has nothing that either would change."""
    return getattr(context.settings, "precision", "fp32")


def computable(context: Context[Any]) -> Context[Any]:
    """The context with the precision in its settings that all ranks compute in. A collective.

    A result made in fp32 in place of bf16 differs from it by bf16's rounding, which it is free of.
    """
    if precision_of(context) == "fp32" or all_true(_is_quick_in_bf16()):
        return context
    if is_main():
        context.note("computes in fp32, since this CPU has no instructions for bf16")
    return replace(context, settings=context.settings.model_copy(update={"precision": "fp32"}))


def _is_quick_in_bf16() -> bool:
    if device().type != "cpu":
        return True
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in BF16_INSTRUCTIONS)
