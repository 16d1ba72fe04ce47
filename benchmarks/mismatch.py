"""How far the sampler is from the policy that is trained: ``python -m benchmarks.mismatch [--width N] [--layers N]``.

Models of three families with random weights, whose logits have the spread of a language model's, are sampled from and
trained for three iterations, in fp32 and in bf16, whole and with an adapter, with the head in fp32 and without. The
columns: the largest ``rollout/kl_to_trained`` in nats a token and the largest ``rollout/largest_gap``, of which the
alarm's bounds are a multiple (:mod:`rlhf.rl.metrics`); the root mean square difference to the same weights computed in
fp32 throughout; the seconds of sampling and of an update. It uses a GPU where there is one.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from benchmarks.tiny_models import save_word_tokenizer
from rlhf.config.stages import Precision
from rlhf.config.tuning import FULL, LoraTuning, Tuning
from rlhf.models.micro_batches import MicroBatch
from rlhf.rl.losses import clipped_policy_loss
from rlhf.rl.metrics import mismatch_metrics
from rlhf.rollout.prompts import PromptBatch
from rlhf.rollout.rollout import roll_out
from rlhf.rollout.sequences import Experience, minibatches
from rlhf.training.learner import Optimiser
from rlhf.training.policy import FrozenPolicy, TrainedPolicy
from rlhf.zero import group

VOCABULARY = 2048
SPREAD = 3.0
"""Standard deviation of the logits."""
RESPONSES, LENGTH = 64, 64
FORMS: dict[str, Tuning] = {"full": FULL, "adapter": LoraTuning(rank=16)}
LOSS = partial(clipped_policy_loss, clip=0.2)


def configurations(width: int, layers: int) -> dict[str, PreTrainedConfig]:
    """Return a small model of each family."""
    heads = width // 64
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    return {"llama": LlamaConfig(**shape), "qwen2": Qwen2Config(**shape), "gemma2": Gemma2Config(**shape, head_dim=64)}


def save_model(config: PreTrainedConfig, folder: Path) -> None:
    """Write the model in bf16, with a tokenizer that has a word for every row."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        spread = model(torch.randint(2, VOCABULARY, (4, 32))).logits.std()
        model.get_output_embeddings().weight.mul_(SPREAD / spread)
    model.bfloat16().save_pretrained(folder)
    save_word_tokenizer(VOCABULARY, folder)


def iterations(folder: Path, precision: Precision, form: str, fp32_head: bool) -> Iterator[dict[str, float]]:
    """Sample, compare, and train on made-up advantages, three times."""
    method, rate = FORMS[form], 1e-5 if form == "full" else 1e-3
    optimiser = Optimiser("policy", rate, 1.0)
    policy = TrainedPolicy.load_folder(
        folder,
        precision,
        1.0,
        MicroBatch(16),
        method=method,
        source=folder,
        seed=0,
        optimiser=optimiser,
        fp32_head=fp32_head,
    )
    exact = FrozenPolicy(folder, "fp32", 1.0, MicroBatch(16))
    rows = torch.randint(2, VOCABULARY, (RESPONSES, 32), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [row[: 4 + index % 28] for index, row in enumerate(rows)]
    for iteration in range(3):
        samples = list(range(iteration * RESPONSES, (iteration + 1) * RESPONSES))
        start = time.perf_counter()
        rollout = roll_out(policy, PromptBatch(["w"] * RESPONSES, prompts, samples), 0, LENGTH)
        sampled = time.perf_counter()
        logprobs, mask = policy.logprobs(rollout.sequences), rollout.mask
        figures = mismatch_metrics(rollout.logprobs, logprobs, mask)
        figures["kl a token"] = abs(figures["rollout/kl_to_trained"]) * RESPONSES / int(mask.sum())
        if iteration == 0:
            figures["off fp32"] = rms(logprobs - exact.logprobs(rollout.sequences), mask)
        advantages = torch.where(rollout.sequences.ids[:, -LENGTH:] % 2 == 1, 1.0, -1.0)
        zeros = torch.zeros_like(logprobs)
        experience = Experience.of(
            rollout.sequences,
            logprobs=logprobs,
            reference_logprobs=logprobs,
            values=zeros,
            advantages=advantages,
            returns=zeros,
        )
        before = time.perf_counter()
        for minibatch in minibatches(experience, 1, MicroBatch(16), iteration):
            policy.update(minibatch, LOSS, rate)
        yield figures | {"sample s": sampled - start, "update s": time.perf_counter() - before}


def rms(gaps: Tensor, mask: Tensor) -> float:
    """The root mean square over real tokens."""
    return float(gaps[mask].square().mean().sqrt())


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    given = parser.parse_args()
    # DeepSpeed would compile its shared-memory collectives, which takes half a minute.
    __compatible_ops__["deepspeed_shm_comm"] = False
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    print(
        "| model | kl a token | largest gap | off fp32 | sample s | update s |\n| --- | --- | --- | --- | --- | --- |"
    )
    with tempfile.TemporaryDirectory() as scratch:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        meeting = f"file://{scratch}/meeting"
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, init_method=meeting, rank=0, world_size=1)
        assert group.world_size() == 1
        for family, config in configurations(given.width, given.layers).items():
            folder = Path(scratch) / family
            save_model(config, folder)
            cases: list[tuple[Precision, bool]] = [("fp32", True), ("bf16", True), ("bf16", False)]
            for precision, fp32_head in cases:
                for form in FORMS:
                    rows = list(iterations(folder, precision, form, fp32_head))
                    largest = [max(row[name] for row in rows) for name in ("kl a token", "rollout/largest_gap")]
                    seconds = [min(row[name] for row in rows) for name in ("sample s", "update s")]
                    head = "" if precision == "fp32" else f", {'fp32' if fp32_head else 'bf16'} head"
                    numbers = [f"{value:.1e}" for value in (*largest, rows[0]["off fp32"])]
                    cells = [f"{family}, {precision}{head}, {form}", *numbers, *(f"{value:.2f}" for value in seconds)]
                    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
