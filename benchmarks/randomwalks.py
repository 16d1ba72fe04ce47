"""PPO, GRPO or RLOO on random walks: ``python -m benchmarks.randomwalks [--stage grpo] [--variant eos] [--seeds 3]``.

A small GPT-2 learns random walks on a graph by sft, then by ppo (``--stage``) to walk the shortest way to the goal
(:mod:`benchmarks.walks`). For each seed: mean optimality of fresh samples at temperature 1 after sft, after 80 and
after 160 optimiser steps of it, and of greedy walks after the latter. The exit status is 1 if a target is missed.

With ``--variant eos`` only walks count that end in EOS right at the goal.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks import walks
from benchmarks.pipelines import Pipeline, function, opened, write_rows
from benchmarks.tiny_models import save_gpt2
from rlhf.models.text import load_tokenizer

STAGES = ("ppo", "grpo", "rloo")
SAMPLES_PER_START = 100
OVERRIDES = {
    "plain": (f"rewards={function('walks.py', 'reward')}",),
    "eos": (f"rewards={function('walks.py', 'reward_for_stopping')}", "missing_eos_score=0"),
}


def inputs(folder: Path) -> list[str]:
    """Write the base model and the sources; return the overrides that name them."""
    _, known = walks.task()
    sources = {
        "demonstrations": ({"prompt": walk[0], "completion": walk[1:]} for walk in known),
        "prompts": ({"prompt": start} for start in walks.STARTS),
        # Required by the data stage; not read here.
        "comparisons": [{"prompt": walks.STARTS[0], "chosen": known[0], "rejected": known[1]}],
    }
    files = {kind: write_rows(folder / f"{kind}.jsonl", rows) for kind, rows in sources.items()}
    save_gpt2(walks.LETTERS, folder / "base", layers=6, width=144, heads=12, context=16, spread=0.02)
    return [
        *(f"{instance}.{kind}={file}" for instance in ("data", "starts") for kind, file in files.items()),
        f"model.base={folder / 'base'}",
    ]


@torch.no_grad()
def measured(folder: Path, variant: str, *, greedy: bool = False) -> float:
    """Mean optimality of a policy's walks from all starts; special tokens before EOS are no edges."""
    tokenizer = load_tokenizer(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    ids = tokenizer(list(walks.STARTS) * (1 if greedy else SAMPLES_PER_START), return_tensors="pt")["input_ids"]
    sampling: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(
            max_new_tokens=walks.LIMIT - 1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        ),
    )
    scores: list[float] = []
    for row in written.tolist():
        ended = tokenizer.eos_token_id in row
        walk = tokenizer.decode(row[: row.index(tokenizer.eos_token_id)] if ended else row)
        counts = variant == "plain" or (ended and walks.ends_at_goal(walk))
        scores.append(walks.optimality(walk) if counts else 0.0)
    return mean(scores)


def of_seed(pipeline: Pipeline, stage: str, variant: str, seed: int, sources: list[str]) -> dict[str, float]:
    """Train with a seed; return the figures by name."""
    # Of those that do not run too: a reward that is not set is a stage that the file lacks.
    names = [f"{name}{length}" for name in STAGES for length in ("", "_long")]
    rewards = [f"{name}.{override}" for name in names for override in OVERRIDES[variant]]
    sft, after_80, after_160 = pipeline.run([f"seed={seed}", *sources, *rewards], "sft", stage, f"{stage}_long")
    return {
        "after sft": measured(sft, variant),
        "80 steps": measured(after_80, variant),
        "160 steps": measured(after_160, variant),
        "greedy": measured(after_160, variant, greedy=True),
    }


def missed(stage: str, variant: str, rows: list[dict[str, float]]) -> list[str]:
    """The targets that the seeds' figures do not reach."""
    short, long, greedy = ([row[name] for row in rows] for name in ("80 steps", "160 steps", "greedy"))
    if variant == "eos":
        targets = {"160 steps: mean at least 0.95": mean(long) >= 0.95}
    elif stage != "ppo":
        targets = {"160 steps: mean at least 0.96": mean(long) >= 0.96}
    else:
        targets = {
            "80 steps: mean at least 0.93": mean(short) >= 0.93,
            "80 steps: each at least 0.90": min(short) >= 0.90,
            "160 steps: mean at least 0.965": mean(long) >= 0.965,
            "greedy: each 1": min(greedy) == 1,
        }
    return [name for name, reached in targets.items() if not reached]


def main() -> int:
    """Run all seeds and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stage", choices=STAGES, default="ppo", help="that trains")
    parser.add_argument("--variant", choices=sorted(OVERRIDES), default="plain")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--folder", type=Path, help="where results are kept; nowhere if not given")
    arguments = parser.parse_args()
    rows: list[dict[str, float]] = []
    with opened(Path(__file__).with_suffix(".yaml"), arguments.folder) as pipeline:
        sources = inputs(pipeline.folder / "inputs")
        for seed in range(arguments.seeds):
            start = time.monotonic()
            rows.append(of_seed(pipeline, arguments.stage, arguments.variant, seed, sources))
            figures = "  ".join(f"{name} {value:.4f}" for name, value in rows[-1].items())
            print(f"seed {seed}  {figures}  ({time.monotonic() - start:.0f} s)", flush=True)
    print("mean    " + "  ".join(f"{name} {mean(row[name] for row in rows):.4f}" for name in rows[0]))
    failed = missed(arguments.stage, arguments.variant, rows)
    for target in failed:
        print(f"missed: {target}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
