"""The ranks of a worker group: their numbers, exchanges and precision.

Functions that exchange are collectives: all ranks must call them, in the same order.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.attempt.context import Context
from rlhf.zero.apart import is_set_apart

T = TypeVar("T")


def rank() -> int:
    """Return this process's rank in its worker group."""
    return dist.get_rank()


def world_size() -> int:
    """Return the number of ranks in the worker group."""
    return dist.get_world_size()


def is_main() -> bool:
    """Return whether this is rank 0, which writes files of which there is one."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank calls it."""
    dist.barrier()


@contextmanager
def alone() -> Generator[None]:
    """Make this process a worker group of one, if it is in none: outside of stages, for functions that exchange."""
    if dist.is_initialized():
        yield
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] - it is documented there
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_gpu() -> bool:
    """Return whether this process is a rank that computes on a GPU."""
    return dist.is_initialized() and dist.get_backend() == "nccl"


def device() -> torch.device:
    """Return the device that this rank computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def all_sum(value: Tensor) -> Tensor:
    """Return the sum of ``value`` over ranks, on every rank."""
    total = value.detach().clone().to(device())
    dist.all_reduce(total)
    return total


def all_max(value: Tensor) -> Tensor:
    """Return the largest of each entry of ``value`` over ranks, on every rank."""
    largest = value.detach().clone().to(device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def all_concatenated(shard: Tensor) -> Tensor:
    """Concatenate the ranks' flat tensors of equal length, on every rank, on the CPU."""
    mine = shard.detach().to(device()).contiguous()
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine)
    return torch.cat(parts).cpu()


def from_main(compute: Callable[[], T]) -> T:
    """Return on every rank what ``compute`` returns on rank 0, or raise its error on every rank."""
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
    """Return whether the condition holds on every rank."""
    flag = torch.tensor(float(condition), device=device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def spread(count: int, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute ``count`` rows, each rank its share, and return them all on every rank, on the CPU.

    compute  returns the rows of given indices, ``[len(indices), ...]``, of one shape on all ranks. Every rank computes
             equally many rows (some twice where the world size does not divide ``count``): it may call collectives
    """
    return gather_rows(compute(my_rows(count)), count)


def my_rows(count: int, together: int = 1) -> Tensor:
    """Return this rank's share of ``count`` row indices: every W-th, from its rank on.

    Every rank has equally many; the last row is repeated where W does not divide ``count``.

    together  so many ranks that follow each other have the same share, and count as one
    """
    world = world_size() // together
    padded = -(-count // world) * world
    return torch.arange(padded).clamp(max=count - 1)[rank() // together :: world]


def gather_rows(rows: Tensor, count: int, together: int = 1) -> Tensor:
    """Return all ranks' rows ``[count, ...]`` in order, on the CPU. A collective.

    rows  this rank's, at the indices of :func:`my_rows`
    """
    rows = rows.to(device()).contiguous()
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows)
    return torch.stack(parts[::together], dim=1).flatten(0, 1)[:count].cpu()


def share_of(items: list[T]) -> list[T]:
    """Return this rank's items: every W-th, from its rank on. Their number must be a multiple of the world size."""
    return items[rank() :: world_size()]


BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""torch's names, on x86 and ARM. Without any of them torch emulates bf16: on a CPU of two cores with AVX2, a matrix
product took 9 times as long as in fp32, and its gradients 20 times."""


def precision_of(context: Context[Any]) -> str:
    """Return the precision that a stage computes in; fp32 where it has no such setting."""
    return getattr(context.settings, "precision", "fp32")


def computable(context: Context[Any]) -> Context[Any]:
    """Return the context with the precision that all ranks can compute in: fp32 if any has slow bf16. A collective.

    A result made in fp32 in place of bf16 differs from it by bf16's rounding, which it is free of.
    """
    if precision_of(context) == "fp32":
        return context
    capabilities = torch.cpu.get_capabilities() if device().type == "cpu" else {}
    if all_true(device().type != "cpu" or any(capabilities.get(name, False) for name in BF16_INSTRUCTIONS)):
        return context
    if is_main() and not is_set_apart():
        context.note("computes in fp32, since this CPU has no instructions for bf16")
    return replace(context, settings=context.settings.model_copy(update={"precision": "fp32"}))
