"""What an optimiser step under ZeRO-3 does, in a group of one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from rlhf.models.heads import TokenLogprobs, TokenValues
from rlhf.models.training import Training
from rlhf.zero.engine import Engine, whole_weights

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


@pytest.mark.parametrize("head", [TokenLogprobs, TokenValues])
def test_the_models_that_learn_have_no_dropout(head: Any, tmp_path: Path) -> None:
    """Theirs is switched off, wherever the architecture has it: two passes answer the same."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "vocab_size": 40,
        "n_positions": 16,
        "pad_token_id": 0,
    }
    config = GPT2Config(**shape, attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5)
    config.num_labels = 1
    model = (GPT2LMHeadModel if head is TokenLogprobs else GPT2ForSequenceClassification)(config)
    engine = Training("policy", learning_rate=0.1, max_grad_norm=1.0).start(head(model), "fp32")
    assert engine.module.training
    ids = torch.arange(12).reshape(2, 6)
    arguments: tuple[Any, ...] = (ids, torch.ones_like(ids), 3)
    if head is TokenLogprobs:
        first, second = (engine(*arguments, 1.0, False)[0] for _ in range(2))
    else:
        first, second = (engine(*arguments) for _ in range(2))
    assert torch.equal(first, second)
    assert first.std() > 0
