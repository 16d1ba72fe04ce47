"""What a rank of a group samples by vLLM, all ranks holding one copy: run by :mod:`tests.zero.groups`."""

import os
import socket
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__

from rlhf.models import folders
from rlhf.models.heads import TokenLogprobs
from rlhf.rollout.drawing import uniforms
from rlhf.rollout.vllm_sampling import Room, VllmSampler
from rlhf.zero import group
from rlhf.zero.engine import Engine, gathered, sharded_loading, trained

PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7], [10, 11, 12, 13]]


def main(rank: int, world_size: int, folder: Path) -> None:
    """Sample before an update and after it."""
    # vLLM makes groups of its own, which meet at an address.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    __compatible_ops__["deepspeed_shm_comm"] = False
    meeting = f"file://{folder / 'meeting'}"
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=meeting, rank=rank, world_size=world_size)
    port = group.from_main(lambda: port)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    model_folder = folder.parent / "tiny"
    with sharded_loading("fp32"):
        model = folders.load_policy(model_folder, torch.float32)
    Engine(TokenLogprobs(model), "fp32", learning_rate=1e-3)
    room = Room(len(PROMPTS), 64)
    sampler = VllmSampler(model_folder, "fp32", 0.7, room, fp32_head=True, source=model, ranks=world_size)
    noise = uniforms(3, range(len(PROMPTS)), 16)
    found = [sampler.sample(PROMPTS, noise)]
    for _, weight in trained(model):
        with gathered([weight], modify=True), torch.no_grad():
            weight.mul_(0.8)
    found.append(sampler.sample(PROMPTS, noise))
    torch.save(found, folder / f"found-{rank}.pt")
    dist.destroy_process_group()
