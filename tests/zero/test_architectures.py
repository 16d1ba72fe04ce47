"""Any causal architecture through sft, rm and ppo, in a group of one: tiny models with random weights."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.attempt.context import Context
from rlhf.config.ppo import PpoSettings
from rlhf.config.stages import RmSettings, SftSettings
from rlhf.models import text
from rlhf.models.layout import BASE, config_of
from rlhf.models.micro_batches import MicroBatch
from rlhf.models.reward import FrozenReward
from rlhf.rollout.sequences import lay_out
from rlhf.rollout.speaker import Speaker
from rlhf.stages import ppo, rm, sft
from rlhf.tracking import read_metrics
from rlhf.training.policy import FrozenPolicy
from tests import accelerator
from tests.models import families
from tests.models.tiny import tiny_config
from tests.zero.inputs import write_inputs

pytestmark = [
    # DeepSpeed's, torch's, TRL's and transformers' own.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("group", "under_deepspeed"),
]

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "rank": 4},
    "prompt": {"method": "prompt", "tokens": 4},
    "prefix": {"method": "p-tuning-v2", "tokens": 4},
}
PROMPTS, RESPONSES = ["a film", "the", "of two halves is"], ["a joy", "dull , dull", "the film of two"]
RESPONSE_TOKENS = 12
"""Twice the tiny models' sliding window."""

TRAINING: dict[str, Any] = {
    "max_length": 96,
    "micro_batch_size": 2,
    "epochs": 0.5,
    "optimizer": {"learning_rate": 1e-2, "warmup_fraction": 0.0},
}
PPO: dict[str, Any] = {
    "iterations": 2,
    "rollouts": 4,
    "sampling": {"max_new_tokens": RESPONSE_TOKENS},
    "policy_learning_rate": 1e-2,
    "value_learning_rate": 1e-2,
    "max_prompt_length": 64,
    "micro_batch_size": 2,
    "kl": {"limit": 1e6},
}


class Architecture(NamedTuple):
    """A tiny model."""

    model_type: str
    tokenizer: str
    """A family of ``tests.models.families``."""
    config: Mapping[str, Any] = {}
    """Entries beside those of ``tiny_config``."""
    can_score: bool = True
    """Whether transformers has a sequence classifier of this type."""


VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
ARCHITECTURES = {
    "llama": Architecture("llama", "first llama 3", {"tie_word_embeddings": False}),
    "gpt2": Architecture("gpt2", "no template, no bos"),
    # transformers reads its tokenizer by another class where there is no config.json, as beside an adapter.
    "qwen2": Architecture("qwen2", "qwen 1.5 base", {"use_sliding_window": True, "max_window_layers": 0}),
    "qwen3": Architecture("qwen3", "qwen3 base", {"tie_word_embeddings": True}),
    # Its template refuses a system's message.
    "gemma": Architecture("gemma3_text", "gemma"),
    "phi": Architecture("phi", "phi 3"),
    "mistral": Architecture("mistral", "mistral"),
    # As OPT-350m: embeddings narrower than the layers.
    "opt": Architecture("opt", "opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt_neox": Architecture("gpt_neox", "no template"),
    "mixtral": Architecture("mixtral", "mistral", {"output_router_logits": True, "router_jitter_noise": 0.1}),
    "olmoe": Architecture("olmoe", "zephyr", can_score=False),
}
OTHERS = {
    "bloom": Architecture("bloom", "no template"),
    "gpt_oss": Architecture("gpt_oss", "smollm 3"),
    "gemma3 with text_config": Architecture("gemma3", "gemma 3", {"vision_config": VISION, "mm_tokens_per_image": 4}),
    "mpt": Architecture("mpt", "no template"),
    "qwen3_next": Architecture("qwen3_next", "qwen3 base", HYBRID),
}
"""What people have beside these, in the slow part."""


VIRTUAL = {
    # Whose sliding window counts padding, whose routers see the virtual tokens, and whose head goes past the body.
    "mistral, prompt": (Architecture("mistral", "no template", {"sliding_window": 16}), "prompt"),
    "mixtral, prompt": (Architecture("mixtral", "no template", {"sliding_window": 16}), "prompt"),
    "opt, prefix": (Architecture("opt", "opt"), "prefix"),
}


@pytest.fixture
def under_deepspeed(monkeypatch: pytest.MonkeyPatch, new_accelerator: None) -> None:
    """As a rank is told before it imports anything."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_inputs(folder)
    return folder


def make_base(architecture: Architecture, folder: Path) -> Path:
    """Write a model with more embeddings than its tokenizer has tokens."""
    families.write(families.FAMILIES[architecture.tokenizer], folder)
    tokenizer = text.load_tokenizer(folder)
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    shape: dict[str, Any] = {"vocab_size": len(tokenizer) + 7, "max_position_embeddings": 128} | tokens
    more = dict(architecture.config)
    if "vision_config" in more:
        more["text_config"] = tiny_config(f"{architecture.model_type}_text", **shape).to_dict()
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(tiny_config(architecture.model_type, **shape | more))
    assert model.get_input_embeddings().weight.shape[0] > len(tokenizer)
    model.save_pretrained(folder)
    return folder


def run(stage: Any, name: str, settings: Any, inputs: Mapping[str, Path], folder: Path) -> Context[Any]:
    """Run a stage; return its context, with the result in ``output``. Every number that it logged is finite."""
    (folder / "output").mkdir(parents=True)
    tracking = {"mode": "disabled"}
    context = Context(name, "0" * 64, settings, inputs, folder / "output", folder, folder, (folder,), tracking)
    stage.run(context)
    accelerator.forget()
    rows = read_metrics(context.folder.metrics)
    assert rows
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    return context


def weights_in(folder: Path) -> dict[str, Tensor]:
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def assert_trained(method: str, folder: Path, source: Path) -> None:
    """Every weight has changed, or every adapter has left 0, and the base beside it is as it was."""
    before, after = weights_in(source), weights_in(folder)
    if method == "full":
        # A head may be replaced by another.
        assert len(before.keys() - after.keys()) <= 1
        assert after.keys() - before.keys() <= {"score.weight"}
        # Texts do not train what sees pictures, and so few do not reach every expert.
        left = ("vision", "multi_modal", ".experts.")
        names = [name for name in after.keys() & before.keys() if not any(part in name for part in left)]
        assert not [name for name in names if torch.equal(after[name], before[name])]
    elif method == "lora":
        updates = [weight for name, weight in after.items() if "lora_B" in name]
        assert updates
        assert all(weight.any() for weight in updates)


def plainly(folder: Path, method: str, *, scores: bool) -> Any:
    """The model as a program without our code loads it."""
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    plain = folder if method == "full" else folder / BASE
    model = auto.from_pretrained(plain, **({"num_labels": 1} if scores else {}))
    return (model if method == "full" else PeftModel.from_pretrained(model, str(folder))).eval()


@torch.no_grad()
def assert_readable(folder: Path, method: str) -> None:
    """Each log-probability is that of plain transformers on its row alone, and the policy answers."""
    tokenizer = text.load_tokenizer(folder)
    prompts = [text.prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    responses = [text.response_ids(tokenizer, response) for response in RESPONSES]
    found = FrozenPolicy(folder, "fp32", 1.0, MicroBatch(3)).logprobs(
        lay_out(prompts, responses, tokenizer.pad_token_id)
    )
    accelerator.forget()
    model = plainly(folder, method, scores=False)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        # Rows beyond the tokenizer's tokens have no probability here.
        logits = model(torch.tensor([prompt + response])).logits[0, -len(response) - 1 : -1, : len(tokenizer)]
        expected = logits.log_softmax(-1)[range(len(response)), response]
        torch.testing.assert_close(found[row, : len(response)], expected, atol=1e-4, rtol=1e-4)
    assert len(Speaker(folder).answers(PROMPTS, 1.0, RESPONSE_TOKENS, seed=0)) == len(PROMPTS)


@torch.no_grad()
def assert_scores(folder: Path, method: str) -> None:
    """Each score is that of plain transformers on the row alone."""
    config, tokenizer = config_of(folder), text.load_tokenizer(folder)
    found = FrozenReward(folder, "fp32", MicroBatch(3)).score(PROMPTS, RESPONSES)
    accelerator.forget()
    model = plainly(folder, method, scores=True)
    for row, texts in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids = text.scored_ids(tokenizer, *texts, config["score_max_length"])
        expected = (model(torch.tensor([ids])).logits[0, 0] - config["score_mean"]) / config["score_std"]
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        pytest.param(architecture, method, id=f"{name}, {method}")
        for name, architecture in ARCHITECTURES.items()
        for method in ("full", "lora")
    ]
    + [pytest.param(*case, id=name) for name, case in VIRTUAL.items()]
    + [pytest.param(architecture, "full", id=name, marks=pytest.mark.slow) for name, architecture in OTHERS.items()],
)
def test_an_architecture_goes_through_every_stage(
    architecture: Architecture, method: str, data: Path, tmp_path: Path
) -> None:
    """What should train does; sampled is what is trained, the reference is the start; plain libraries read results."""
    inputs = {name: data / name for name in ("demonstrations", "comparisons", "prompts")}
    tuning = {"tuning": METHODS[method]}
    base = make_base(architecture, tmp_path / "base")
    settings: Any = SftSettings.model_validate(TRAINING | {"batch_size": 2} | tuning)
    policy = run(sft, "sft", settings, inputs | {"base": base}, tmp_path / "sft").output
    assert_trained(method, policy, base)

    rewards: dict[str, Any] = {"rewards": [{"function": f"{data / 'reward.py'}:reward"}], "value_init": "policy"}
    if architecture.can_score:
        settings = RmSettings.model_validate(TRAINING | {"batch_size": 4} | tuning)
        inputs["reward"] = run(rm, "rm", settings, inputs | {"base": policy}, tmp_path / "rm").output
        if method != "prefix":  # PEFT reads no classifier with prefixes beside this release of transformers
            assert_scores(inputs["reward"], method)
        rewards = {}

    settings = PpoSettings.model_validate(PPO | rewards | tuning)
    context = run(ppo, "ppo", settings, inputs | {"policy": policy}, tmp_path / "ppo")
    first, second = read_metrics(context.folder.metrics)
    assert first["objective/kl"] == 0
    assert second["objective/kl"] != 0
    assert max(first["rollout/largest_gap"], second["rollout/largest_gap"]) < 1e-4
    start = policy if method == "full" else policy / BASE
    assert_trained(method, context.output, start)
    assert_readable(context.output, method)
