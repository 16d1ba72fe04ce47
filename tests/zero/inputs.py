"""What the stages take that the tests run in a group."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES = (1, 2, 4)
"""Ranks of the groups of ``tests.zero.checks``."""
STAGE_NAMES = ("sft", "rm", "dpo", "ppo", "ppo with adapters", "ppo with one base", "grpo")
MEMORY_STAGES = ("sft", "rm", "ppo")
MICRO_BATCHES: dict[str, dict[str, Any]] = {
    "of 1": {"micro_batch_size": 1},
    "of 4": {"micro_batch_size": 4},
    "of 150 tokens, padded": {"micro_batch_size": None, "micro_batch_tokens": 150},
    "of 100 tokens, packed": {"micro_batch_size": None, "micro_batch_tokens": 100, "packing": True},
}
WITHOUT_COPIES: dict[str, Any] = {"of 1": 2, "of 4": "gathered"}
"""Of these, in the group of two: ``rollout.tensor_parallel``."""


@dataclass(frozen=True)
class Case:
    """A number of ranks that train, of ranks that score, and what they do."""

    trainers: int
    scorers: int
    stage: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.trainers}+{self.scorers}"


CASES = (
    Case(1, 1, "grpo", {"responses_per_prompt": 4, "tuning": {"method": "lora", "rank": 4, "init": "pissa"}}),
    Case(2, 2, "ppo", {"value_init": "reward", "value_learning_rate": 1e-3, "rollout": {"tensor_parallel": 2}}),
)
"""One for each number of ranks that the groups with all models together have."""
WORDS = ("a", "film", "of", "two", "halves", "joy", "dull", "the", "is", ",")
REWARD = """
def reward(prompts, responses):
    return [response.count("a") - 0.1 * len(response) for response in responses]

def coarse(prompts, responses):
    return [float("a" in response) for response in responses]
"""


PROMPT, ANSWER_TOKENS = "a film of joy", 3


def write_inputs(folder: Path, rows: int = 11) -> None:
    """Write what the stages take, beside the model in ``tiny``: so many rows to learn from."""
    rng = random.Random(0)

    def text(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words))

    def write(path: str, rows: list[dict[str, Any]]) -> None:
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))

    for part, count in (("train", rows), ("heldout", 3)):
        write(f"demonstrations/{part}.jsonl", [{"prompt": text(2), "completion": text(5)} for _ in range(count)])
        sets = [
            {
                "prompt": text(2),
                "responses": [text(4), text(4)],
                "strengths": [1.0, -0.5],
                "pool": number,
            }
            for number in range(count)
        ]
        write(f"comparisons/{part}.jsonl", sets)
        write(f"prompts/{part}.jsonl", [{"prompt": text(2)} for _ in range(5)])
    (folder / "reward.py").write_text(REWARD)
