"""What an optimiser step under ZeRO-3 does, in a group of one."""

import copy
import subprocess
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from rlhf.cluster.worker import Location
from rlhf.cluster.worker_group import environments
from rlhf.config.tuning import FULL, GradualTuning, LoraTuning, Tuning
from rlhf.config.zero import ZeroSettings
from rlhf.models import tuning
from rlhf.models.packable import PACKABLE
from rlhf.zero.engine import ADAM_EPSILON, Engine, plain_linear, sharded_loading, whole_weights
from tests.models.tiny import tiny_config

pytestmark = [
    # DeepSpeed's and torch's own.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.usefixtures("group"),
]


def step_of(slope: float, max_grad_norm: float) -> float:
    """How far one step at a learning rate of 0.1 moves a weight down the slope of its loss."""
    module = nn.Linear(1, 1, bias=False)
    engine = Engine(module, "fp32", learning_rate=0.1, max_grad_norm=max_grad_norm)
    before = whole_weights(engine.module, trained_only=True)["weight"].item()
    engine.backward(slope * engine(torch.ones(1, 1)).sum(), last=True)
    assert engine.step(0.1) == pytest.approx(slope, rel=1e-5)
    return before - whole_weights(engine.module, trained_only=True)["weight"].item()


@pytest.mark.parametrize(
    ("slope", "max_grad_norm", "expected"),
    [
        (1.0, 1.0, 0.1 / (1 + 1e-5)),
        # As large as Adam's ε, which then halves the step.
        (1e-5, 1.0, 0.05),
        (1.0, 1e-5, 0.05),
    ],
)
def test_a_step_is_adam_s_with_its_epsilon_after_clipping(slope: float, max_grad_norm: float, expected: float) -> None:
    """The first step is rate * g / (|g| + ε), ε being 1e-5 and g the gradient scaled down to its largest norm."""
    assert step_of(slope, max_grad_norm) == pytest.approx(expected, rel=1e-3)


def test_a_rank_starts_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed would count the NUMA nodes by one, at every backward pass, if a rank's environment did not say."""
    monkeypatch.delenv("LOCAL_SIZE")
    (_, environment), *_ = environments([Location("here", "", 0, ())])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with patch.object(subprocess, "Popen", side_effect=AssertionError):
        step_of(1.0, 1.0)


def test_small_gradients_count_beside_large_ones_in_bf16() -> None:
    """1 + 64 · 2⁻⁹ is 1.125, and 1 where each sum is rounded to bf16."""
    engine = Engine(nn.Linear(1, 1, bias=False, dtype=torch.bfloat16), "bf16", learning_rate=0.1)
    slopes = [1.0] + 64 * [2.0**-9]
    for number, slope in enumerate(slopes, start=1):
        engine.backward(slope * engine(torch.ones(1, 1, dtype=torch.bfloat16)).sum(), last=number == len(slopes))
    assert engine.step(0.1) == pytest.approx(1.125, rel=1e-6)


def with_noise(config: Any) -> Any:
    """The configuration with everything at 0.1 that drops or shakes something in training."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            with_noise(value)
        elif ("drop" in name or "jitter" in name) and type(value) in (int, float):
            vars(config)[name] = 0.1  # past the type of a field that says int
    return config


def noisy_model(model_type: str, method: Tuning) -> Any:
    """In training mode, where two passes differ."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(with_noise(tiny_config(model_type)))
    model = tuning.prepared(model, method, Path(), scores=False, seed=0).train()
    with torch.no_grad():
        assert loss_of(model) != loss_of(model)
    return model


def loss_of(model: Any) -> Tensor:
    ids = torch.arange(1, 21).reshape(2, 10)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.log_softmax(-1)[..., 5].sum()


# ERNIE 4.5 has no dropout.
TYPES = [*sorted(PACKABLE - {"ernie4_5"}), "biogpt", "bloom", "gpt_oss", "mpt", "opt", "phimoe", "xglm"]
ADAPTERS = LoraTuning(rank=2, dropout=0.1)


