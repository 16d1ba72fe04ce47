"""What a stage computes in: what its settings say, or fp32 on a CPU that has no instructions for bf16."""

from dataclasses import replace
from typing import Any

import torch

from rlhf.attempt.context import Context
from rlhf.zero import group

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
    if precision_of(context) == "fp32" or group.all_true(_is_quick_in_bf16()):
        return context
    if group.is_main():
        context.note("computes in fp32, since this CPU has no instructions for bf16")
    return replace(context, settings=context.settings.model_copy(update={"precision": "fp32"}))


def _is_quick_in_bf16() -> bool:
    if group.device().type != "cpu":
        return True
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in BF16_INSTRUCTIONS)
