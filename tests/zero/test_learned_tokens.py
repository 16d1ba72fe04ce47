"""The log-probabilities that sft learns on a CPU, against those of TRL's own pass over the logits."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from rlhf.models import heads
from rlhf.training.trl_trainers import read_learned_tokens
from tests.models.tiny import tiny_config

CONFIGS = {
    "llama": tiny_config("llama"),
    "scaled": tiny_config("granite", logits_scaling=3.0),
    "capped": tiny_config("gemma2", final_logit_softcapping=2.0, attn_implementation="eager"),
    "biased": tiny_config("phi"),
}


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("kind", CONFIGS)
def test_learned_tokens_are_those_of_trl(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities and their gradients, entropies, hits, and the mask; also where no token is learned."""
    monkeypatch.setattr(heads, "CHUNK", 1)
    monkeypatch.setattr(heads, "FEWEST", chunk)
    torch.manual_seed(0)
    theirs: Any = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    ours = deepcopy(theirs)
    for model in (theirs, ours):
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    read_learned_tokens(ours)
    ids = torch.randint(3, 90, (2, 9))
    # Else random models find none of these likeliest.
    ids[:, 5] = ours(input_ids=ids).logits[:, 4].argmax(-1)
    for learned in (
        torch.rand(2, 9).round().bool().index_fill(1, torch.tensor(5), True),
        torch.zeros(2, 9, dtype=torch.bool),
    ):
        given = {"input_ids": ids, "labels": torch.where(learned, ids, -100), "use_cache": False}
        expected, found = (model(**given, fused_lm_head=True) for model in (theirs, ours))
        for name in ("log_probs", "entropy"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)
        assert torch.equal(found.is_top1.bool(), expected.is_top1.bool())
        assert found.is_top1[:, 4].all() == learned.any()
        assert torch.equal(found.label_mask, expected.label_mask)
        assert not found.entropy.requires_grad
        weights = torch.rand(2, 8)
        for outputs in (expected, found):
            (outputs.log_probs * weights).sum().backward()
        for (name, one), other in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad, atol=1e-5, rtol=1e-4, msg=name)
