"""How far a reward model can be trusted: its score and an uninvolved judge's rating against KL, for three β.

    python -m benchmarks.overoptimisation run [section.field=value ...]     hours on two cores, minutes on a GPU
    python -m benchmarks.overoptimisation draw                              the picture of docs/ppo.md

Gao et al. 2022 (arXiv:2210.10760) found that the true reward rises with KL, turns, and falls, while the reward
that is optimised rises on. Here the optimised reward is the quickstart's reward model, and the true reward a judge
fitted on ratings of other snippets by other people. Every iteration's rollouts give a point.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rlhf.attempt.folder import AttemptFolder
from rlhf.config.pipeline import load_pipeline
from rlhf.models.evaluation import load_judge
from rlhf.pipeline.plan import plan
from rlhf.pipeline.stage import stages
from rlhf.store import Store

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
PIPELINE = Path("overoptimisation.yaml")
RESULTS = Path("overoptimisation.json")
PICTURE = Path(__file__).parents[1] / "docs" / "overoptimisation.svg"
BETAS = (0.0, 0.05, 0.2)
ROLLOUTS = 128
PPO: dict[str, Any] = {
    "uses": "ppo",
    "precision": "bf16",
    "tuning": {"method": "lora", "rank": 16, "alpha": 32},
    "iterations": 32,
    "rollouts": ROLLOUTS,
    "minibatches": 2,
    "sampling": {"temperature": 0.8, "max_new_tokens": 24},
    "policy_learning_rate": 1.0e-3,
    "value_learning_rate": 1.0e-3,
    "max_prompt_length": 96,
    "micro_batch_size": 64,
    "samples_kept": ROLLOUTS,
    "checkpoint_every": 8,
}


def name_of(beta: float) -> str:
    """The instance of PPO with this β."""
    return f"ppo-{beta:g}".replace(".", "_")


def run(overrides: list[str]) -> None:
    """Run PPO with each β on one SFT and one reward model, and write the ratings of every iteration's rollouts."""
    upstream = QUICKSTART.read_text().split("\nppo:")[0].replace("pipeline: quickstart", "pipeline: overoptimisation")
    instances = {name_of(beta): PPO | {"kl": {"coef": beta, "limit": 1000.0}} for beta in BETAS}
    PIPELINE.write_text(
        upstream + "\n" + "".join(f"{name}: {json.dumps(settings)}\n" for name, settings in instances.items())
    )
    command = [sys.executable, "-m", "rlhf", "run", *instances, "--config", str(PIPELINE), *overrides]
    subprocess.run(command, check=True)
    write_results(overrides)


def write_results(overrides: list[str]) -> None:
    """Rate the rollouts of the committed runs."""
    known = stages()
    config = load_pipeline(PIPELINE, overrides, {name: stage.settings for name, stage in known.items()})
    store = Store.open(config.store.uri)
    planned = plan(config, known, store)
    record = planned["data"].record
    assert record is not None
    folder = Path("overoptimisation-judge")
    judge = load_judge(store.checkout(record.artifact, folder, "judge"))
    curves: dict[str, dict[str, list[float]]] = {}
    for beta in BETAS:
        if (record := planned[name_of(beta)].record) is None:
            continue
        attempt = AttemptFolder(store.root / "work" / record.key / record.attempt)
        rows = [json.loads(line) for line in attempt.metrics.read_text().splitlines()]
        samples = [json.loads(line) for line in attempt.samples.read_bytes().splitlines()]
        texts: dict[int, list[str]] = {}
        for sample in samples:
            if not sample.get("watched"):
                texts.setdefault(sample["step"], []).append(sample["response"])
        curves[f"{beta:g}"] = {
            "kl": [row["objective/kl"] for row in rows],
            "score": [row["objective/scores"] for row in rows],
            "judge": [float(np.mean(judge.rate(texts[row["step"]]))) for row in rows],
            "seconds": [row["time/rollout_s"] + row["time/score_s"] + row["time/train_s"] for row in rows],
            "first_kl": [row["policy/approxkl_first"] for row in rows],
        }
    RESULTS.write_text(json.dumps(curves))


def draw(curves: Mapping[str, Mapping[str, Sequence[float]]], file: Path) -> None:
    """Draw both curves of every β, smoothed over five iterations, against the square root of KL.

    curves  β to the "kl", "score" and "judge" of its iterations
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes: list[Any] = list(figure.subplots(1, 2, sharex=True))
    kernel = np.ones(5) / 5
    for beta, values in curves.items():
        smooth = {name: np.convolve(values[name], kernel, "valid") for name in ("kl", "score", "judge")}
        distance = np.sqrt(np.maximum(smooth["kl"], 0))
        for axis, name in zip(axes, ("score", "judge"), strict=True):
            axis.plot(distance, smooth[name], label=f"β = {beta}")
    axes[0].set(title="reward model, which is optimised", xlabel="√KL, √nats a response", ylabel="score, deviations")
    axes[1].set(title="judge, which is not", xlabel="√KL, √nats a response", ylabel="rating, -4 to 4")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Run or draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("run", "draw"))
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    if arguments.action == "run":
        run(arguments.overrides)
    else:
        draw(json.loads(RESULTS.read_text()), PICTURE)


if __name__ == "__main__":
    main()
