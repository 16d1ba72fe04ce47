"""Models split over ranks, which are threads here that exchange what they have."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.models import heads, splitting
from rlhf.models.splittable import SPLITTABLE, obstacle
from rlhf.models.splitting import Peers
from tests.models.tiny import tiny_config

RANKS = 2
LLAMA = {"model_type": "llama", "num_attention_heads": 12, "num_key_value_heads": 4}


class Threads:
    """What ranks that are threads hand to each other."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, timeout=60)
        self._given: list[Tensor] = [torch.empty(0)] * ranks

    def exchanged(self, rank: int, mine: Tensor) -> list[Tensor]:
        """What all ranks give; a collective."""
        self._given[rank] = mine.clone()
        self._barrier.wait()
        given = list(self._given)
        self._barrier.wait()
        return given


class ThreadPeers(Peers):
    """Peers whose group is :class:`Threads`."""

    def sum(self, values: Tensor) -> Tensor:
        return values.copy_(torch.stack(self.group.exchanged(self.rank, values)).sum(0))

    def joined(self, values: Tensor, width: int) -> Tensor:
        return torch.cat(self.group.exchanged(self.rank, values), dim=-1)[..., :width]


def on_ranks(compute: Callable[[Peers], Any], ranks: int = RANKS) -> list[Any]:
    """What each rank computes."""
    threads = Threads(ranks)
    with ThreadPoolExecutor(ranks) as pool, torch.no_grad():
        return list(pool.map(torch.no_grad()(compute), [ThreadPeers(threads, rank, ranks) for rank in range(ranks)]))


def filled(model: Any, peers: Peers) -> Any:
    """The copy of a model, with this rank's parts of its weights."""
    copied, parts = splitting.split(model, lambda weight: weight.shape, peers, torch.device("cpu"))
    for name, weight in model.named_parameters():
        copied.get_parameter(name).data = parts[name].of(weight.detach())
    return copied


@pytest.mark.parametrize("kind", sorted(SPLITTABLE))
def test_a_split_model_has_the_logits_of_the_whole_one(kind: str) -> None:
    """On all ranks to the bit, also where its tokens and inner features are odd; each has half of what counts."""
    config = tiny_config(kind, vocab_size=99, intermediate_size=47)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    heads.compute_in_fp32(model.get_output_embeddings())
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))

    def compute(peers: Peers) -> tuple[Tensor, int]:
        own = filled(model, peers)
        return own(ids).logits, sum(weight.numel() for weight in own.parameters() if weight.dim() > 1)

    found = on_ranks(compute)
    with torch.no_grad():
        whole = model(ids).logits
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][0], whole, atol=2e-5, rtol=1e-4)
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    # The last rows and columns have no partners.
    odd = sum(max(weight.shape) for weight in matrices)
    assert found[0][1] <= sum(weight.numel() for weight in matrices) / 2 + odd


def test_bad_numbers_of_ranks_are_named_with_those_that_divide_the_heads() -> None:
    """And so is a type of model that cannot be split."""
    assert obstacle(LLAMA, 2) is None
    assert obstacle(LLAMA, 4) is None
    assert obstacle(LLAMA, 3) == (
        "3 ranks do not divide the model's 12 attention heads and 4 key heads; these do: 1, 2, 4"
    )
    assert "type gpt2" in (obstacle({"model_type": "gpt2"}, 2) or "")


@pytest.mark.parametrize("kind", sorted(SPLITTABLE))
def test_transformers_has_a_plan_for_each_type(kind: str) -> None:
    """Its layers are split in ways that are known here."""
    plan: Any = AutoConfig.for_model(kind).base_model_tp_plan
    known = {"colwise", "colwise_gather_output", "rowwise", "rowwise_split_input", "embedding_rowwise"}
    assert set(plan.values()) <= known | {"replicate", "replicated_with_grad_allreduce"}
    assert sum(name.startswith("layers.*.") for name in plan) >= 4
