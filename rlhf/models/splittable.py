"""Which models can be split over ranks (:mod:`rlhf.models.splitting`), and over how many; without torch."""

import math
from collections.abc import Mapping
from typing import Any

SPLITTABLE = frozenset(
    {
        "apertus",
        "arcee",
        "cohere",
        "cohere2",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "gpt_neox",
        "granite",
        "helium",
        "llama",
        "ministral",
        "mistral",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "seed_oss",
        "smollm3",
        "starcoder2",
    }
)
"""The model types that are split as transformers' plans for them say, each with a test."""

OTHERWISE = "write rollout: {tensor_parallel: gathered}, which any model allows, or leave it out"
"""What to do where a model cannot be split."""


def obstacle(config: Mapping[str, Any], ranks: int) -> str | None:
    """Return why a model cannot be split over ranks; None where it can.

    config  as transformers writes it
    """
    kind = config.get("model_type")
    if kind not in SPLITTABLE:
        return f"models of the type {kind} are not among those that are split over ranks by a plan of transformers'"
    heads = config["num_attention_heads"]
    keys = config.get("num_key_value_heads") or heads
    common = math.gcd(heads, keys)
    if common % ranks == 0:
        return None
    divisors = ", ".join(str(count) for count in range(1, common + 1) if common % count == 0)
    return f"{ranks} ranks do not divide the model's {heads} attention heads and {keys} key heads; these do: {divisors}"
