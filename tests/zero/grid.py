"""Every way of fine-tuning in every stage, in a group: ``python -m tests.zero.grid RANK WORLD_SIZE FOLDER``.

Starting a group costs more than all runs together. Rank 0 keeps what each run gave in ``FOLDER/grid.pt``.
"""

import gc
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__

from rlhf.models import folders
from rlhf.rollout.sampling import answers
from rlhf.training import checkpoint_writer
from rlhf.zero import group
from tests.zero.resuming import STAGES, KilledError, attempt_of, context_of, forget, killed_after, outcome

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "top": {"method": "top", "blocks": 1},
    "bottom-frozen": {"method": "bottom-frozen", "blocks": 1},
    "gradual": {"method": "gradual", "every": 1, "decay": 2.0},
    "transfer": {"method": "transfer"},
    "lora": {"method": "lora", "rank": 4, "dropout": 0.1},
    "lora of some modules": {"method": "lora", "rank": 4, "targets": ["q_proj", "down_proj"], "rslora": True},
    "dora": {"method": "lora", "rank": 4, "dora": True},
    "pissa": {"method": "lora", "rank": 4, "init": "pissa"},
    "prompt": {"method": "prompt", "tokens": 4, "text": "a film of joy"},
    "p-tuning": {"method": "p-tuning", "template": [2, " film", 2]},
    "prefix": {"method": "prefix", "tokens": 4, "hidden_size": 16},
    "p-tuning-v2": {"method": "p-tuning-v2", "tokens": 4},
    "ia3": {"method": "ia3"},
}
SHORT: dict[str, dict[str, Any]] = {
    "sft": {"epochs": 1, "checkpoint_every": 1, "optimizer": {"learning_rate": 1e-2, "warmup_fraction": 0.0}},
    "rm": {"epochs": 1, "checkpoint_every": 1, "optimizer": {"learning_rate": 1e-2, "warmup_fraction": 0.0}},
    "ppo": {"iterations": 2, "epochs": 1, "minibatches": 2, "value_warmup": 0, "average_decay": None},
}
IDS = [[5, 17, 40, 41, 99, 60, 61, 4]]


def run(name: str, method: dict[str, Any], data: Path, folder: Path) -> dict[str, Any]:
    """Run a stage in one go, and killed after its first checkpoint and gone on with; then a next stage from the result."""
    known = STAGES[name].settings(data)
    settings = type(known).model_validate(known.model_dump() | SHORT[name] | {"tuning": method})
    stage = replace(STAGES[name], settings=lambda _: settings)
    context = context_of(name, stage, data, folder)
    whole = attempt_of(context, folder / "whole", ())
    found: dict[str, Any] = {"unbroken": outcome(stage, whole)}

    first = attempt_of(context, folder / "killed", ())
    with suppress(KilledError), killed_after(1):
        stage.run(first)
    forget()
    found["killed at"] = checkpoint_writer.step_of(checkpoint_writer.newest_complete([first.attempt]))
    found["resumed"] = outcome(stage, attempt_of(context, folder / "resumed", first.attempts))

    role = "policy" if name == "ppo" else "base"
    after = attempt_of(replace(context, inputs=dict(context.inputs) | {role: whole.output}), folder / "next", ())
    found["next"] = outcome(stage, after)
    if group.is_main():
        with torch.no_grad():
            model = folders.load(whole.output, scores=name == "rm", dtype=torch.float32).eval()
            ids = torch.tensor(IDS)
            found["logits"] = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if name != "rm":
            found["answer"] = answers(whole.output, ["a film"], 1.0, 4, seed=0)
    return found


def main(rank: int, world_size: int, folder: Path) -> None:
    """Run the grid together with the other ranks."""
    torch.set_num_threads(1)
    gc.freeze()  # as a worker does
    # DeepSpeed would compile its shared-memory collectives, which takes half a minute.
    __compatible_ops__["deepspeed_shm_comm"] = False
    meeting = f"file://{folder / 'meeting'}"
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=meeting, rank=rank, world_size=world_size)
    found: dict[str, Any] = {}
    chosen = os.environ.get("CELLS", "").split(",")
    import traceback

    for name in SHORT:
        for label, method in METHODS.items():
            if chosen != [""] and f"{name}/{label}" not in chosen and name not in chosen and label not in chosen:
                continue
            start = time.process_time()
            try:
                found[f"{name}: {label}"] = r = run(
                    name, method, folder.parent, folder / f"{name}-{label}".replace(" ", "-")
                )
                same = all(torch.equal(r["resumed"]["weights"][k], v) for k, v in r["unbroken"]["weights"].items())
                key = {"sft": "loss", "rm": "loss", "ppo": "objective/kl"}[name]
                print(
                    f"{name}: {label}: {time.process_time() - start:.1f} s",
                    "resumed" if same else "NOT RESUMED",
                    r["killed at"],
                    [round(x.get(key, 9), 5) for x in r["unbroken"]["rows"]],
                    [round(x.get(key, 9), 5) for x in r["next"]["rows"]],
                    r.get("answer"),
                    flush=True,
                )
            except Exception as e:
                traceback.print_exc()
                from tests import accelerator

                accelerator.forget()
                print(f"{name}: {label}: FAILED {type(e).__name__} {str(e)[:300]}", flush=True)
                if world_size > 1:
                    raise
    if group.is_main():
        torch.save(found, folder / "grid.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ |= {"RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": sys.argv[2]}
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
