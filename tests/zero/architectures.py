"""Tiny random models of any architecture, and the stages that train them in a group of one rank."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.attempt.context import Context
from rlhf.config.ppo import PpoSettings
from rlhf.config.stages import RmSettings, SftSettings
from rlhf.models import folders, text
from rlhf.models.layout import BASE, config_of, is_adapter
from rlhf.models.reward import FrozenReward
from rlhf.rollout.sampling import answers
from rlhf.rollout.sequences import lay_out
from rlhf.tracking import read_metrics
from rlhf.training.policy import FrozenPolicy
from stages import ppo, rm, sft
from tests import accelerator
from tests.models.tiny import tiny_config

PROMPTS, RESPONSES = ["a film", "the", "of two halves is"], ["a joy", "dull , dull", "the film of two"]
COMMON: dict[str, Any] = {"max_length": 64, "batch_size": 4, "micro_batch_size": 2, "epochs": 0.7}
OPTIMIZER = {"learning_rate": 1e-2, "warmup_fraction": 0.0}
SFT = COMMON | {"optimizer": OPTIMIZER, "batch_size": 2}
RM = COMMON | {"optimizer": OPTIMIZER}
PPO: dict[str, Any] = {
    "iterations": 2,
    "rollouts": 4,
    "minibatches": 1,
    "epochs": 1,
    "sampling": {"max_new_tokens": 12},
    "policy_learning_rate": 1e-2,
    "value_learning_rate": 1e-3,
    "warmup_fraction": 0.0,
    "max_prompt_length": 32,
    "micro_batch_size": 2,
    "value_init": "reward",
    "kl": {"limit": 1e9},
}


def make_base(model_type: str, tokenizer: Path, folder: Path, **more: Any) -> Path:
    """Write a tiny model with more embeddings than the tokenizer has tokens."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **{"vocab_size": 312, "pad_token_id": 0, "eos_token_id": 3} | more)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    folders.copy_tokenizer(tokenizer, folder)
    return folder


def run(stage: Any, name: str, settings: Any, inputs: Mapping[str, Path], folder: Path) -> Context[Any]:
    """Run a stage as a process of its own would; return its context, with the result in ``output``."""
    (folder / "output").mkdir(parents=True)
    context = Context(
        stage=name,
        key="0" * 64,
        settings=settings,
        inputs=inputs,
        output=folder / "output",
        attempt=folder,
        cache=folder,
        attempts=(folder,),
        tracking={"mode": "disabled"},
    )
    stage.run(context)
    accelerator.forget()
    return context


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Every weight in a folder's own files."""
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def plainly(folder: Path, *, scores: bool) -> Any:
    """The folder's model as a program without our code reads it."""
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    plain = folder / BASE if is_adapter(folder) else folder
    model = auto.from_pretrained(plain, **({"num_labels": 1} if scores else {}))
    return (PeftModel.from_pretrained(model, str(folder)) if is_adapter(folder) else model).eval()


@torch.no_grad()
def check_policy(folder: Path) -> None:
    """Each token's log-probability is plain transformers' on its row alone, and the policy answers."""
    tokenizer = text.load_tokenizer(folder)
    prompts = [text.prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    responses = [text.response_ids(tokenizer, response) for response in RESPONSES]
    model = plainly(folder, scores=False)
    sequences = lay_out(prompts, responses, tokenizer.pad_token_id)
    found = FrozenPolicy(folder, "fp32", 1.0, 3).logprobs(sequences)
    accelerator.forget()
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
        expected = logits.log_softmax(-1)[range(len(response)), response]
        torch.testing.assert_close(found[row, : len(response)], expected, atol=1e-4, rtol=1e-4)
    assert len(answers(folder, PROMPTS, 1.0, 12, 0)) == len(PROMPTS)


@torch.no_grad()
def check_scores(folder: Path) -> None:
    """Each response's score is plain transformers' on its row alone."""
    config, tokenizer = config_of(folder), text.load_tokenizer(folder)
    found = FrozenReward(folder, "fp32", 3).score(PROMPTS, RESPONSES)
    accelerator.forget()
    model = plainly(folder, scores=True)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids = torch.tensor([text.scored_ids(tokenizer, prompt, response, 64)])
        expected = (model(ids).logits[0, 0] - config["score_mean"]) / config["score_std"]
        torch.testing.assert_close(found[row], expected, atol=1e-3, rtol=1e-3)


def changed(folder: Path, source: Path, check_all: bool = True) -> None:
    before, after = weights_of(source), weights_of(folder)
    same = [name for name, weight in after.items() if name in before and torch.equal(weight, before[name])]
    missing = set(before) - set(after)
    if check_all:
        assert not {name for name in missing if not name.startswith(("lm_head", "embed_out", "output"))}, f"missing {missing}"
        assert not same, f"{len(same)} of {len(after)} the same: {same[:4]}"


def finite(context: Context[Any]) -> None:
    rows = read_metrics(context.attempt / "metrics.jsonl")
    assert rows
    assert all(value == value and abs(value) < 1e30 for row in rows for name, value in row.items() if isinstance(value, float))


def ppo_rows(context: Context[Any]) -> None:
    rows = read_metrics(context.attempt / "metrics.jsonl")
    assert rows[0]["objective/kl"] == 0, rows[0]["objective/kl"]
    assert all(row["rollout/largest_gap"] < 1e-4 for row in rows), [row["rollout/largest_gap"] for row in rows]
    assert abs(rows[1]["objective/kl"]) > 1e-4, rows[1]["objective/kl"]


def through(base: Path, data: Path, folder: Path, method: Any, attempt: Any) -> None:
    inputs = {name: data / name for name in ("demonstrations", "comparisons", "prompts")}
    tuned = {"tuning": method}

    def stage(stage: Any, name: str, settings: Any, more: Mapping[str, Path]) -> Any:
        return attempt(name, lambda: run(stage, name, settings, inputs | more, folder / name))

    s = stage(sft, "sft", SftSettings.model_validate(SFT | tuned), {"base": base})
    policy = base
    if s:
        policy = s.output
        attempt("sft changed", lambda: changed(policy, base, method['method'] == 'full'))
        attempt("sft finite", lambda: finite(s))
        attempt("sft policy", lambda: check_policy(policy))
    r = stage(rm, "rm", RmSettings.model_validate(RM | tuned), {"base": policy})
    more: dict[str, Any] = {"rewards": [{"function": f"{data / 'reward.py'}:reward"}], "value_init": "policy"}
    given = {"policy": policy}
    if r:
        attempt("rm changed", lambda: changed(r.output, policy, method['method'] == 'full'))
        attempt("rm finite", lambda: finite(r))
        attempt("rm scores", lambda: check_scores(r.output))
        more, given = {}, given | {"reward": r.output}
    p = stage(ppo, "ppo", PpoSettings.model_validate(PPO | tuned | more), given)
    if p:
        attempt("ppo changed", lambda: changed(p.output, policy, method['method'] == 'full'))
        attempt("ppo finite", lambda: finite(p))
        attempt("ppo kl", lambda: ppo_rows(p))
        attempt("ppo policy", lambda: check_policy(p.output))
