"""Predict ppo on large clusters, on paper: ``python -m benchmarks.scale [--placement] [--json FILE]``.

For models of 8 B to 405 B parameters on 8 to 1,024 GPUs: the memory of a rank, which is ``rlhf doctor``'s prediction,
and the seconds of an iteration, in which policy, value, reward model and reference have one size and ZeRO-3 shards all.
An iteration's seconds are

- those of :mod:`rlhf.training.limits` for a rank's share of the samples on one H200's measured ceilings, divided by
  the share of the limit that one GPU reached (docs/performance.md);
- those of gathering weights: each rank receives a model once for a scoring pass, once for the copy that it samples
  from, and for each micro batch twice, before it sends its gradients once. With ``secondary_partition`` these come from
  its own node, but for the copy that samples and for the first pass after an optimiser step;
- those of saving a checkpoint, spread over the iterations between two.

The speeds of the network and of the store are assumptions, and named in the output: no machine of several nodes was
there to measure them.

``--placement`` compares ``ppo.placement``: together, and apart with the number of ranks that score which is the best.
"""

import argparse
import json
import math
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.limits import SHAPES, Shape, table
from rlhf.config.ppo import PpoSettings
from rlhf.models.footprint import Architecture
from rlhf.pipeline.memory import predict, with_micro_batch
from rlhf.training.limits import Ceilings, IterationModels, Part

LARGE = {
    "8b": SHAPES["8b"],
    "32b": Shape(5120, 64, 27648, 40, 8, 152064, head_dim=128, tied=False),
    "70b": Shape(8192, 80, 28672, 64, 8, 128256, head_dim=128, tied=False),
    "405b": Shape(16384, 126, 53248, 128, 8, 128256, head_dim=128, tied=False),
}
GPUS = (8, 64, 256, 1024)
NODE = 8
"""GPUs of a node."""
MEASURED = Ceilings("H200", 760e12, 4.1e12)
"""Of one H200, ``python -m benchmarks.ppo``."""
SHARES = {"rollout": 0.45, "score": 0.58, "train": 0.59}
"""Of the limit that one GPU reached, there too."""
ROLLOUTS, PROMPT, RESPONSE, MINIBATCHES = 1024, 512, 512, 4
INSIDE, BETWEEN = 300e9, 40e9
"""Bytes a second that a rank receives in a collective: of one node's ranks, by NVLink, and of several nodes', by one
400 Gbit/s adapter a GPU. Assumed."""
STORE = 10e9
"""Bytes a second that the shared file system takes from all ranks together. Assumed."""
BETWEEN_CHECKPOINTS = 20
"""Iterations."""
GPU_BYTES = 141e9


