"""Score texts by reward models under ZeRO-3, on one rank: ``python -m tests.rewards.scoring FOLDER``.

``FOLDER/rows.json`` holds prompts and responses; every reward model in ``FOLDER/models`` scores them in batches of one
and of four, and ``FOLDER/scores.json`` gets the scores by model and batch size.
"""

import json
import os
import sys
from pathlib import Path

# Before DeepSpeed is imported by whatever comes below.
os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__

from rlhf.models.micro_batches import MicroBatch
from rlhf.models.reward import FrozenReward


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    __compatible_ops__["deepspeed_shm_comm"] = False
    meeting = f"file://{folder / 'meeting'}"
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=meeting, rank=0, world_size=1)
    rows = json.loads((folder / "rows.json").read_text())
    scores = {
        model.name: {
            str(size): FrozenReward(model, "fp32", MicroBatch(size)).score(rows["prompts"], rows["responses"]).tolist()
            for size in (1, 4)
        }
        for model in (folder / "models").iterdir()
    }
    (folder / "scores.json").write_text(json.dumps(scores))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
