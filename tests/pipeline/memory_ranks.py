"""A rank of ``tests.zero.groups`` that trains a policy by the engine and writes how many bytes were alive."""

import gc
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from rlhf.models.heads import TokenLogprobs, compute_in_fp32
from rlhf.zero.engine import Engine, sharded_loading
from tests.pipeline.live_bytes import LiveBytes

SIZES = (1, 2)
"""Ranks of the groups."""
ROWS, TIME, RESPONSE = 4, 64, 32


def main(rank: int, world: int, folder: Path) -> None:
    """Write the bytes after the first step, and the most in an update and in a step, as JSON."""
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", meeting, rank=rank, world_size=world, timeout=timedelta(minutes=5))
    torch.manual_seed(0)
    with LiveBytes() as live:
        with sharded_loading("bf16"):
            model: Any = AutoModelForCausalLM.from_pretrained(folder.parent / "model", dtype=torch.bfloat16)
        compute_in_fp32(model.get_output_embeddings())
        ids = torch.randint(0, model.config.vocab_size, (ROWS, TIME))
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        engine = Engine(TokenLogprobs(model), "bf16", learning_rate=1e-3)
        measured: dict[str, int] = {}
        for _ in range(3):
            live.take_peak()
            logprobs, _ = engine(ids, mask, RESPONSE, 1.0, False)
            engine.backward(logprobs.mean(), last=True)
            del logprobs
            measured["update"] = live.take_peak()
            engine.step(1e-3)
            measured["step"] = live.take_peak()
            gc.collect()
            measured["standing"] = live.now
    (folder / f"bytes-{rank}.json").write_text(json.dumps(measured))
