"""Is the policy that samples the policy that is scored, trained and evaluated? In bf16, on shapes of three families.

    python -m benchmarks.agreement [--size small|large] [--precision bf16|fp32] [--folder FOLDER]

PPO from random weights, all of them trained or LoRA, with learning rates that move the policy, through the program
itself; GPUs are used where there are any. The tokenizers close turns with another token than their EOS, and the models
have embedding rows without a token. For each run it prints, of all iterations,

    kl_to_trained   mean over iterations of rollout/kl_to_trained: KL(sampler ‖ trained), nats a response; should be 0
    off             the largest rollout/largest_gap: of one token's two log-probabilities, nats
    first           the largest policy/approxkl_first: 0 where old and new log-probabilities come from one computation
    kl              the last objective/kl: how far the policy went from its reference, nats a response
    evaluated       kl/response of the exported policy against the model that PPO began with, nats a response

and exits with 1 where a bound of :data:`BOUNDS` is passed, or the policy did not move.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.pipelines import Pipeline, function, opened, write_rows
from tests.models.families import FAMILIES, write

SHAPES = {"llama": "first llama 3", "qwen3": "qwen3 base", "gemma3_text": "gemma"}
"""Model type to the family that its tokenizer is of."""
SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    # Where embeddings are tied, random weights of this width repeat the last token with probability 1.
    "large": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "tie_word_embeddings": False,
    },
}
LEARNING_RATES = {"small": {"full": 1e-4, "lora": 1e-3}, "large": {"full": 3e-6, "lora": 5e-5}}
"""Which move the policy by nats in six iterations."""
ROWS_WITHOUT_TOKEN = 64
BOUNDS = {"fp32": (1e-3, 5e-9), "bf16": (0.05, 5e-3)}
"""By precision: of ``kl_to_trained`` in nats a response, and of ``first``."""
FORMS = {"full": {"method": "full"}, "lora": {"method": "lora", "rank": 16, "alpha": 32}}


def make_model(kind: str, size: str, folder: Path) -> Path:
    """Write a model of random weights, large enough for opinions, with the tokenizer of its family."""
    tokens = write(FAMILIES[SHAPES[kind]], folder)
    tokenizer: Any = json.loads((tokens / "tokenizer.json").read_text(encoding="utf-8"))
    highest = max(*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"]))
    shape: dict[str, Any] = SIZES[size] | {
        "vocab_size": highest + 1 + ROWS_WITHOUT_TOKEN,
        "num_key_value_heads": 2,
        "head_dim": SIZES[size]["hidden_size"] // SIZES[size]["num_attention_heads"],
        "max_position_embeddings": 256,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    with torch.no_grad():
        model.get_output_embeddings().weight *= 4
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def instances(kind: str, model: Path, size: str, precision: str) -> dict[str, Any]:
    """Return the sections of a pipeline file for a shape."""
    rewards = json.loads(function("vowels.py", "vowels"))
    sampling = {"temperature": 1.0, "max_new_tokens": 48}
    common = {"precision": precision, "rewards": rewards, "sampling": sampling, "max_prompt_length": 128}
    sections: dict[str, Any] = {f"model-{kind}": {"uses": "model", "base": str(model)}}
    for form, tuning in FORMS.items():
        rate = LEARNING_RATES[size][form]
        rates = {"policy_learning_rate": rate, "value_learning_rate": rate}
        ppo = {"uses": "ppo", "inputs": {"policy": f"model-{kind}"}, "value_init": "policy", "iterations": 6}
        sections[f"{kind}-{form}"] = ppo | {"rollouts": 128, "minibatches": 4, "kl": {"coef": 0.01}, "tuning": tuning}
        sections[f"{kind}-{form}"] |= common | rates
        inputs = {"before": f"model-{kind}", "after": f"{kind}-{form}"}
        sections[f"{kind}-{form}-evaluated"] = {"uses": "evaluate", "inputs": inputs, "judge": False} | common
    return sections


def main() -> int:
    """Run all shapes and forms, and print the table."""
    parser = argparse.ArgumentParser(description="Whether sampled, scored, trained and evaluated policy agree.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--precision", choices=BOUNDS, default="bf16")
    parser.add_argument("--folder", type=Path, default=Path(".agreement"))
    chosen = parser.parse_args()
    folder: Path = chosen.folder.absolute()
    words = ["the capital", "france", "paris", "html", "a tag", "the answer", "what", "the", "not", "use", "in", "."]
    prompts = [{"prompt": f"what is {first} of {second} ?"} for first in words for second in words]
    source = str(write_rows(folder / "prompts.jsonl", prompts))
    pairs = [row | {"chosen": "paris .", "rejected": "no"} for row in prompts]
    data = {
        "prompts": source,
        "demonstrations": str(write_rows(folder / "demos.jsonl", [row | {"completion": "paris ."} for row in prompts])),
        "comparisons": str(write_rows(folder / "pairs.jsonl", pairs)),
        "judge": None,
        "heldout_fraction": 0.5,
    }
    sections: dict[str, Any] = {"pipeline": "agreement", "tracking": {"wandb": "disabled"}, "data": data}
    for kind in SHAPES:
        model = make_model(kind, chosen.size, folder / "models" / f"{kind}-{chosen.size}")
        sections |= instances(kind, model, chosen.size, chosen.precision)
    file = folder / "agreement.yaml"
    file.write_text("".join(f"{name}: {json.dumps(section)}\n" for name, section in sections.items()))
    names = [f"{kind}-{form}" for kind in SHAPES for form in FORMS]
    with opened(file, folder, gpus=None) as pipeline:
        pipeline.run([], *names, *(f"{name}-evaluated" for name in names))
        return table(pipeline, names, chosen.precision)


def table(pipeline: Pipeline, names: list[str], precision: str) -> int:
    """Print each run's figures; return 1 where a figure is out of bounds."""
    bound, first_bound = BOUNDS[precision]
    print(f"{'':18}{'kl_to_trained':>14}{'off':>9}{'first':>9}{'kl':>8}{'evaluated':>11}")
    status = 0
    for name in names:
        rows = pipeline.metrics(name)
        gap = sum(row["rollout/kl_to_trained"] for row in rows) / len(rows)
        off = max(row["rollout/largest_gap"] for row in rows)
        first = max(row["policy/approxkl_first"] for row in rows)
        moved, evaluated = rows[-1]["objective/kl"], pipeline.records[f"{name}-evaluated"].metrics["kl/response"]
        fine = abs(gap) <= bound and first <= first_bound and min(moved, evaluated) > 2 * bound
        status |= not fine
        figures = f"{gap:14.2g}{off:9.2g}{first:9.2g}{moved:8.2f}{evaluated:11.2f}"
        print(f"{name:18}{figures}{'' if fine else '  out of bounds'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
