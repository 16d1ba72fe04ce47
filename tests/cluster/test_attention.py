"""On a GPU: the attention kernels that a worker computes with.

cuDNN's gives queries that may see no key a gradient that is no number, in some shapes: see ``rlhf/cluster/worker.py``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# In a process of its own: the kernels are chosen for a whole process, and the process group too.
ATTEND = """
import torch
import torch.distributed as dist
from rlhf.cluster.worker import Call, prepare_deepspeed

prepare_deepspeed(Call("", None, gpu=True))
samples, heads, width, channels = 64, 9, 64, 64
queries, keys, values = (
    torch.randn(samples, heads, width, channels, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for _ in range(3)
)
real = torch.arange(width, device="cuda") >= torch.randint(1, 32, (samples, 1), device="cuda")
mask = torch.ones(width, width, dtype=torch.bool, device="cuda").tril() & real[:, None, :]
states = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None])
states.backward(torch.randn_like(states) * real[:, None, :, None])
print(all(bool(torch.isfinite(tensor.grad).all()) for tensor in (queries, keys, values)))
dist.destroy_process_group()
"""


@pytest.mark.gpu
def test_padding_on_the_left_has_a_gradient_that_is_a_number() -> None:
    """At the width of 64, where cuDNN's kernel has none."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    done = subprocess.run(
        [sys.executable, "-c", ATTEND],
        cwd=ROOT,
        env=os.environ | alone,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout.split()[-1:] == ["True"], done.stdout + done.stderr