def architecture(shape: Shape) -> Architecture:
    """Return a shape's architecture, read from a folder whose weights are a hole in a file."""
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        config = shape.config(PROMPT + RESPONSE)
        config.save_pretrained(folder)
        header, end = dict[str, Any](), 0
        for name, weight in AutoModelForCausalLM.from_config(config).state_dict().items():
            size = 2 * math.prod(weight.shape)
            header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        with (Path(folder) / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        return Architecture.of(Path(folder))


def settings_of(ranks: int, partition: int) -> PpoSettings:
    """Return ppo's settings: full fine-tuning in bf16, minibatches of ``ROLLOUTS / MINIBATCHES`` over all ranks."""
    return PpoSettings.model_validate(
        {
            "precision": "bf16",
            "tuning": {"method": "full"},
            "rollouts": max(ROLLOUTS, MINIBATCHES * ranks),
            "minibatches": MINIBATCHES,
            "epochs": 1,
            "max_prompt_length": PROMPT,
            "sampling": {"max_new_tokens": RESPONSE},
            "activation_checkpointing": True,
            "rollout": {"tensor_parallel": 1},
            "workers": {"count": ranks, "gpu": True},
            "zero": {"secondary_partition": partition},
        }
    )


def row(name: str, model: Architecture, ranks: int, partition: int) -> dict[str, Any]:
    """Return memory and seconds of one model on so many GPUs.

    partition  ``secondary_partition``: a node's GPUs, or 1
    """
    models = {"policy": model, "reward": model}
    settings = with_micro_batch(settings_of(ranks, partition), models, int(GPU_BYTES))
    memory = predict(settings, models)
    mine = settings.rollouts // ranks
    parts = IterationModels(model, model, [model]).parts(settings, [PROMPT] * mine, [RESPONSE] * mine, ranks)
    computed = {part: _seconds(of_part) / SHARES[part] for part, of_part in parts.items()}
    updates = mine / settings.micro_batch  # micro batches of all minibatches
    # The copy that samples, four models that score, and policy and value model that train; their gradients.
    gathers, sent = 1 + 4 + 2 * 2 * updates, 2 * MINIBATCHES
    # After each step of the value model a pass, of the policy a pass or the copy that samples.
    near = gathers - 2 * MINIBATCHES if partition > 1 else 0
    network = near * _gathered(model, NODE, INSIDE)
    network += (gathers - near + sent) * _gathered(model, ranks, INSIDE if ranks <= NODE else BETWEEN)
    saved = 2 * 16 * model.parameters / STORE / BETWEEN_CHECKPOINTS
    whole = sum(computed.values()) + network + saved
    return {
        "model": name,
        "GPUs": ranks,
        "kept on nodes": "yes" if partition > 1 else "no",
        "rollouts": settings.rollouts,
        "micro batch": settings.micro_batch,
        "GB a rank": memory.total / 1e9,
        "of it whole copy": memory.parts.get("generation", 0.0) / 1e9,
        "fits 141 GB": "yes" if memory.total < GPU_BYTES else "no",
        **{f"{part}, s": seconds for part, seconds in computed.items()},
        "network, s": network,
        "checkpoint, s": saved,
        "whole, s": whole,
        "computing": f"{sum(computed.values()) / whole:.0%}",
    }


def _gathered(model: Architecture, ranks: int, speed: float) -> float:
    return 2 * model.parameters * (ranks - 1) / ranks / speed


def _seconds(parts: Sequence[Part]) -> float:
    return sum(part.seconds(MEASURED) for part in parts)


PAIRS = (("8b", "8b"), ("8b", "32b"), ("8b", "70b"), ("32b", "8b"))
"""Shapes of policy, reference and value model, and of the reward model."""
SCORE_ON = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
"""Shares of the ranks."""


def placed(policy: Architecture, reward: Architecture, ranks: int, scorers: int, parts: int) -> dict[str, float]:
    """Return the seconds of an iteration's parts, and the bytes of the fullest rank.

    A part of the responses is scored as soon as it is sampled and those before it are scored; the ranks that train
    compute log-probabilities and values meanwhile.

    scorers  ranks that score alone; 0 for ``placement: together``
    """
    models = {"policy": policy, "reward": reward}
    apart = {"placement": "apart", "scorers": scorers, "parts": parts} if scorers else {}
    settings = settings_of(ranks, 1).model_copy(update={"value_init": "policy"} | apart)
    settings = with_micro_batch(settings, models, int(GPU_BYTES))
    trainers, speed = ranks - scorers, INSIDE if ranks <= NODE else BETWEEN
    mine = math.ceil(settings.rollouts / trainers)
    rows = math.ceil(mine / parts)
    all_models = IterationModels(policy, policy, [reward])
    of_mine = all_models.parts(settings, [PROMPT] * mine, [RESPONSE] * mine, trainers)
    of_part = all_models.parts(settings, [PROMPT] * rows, [RESPONSE] * rows, trainers)
    gathered = _gathered(policy, trainers, speed)
    sampled = gathered + parts * _seconds(of_part["rollout"]) / SHARES["rollout"]
    own = _seconds(of_mine["score"]) / SHARES["score"] + 2 * gathered
    if scorers:
        each = math.ceil(settings.rollouts / scorers)
        together = settings.model_copy(update={"placement": "together"})
        texts = [PROMPT] * each, [RESPONSE] * each
        frozen = [one for one in all_models.parts(together, *texts, scorers)["score"] if one.name in FROZEN]
        frozen_s = _seconds(frozen) / SHARES["score"] / parts
        frozen_s += _gathered(policy, scorers, speed) + _gathered(reward, scorers, speed)
        done = 0.0
        for part in range(1, parts + 1):
            done = max(done, sampled * part / parts) + frozen_s
        score = max(sampled + own, done) - sampled
    else:
        score = own + gathered + _gathered(reward, trainers, speed)
    micro_batches = math.ceil(mine / settings.micro_batch)
    train = _seconds(of_mine["train"]) / SHARES["train"] + 2 * (2 * micro_batches + MINIBATCHES) * gathered
    return {"rollout": sampled, "score": score, "train": train, "memory": predict(settings, models).total}


FROZEN = ("score reference", "score reward")


def row_of_placement(names: tuple[str, str], models: tuple[Architecture, Architecture], ranks: int) -> dict[str, Any]:
    """Return seconds together, and apart with the best number of ranks that score and of parts."""

    def whole(seconds: dict[str, float]) -> float:
        return seconds["rollout"] + seconds["score"] + seconds["train"]

    together = placed(*models, ranks, 0, 1)
    numbers = sorted({max(1, round(share * ranks)) for share in SCORE_ON})
    options = [(scorers, parts, placed(*models, ranks, scorers, parts)) for scorers in numbers for parts in (1, 2, 4)]
    fitting = [option for option in options if option[2]["memory"] < GPU_BYTES] or options
    scorers, parts, best = min(fitting, key=lambda option: whole(option[2]))
    return {
        "policy": names[0],
        "reward": names[1],
        "GPUs": ranks,
        "together, s": whole(together),
        "GB a rank": together["memory"] / 1e9,
        "apart, s": whole(best),
        "of it rollout": best["rollout"],
        "score": best["score"],
        "train": best["train"],
        "score on": scorers,
        "parts": parts,
        "GB of the fullest": best["memory"] / 1e9,
        "apart / together": whole(best) / whole(together),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--placement", action="store_true", help="compare ppo.placement together and apart")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    models = {name: architecture(shape) for name, shape in LARGE.items()}
    if options.placement:
        rows = [row_of_placement(pair, (models[pair[0]], models[pair[1]]), n) for pair in PAIRS for n in GPUS]
    else:
        rows = [
            row(name, model, ranks, partition)
            for name, model in models.items()
            for ranks in GPUS
            for partition in ((1, NODE) if ranks > NODE else (1,))
        ]
    print(f"{ROLLOUTS} x ({PROMPT} + {RESPONSE}) tokens or one sample a rank and minibatch, whichever is more")
    print(
        f"assumed: {INSIDE / 1e9:.0f} GB/s in a node, {BETWEEN / 1e9:.0f} between nodes, {STORE / 1e9:.0f} to the store"
    )
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