@pytest.mark.parametrize(
    ("model_type", "method"),
    [(name, FULL) for name in TYPES] + [(name, ADAPTERS) for name in ("llama", "opt")],
)
def test_models_that_ppo_trains_compute_alike_every_time(model_type: str, method: Tuning) -> None:
    """Two passes agree bit for bit, and gradients are plain torch's without dropout, wherever a type has it."""
    model = noisy_model(model_type, method)
    plain = copy.deepcopy(model).eval()
    loss_of(plain).backward()
    engine = Engine(model, "fp32", name="policy", learning_rate=0.1, max_grad_norm=1.0)
    with torch.no_grad():
        first = loss_of(engine)
    loss = loss_of(engine)
    assert loss == first == loss_of(plain)
    engine.backward(loss, last=True)
    for (name, weight), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if weight.requires_grad:
            torch.testing.assert_close(safe_get_full_grad(weight), expected.grad, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["opt", "mixtral"])
def test_frozen_models_compute_alike_every_time(model_type: str) -> None:
    """The reference, the reward model, and the policies of evaluate."""
    engine = Engine(noisy_model(model_type, FULL), "fp32")
    assert loss_of(engine) == loss_of(engine)


def gradual_model(start: Literal["top", "bottom"]) -> Any:
    """Of three blocks, of which one more trains at every second step, each at half the rate of the block above."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=3))
    method = GradualTuning(start=start, every=2, decay=2.0)
    return tuning.prepared(model, method, Path(), scores=False, seed=0)


@pytest.mark.parametrize("start", ["top", "bottom"])
def test_gradual_unfreezing_is_one_adam_for_each_block_from_its_first_step(start: Literal["top", "bottom"]) -> None:
    """Against torch's AdamW over each block alone, made when the block's turn comes; others stay bit for bit.

    The learning rate changes with every step, and gradients are clipped by the norm of what trains.
    """
    engine = Engine(gradual_model(start), "fp32", name="policy", learning_rate=0.1, max_grad_norm=1.0)
    plain = gradual_model(start).eval()
    first = {name: weight.detach().clone() for name, weight in plain.named_parameters()}
    rates = {"head": 1.0, 2: 1 / 2, 1: 1 / 4, 0: 1 / 8}
    turns = {"head": 0} | {block: 2 * (2 - block if start == "top" else block) for block in range(3)}

    def part(name: str) -> int | str:
        if "layers." in name:
            return int(name.split("layers.")[1][0])
        return 0 if "embed" in name else "head"

    slow: dict[int | str, torch.optim.Optimizer] = {}
    for step in range(5):
        rate = 0.02 / (1 + step)
        loss = -loss_of(engine) / 10
        engine.backward(loss, last=True)
        engine.step(rate)

        due = {name: weight for name, weight in plain.named_parameters() if turns[part(name)] <= step}
        for weight in plain.parameters():
            weight.grad = None
        (-loss_of(plain) / 10).backward()
        nn.utils.clip_grad_norm_(due.values(), 1.0)
        for which in {part(name) for name in due}:
            weights = [weight for name, weight in due.items() if part(name) == which]
            if which not in slow:
                slow[which] = torch.optim.AdamW(weights, eps=ADAM_EPSILON, weight_decay=0.0)
            slow[which].param_groups[0]["lr"] = rate * rates[which]
            slow[which].step()

        trained = whole_weights(engine.module, trained_only=False)
        for name, weight in plain.named_parameters():
            torch.testing.assert_close(trained[name], weight, atol=1e-5, rtol=1e-4, msg=f"step {step}: {name}")
            assert torch.equal(trained[name], first[name]) == (name not in due), (step, name)


def test_a_whole_model_multiplies_by_torch_s_own_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed has replaced it since the first sharded model, and its own stays outside."""
    monkeypatch.setattr(ZeroSettings, "of_ranks", lambda self, _: self)  # one rank, too, in stage 3
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path)
    with sharded_loading("fp32"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    replaced: Any = nn.functional.linear
    assert replaced.__module__.startswith("deepspeed")
    with plain_linear():
        inside: Any = nn.functional.linear
    assert inside.__module__ == "torch._C._nn"
    assert nn.functional.linear is replaced
