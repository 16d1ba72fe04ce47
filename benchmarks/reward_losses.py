"""Which loss makes the best reward model: every loss on the same responses, with the same computation, three seeds.

    python -m benchmarks.reward_losses [section.field=value ...]     hours on two cores, half an hour on a GPU

The quickstart's reward model, with 110 blocks to learn from and 80 held out. Prints means and deviations over the
seeds; docs/reward-model.md has the table.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

PIPELINE = Path("reward-losses.yaml")
SEEDS = (0, 1, 2)
SHOWN = ("eval/accuracy", "eval/accuracy_confident", "eval/kendall_tau", "eval/calibration_error")
COMMON: dict[str, Any] = {
    "uses": "rm",
    "precision": "bf16",
    "tuning": {"method": "lora", "rank": 16, "alpha": 32},
    "sees": "response",
    "optimizer": {"learning_rate": 1e-3},
    "max_length": 128,
    "eval_pairs": 20_000,
}
# 64 responses a step, in pairs and in lists.
PAIRS = {"responses_per_list": 2, "batch_size": 32, "micro_batch_size": 32}
LISTS = {"responses_per_list": 8, "batch_size": 8, "micro_batch_size": 8}
LOSSES: dict[str, dict[str, Any]] = {
    "pairs-without-margin": PAIRS | {"margin": 0.0},
    "pairs": PAIRS,
    "lists-without-margin": LISTS | {"margin": 0.0},
    "lists": LISTS,
    "soft-strengths": LISTS | {"loss": "soft-strengths"},
    "soft-share": LISTS | {"loss": "soft-share"},
    "listwise": LISTS | {"loss": "listwise"},
    "regression": LISTS | {"loss": "regression", "centering": 0.0},
}
SNIPPETS = {
    "demonstrations": 10,
    "demonstrations_heldout": 1,
    "comparisons": 110,
    "comparisons_heldout": 80,
    "prompts": 1,
    "prompts_heldout": 1,
    "judge": 1,
}


def main(overrides: list[str]) -> None:
    """Train them all, and print a line for each loss."""
    instances = {f"{name}-{seed}": COMMON | loss | {"seed": seed} for name, loss in LOSSES.items() for seed in SEEDS}
    PIPELINE.write_text(json.dumps({"data": {"snippets": SNIPPETS}, "model": {}, "rank": {}} | instances, indent=1))
    program = [sys.executable, "-m", "rlhf"]
    subprocess.run([*program, "run", *instances, *overrides, "--config", str(PIPELINE)], check=True)
    status = subprocess.run(
        [*program, "status", "--json", *overrides, "--config", str(PIPELINE)], check=True, capture_output=True
    )
    metrics = {stage["stage"]: stage["metrics"] for stage in json.loads(status.stdout)["stages"]}
    print(f"{'':22}" + "".join(f"{name.removeprefix('eval/'):>24}" for name in SHOWN))
    for name in LOSSES:
        values = np.array([[metrics[f"{name}-{seed}"][shown] for shown in SHOWN] for seed in SEEDS])
        cells = zip(values.mean(axis=0), values.std(axis=0, ddof=1), strict=True)
        print(f"{name:22}" + "".join(f"{f'{mean:.3f} ± {deviation:.3f}':>24}" for mean, deviation in cells))


if __name__ == "__main__":
    main(sys.argv[1:])
