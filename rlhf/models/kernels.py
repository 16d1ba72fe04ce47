"""Kernels that compute a layer's many small operations at once, where a GPU and Liger are there."""

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from rlhf.models import safe_loading
from rlhf.models.layout import BASE, is_adapter
from rlhf.models.packable import has_fused_kernels
from rlhf.zero import group

_OUR_OWN = ("cross_entropy", "fused_linear_cross_entropy")
"""Liger's losses: ours are of chunks of tokens already."""


def fuse(folder: Path) -> None:
    """Let models of the folder's type that are loaded from now on normalise, rotate and gate in one kernel each.

    The results differ from transformers' own by rounding. It holds for this process, and is done for ranks with a GPU
    alone, where Liger is (``pip install 'rlhf-pipeline[liger]'``), and types of :data:`rlhf.models.packable.FUSED`.
    """
    if not group.on_gpu():
        return
    plain = folder / BASE if is_adapter(folder) else folder
    model_type = AutoConfig.from_pretrained(plain, **safe_loading.TOKENIZER).model_type
    if has_fused_kernels(model_type):
        patches: Any = import_module("liger_kernel.transformers.monkey_patch")
        apply = patches.MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]
        parts = [name for name in inspect.signature(apply).parameters if name != "model"]
        apply(**{name: name not in _OUR_OWN for name in parts})
