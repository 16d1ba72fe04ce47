"""PPO, GRPO or RLOO where the optimum is known: ``python -m benchmarks.closed_form [--stage grpo] [--engine vllm]``.

A tiny GPT-2 with five tokens answers with one token (a bandit) or with three (a chain), so that all its responses can
be listed, and with them the optimal policy (:mod:`benchmarks.exact`). For each case and β: the total variation distance
to it of the policy that the stage exports. The exit status is 1 if a distance is more than 0.02 (ppo) or 0.03.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import arms
from benchmarks.exact import Reward, distance_to_optimum
from benchmarks.pipelines import Pipeline, function, opened, write_rows
from benchmarks.tiny_models import save_gpt2

BETAS = (0.3, 0.5, 1.0)
LARGEST_DISTANCE = {"ppo": 0.02, "grpo": 0.03, "rloo": 0.03}
PROMPT = "x"


@dataclass(frozen=True)
class Case:
    """Something to learn, and how the penalty enters."""

    name: str
    reward: Reward
    limit: int
    """Longest response, in tokens."""
    overrides: tuple[str, ...]
    """Of the stage's settings."""


CASES = (
    Case("bandit, k1 in the reward", arms.bandit, 1, ()),
    # The gradient of k2 is that of the KL for responses of the present policy only: one update on each rollout.
    Case("bandit, k2 in the loss", arms.bandit, 1, ("kl.place=loss", "kl.estimator=k2")),
    Case(
        "chain, k1 in the reward",
        arms.chain,
        3,
        ("epochs=4", "iterations=200", "rollouts=512", "policy_learning_rate=5e-3"),
    ),
)


def save_reference(folder: Path, heads: int = 2) -> None:
    """Write a model of a prompt and two arms that prefers some of its five tokens, depending on the tokens before."""
    save_gpt2(f"{PROMPT}ab", folder, layers=1, width=32, heads=heads, context=16, spread=0.3, seed=6)


def inputs(folder: Path, stage: str, engine: str) -> list[str]:
    """Write the reference and the sources; return the overrides that name them, and the engine of rollouts."""
    sources = {
        "prompts": {"prompt": PROMPT},
        # Required by the data stage; not read here.
        "demonstrations": {"prompt": PROMPT, "completion": "a"},
        "comparisons": {"prompt": PROMPT, "chosen": "a", "rejected": "b"},
    }
    files = {kind: write_rows(folder / f"{kind}.jsonl", [row]) for kind, row in sources.items()}
    # On a CPU vLLM's attention has heads of 32 and more.
    save_reference(folder / "reference", heads=1 if engine == "vllm" else 2)
    overrides = [f"model.base={folder / 'reference'}", f"{stage}.rollout.engine={engine}"]
    return [*(f"data.{kind}={file}" for kind, file in files.items()), *overrides]


def distance(pipeline: Pipeline, stage: str, case: Case, beta: float, sources: list[str]) -> float:
    """Train, and measure how far from the optimum."""
    # Of those that do not run too: a reward that is not set is a stage that the file lacks.
    rewards = [f"{name}.rewards={function('arms.py', case.reward.__name__)}" for name in LARGEST_DISTANCE]
    settings = [
        f"sampling.max_new_tokens={case.limit}",
        f"kl.coef={beta}",
        *case.overrides,
    ]
    overrides = [*sources, *rewards, *(f"{stage}.{setting}" for setting in settings)]
    reference, policy = pipeline.run(overrides, "model", stage)
    return distance_to_optimum(policy, reference, PROMPT, case.limit, case.reward, beta)


def main() -> int:
    """Run all cases and print the distances."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where results are kept; nowhere if not given")
    parser.add_argument("--stage", choices=sorted(LARGEST_DISTANCE), default="ppo", help="that trains")
    parser.add_argument("--engine", choices=("native", "vllm"), default="native", help="that samples responses")
    arguments = parser.parse_args()
    missed, largest = 0, LARGEST_DISTANCE[arguments.stage]
    with opened(Path(__file__).with_suffix(".yaml"), arguments.folder) as pipeline:
        sources = inputs(pipeline.folder / "inputs", arguments.stage, arguments.engine)
        for case in CASES:
            for beta in BETAS:
                start = time.monotonic()
                measured = distance(pipeline, arguments.stage, case, beta, sources)
                missed += measured > largest
                verdict = "" if measured <= largest else f"  missed: at most {largest}"
                seconds = time.monotonic() - start
                print(f"{case.name}  β {beta}  total variation {measured:.4f}  ({seconds:.0f} s){verdict}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
