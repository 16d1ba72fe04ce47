"""Micro batches by tokens, and samples end to end, against padded samples; on a GPU with the kernel for texts."""

import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.config.ppo import PpoSettings
from rlhf.models import heads, varlen
from rlhf.models.heads import TokenLogprobs, TokenValues
from rlhf.models.micro_batches import MicroBatch, PackedSamples, in_order
from rlhf.rollout.decoding import Decoder, decodes_in_slots
from rlhf.rollout.sequences import Experience, lay_out, minibatch_of
from rlhf.zero import group
from tests.models.tiny import tiny_config

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.usefixtures("group_of_one"),
]

LENGTHS = ((5, 1), (1, 7), (9, 3), (2, 2), (4, 6), (3, 1))
MORE: dict[str, dict[str, Any]] = {"gemma3_text": {"sliding_window": 3}}


def experience(lengths: Sequence[tuple[int, int]] = LENGTHS) -> Experience:
    """Samples of so many prompt and response tokens, with advantages and returns."""
    draw = random.Random(0)
    prompts, responses = ([[draw.randrange(3, 100) for _ in range(pair[side])] for pair in lengths] for side in (0, 1))
    batch = lay_out(prompts, responses, pad=0)
    numbers = torch.randn(5, *batch.mask.shape, generator=torch.Generator().manual_seed(0))
    names = ("logprobs", "reference_logprobs", "advantages", "values", "returns")
    return Experience.of(batch, **dict(zip(names, numbers, strict=True)))


def readers(kind: str) -> dict[str, nn.Module]:
    """A policy and a value model."""
    torch.manual_seed(0)
    more = {"attention_dropout": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2} | MORE.get(kind, {})
    config = tiny_config(kind, **more)
    policy: Any = AutoModelForCausalLM.from_config(config)
    value: Any = AutoModelForSequenceClassification.from_config(tiny_config(kind, num_labels=1, **more))
    return {"policy": TokenLogprobs(policy.eval()), "value": TokenValues(value.eval())}


def read(reader: nn.Module, part: Experience) -> Tensor:
    if isinstance(reader, TokenValues):
        return reader(part.ids, part.attention_mask, part.time, part.packed)
    arguments = part.ids, part.attention_mask, part.time, 0.7, True, part.count, part.packed
    return torch.stack(reader(*arguments), dim=1)


def found_by(reader: nn.Module, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """What a model says of each real token, and the gradients of a sum over all of them."""
    batch = experience()
    with torch.no_grad():
        scored = batch.scored(micro, lambda part: read(reader, part))
    reader.zero_grad()
    for part in minibatch_of(batch, range(len(LENGTHS)), micro).parts:
        objective(reader, part).backward()
    gradients = {name: one.grad.float() for name, one in reader.named_parameters() if one.grad is not None}
    return torch.where(columns(batch.mask, scored), scored, 0.0), gradients


def columns(of_tokens: Tensor, results: Tensor) -> Tensor:
    """Numbers of tokens beside results, of which a policy has two for each token."""
    return of_tokens.view(len(results), *[1] * (results.dim() - 2), -1)


def objective(reader: nn.Module, part: Experience) -> Tensor:
    """A sum over real tokens, each with its own weight."""
    results = read(reader, part)
    return (torch.where(columns(part.mask, results), results, 0.0) * columns(part.advantages, results)).sum()


def assert_same(own: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert own.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (own[name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-6, name


SIZES = (
    ("a sample", MicroBatch(1)),
    ("padded tokens", MicroBatch(1, 24, packed=False)),
    ("a packed row", MicroBatch(1, 100, packed=True)),
    ("some packed rows", MicroBatch(1, 15, packed=True)),
)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("name", ["policy", "value"])
def test_an_update_is_the_same_however_its_samples_are_laid_out(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32: log-probabilities with entropies, values, and gradients; the head in chunks, recomputed."""
    monkeypatch.setattr(heads, "CHUNK", 1)
    monkeypatch.setattr(heads, "FEWEST", 4)
    reader = readers(kind)[name]
    whole, gradients = found_by(reader, MicroBatch(len(LENGTHS)))
    for case, micro in SIZES:
        results, own = found_by(reader, micro)
        torch.testing.assert_close(results, whole, atol=1e-5, rtol=1e-5, msg=case)
        assert_same(own, gradients)


def test_what_a_rank_computes_beyond_its_own_tokens_changes_nothing() -> None:
    """As many as another rank has, since the ranks gather the head together."""
    reader = readers("llama")["policy"]
    (part,) = minibatch_of(experience(), range(len(LENGTHS)), MicroBatch(1, 100, packed=True)).parts
    count = int(part.mask.sum()) + 3
    more = replace(part, packed=PackedSamples.of(part.ids, part.attention_mask, part.time, count))
    torch.testing.assert_close(read(reader, more), read(reader, part))
    assert objective(reader, more).item() == pytest.approx(objective(reader, part).item(), rel=1e-5)


def test_the_host_says_where_samples_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gets each sample of a row, and no mask is made; the results are those of padded ones."""
    reader = readers("llama")["policy"]
    whole, gradients = found_by(reader, MicroBatch(len(LENGTHS)))
    lengths: list[list[int]] = []

    by_text = varlen.by_text_on_cpu

    def called(query: Tensor, key: Tensor, value: Tensor, texts: varlen.Boundaries, scale: float) -> Tensor:
        lengths.append(texts.offsets.diff().tolist())
        return by_text(query, key, value, texts, scale)

    def made(**_: Any) -> None:
        raise AssertionError("a mask was made")

    monkeypatch.setattr(varlen, "by_text_on_cpu", called)
    varlen.attend_by_text(reader.model)
    monkeypatch.setattr(varlen, "sdpa_mask", made)
    monkeypatch.setattr(varlen, "beginnings", made)
    results, own = found_by(reader, MicroBatch(1, 15, packed=True))
    # In each of two layers; scored in one row, since no more than four times the budget.
    every = sorted(map(sum, LENGTHS))
    assert sorted(lengths[0]) == every
    assert all(sum(row) <= 15 for row in lengths[2:])
    assert sorted(length for row in lengths[2::2] for length in row) == every
    torch.testing.assert_close(results, whole, atol=1e-5, rtol=1e-5)
    assert_same(own, gradients)


def test_a_policy_that_reads_packed_samples_is_sampled_as_before() -> None:
    """In its own weights, on one rank: the same tokens, in slots."""
    plain: Any = readers("llama")["policy"].model
    packed = deepcopy(plain)
    varlen.attend_by_text(packed)
    assert packed.config._attn_implementation == varlen.NAME
    assert decodes_in_slots(packed)
    numbers = torch.rand(3, 9, generator=torch.Generator().manual_seed(0))
    one, other = (
        Decoder(model).sample([[5, 6, 7], [8], [9, 10]], numbers, 1.0, eos_token_id=2, pad=0)
        for model in (plain, packed)
    )
    assert torch.equal(one.ids, other.ids)
    torch.testing.assert_close(one.logprobs, other.logprobs)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20),
    st.integers(18, 60),
    st.booleans(),
    st.integers(1, 3),
)
def test_ranks_have_equally_many_micro_batches_within_their_size(
    lengths: list[tuple[int, int]], tokens: int, packed: bool, ranks: int
) -> None:
    """Each sample is in one, and its result comes back in its place; ranks have about equally many tokens."""
    table = torch.tensor(lengths)
    order = table.sum(-1).argsort(descending=True, stable=True)
    with patch.object(group, "world_size", lambda: ranks):
        cut = MicroBatch(1, tokens, packed).cut(order, table)

    def gathered(_: Tensor, count: int) -> Tensor:
        return torch.cat(cut).flatten()[:count]

    with patch.object(group, "gather_rows", gathered):
        assert in_order([order], cut, len(lengths)).tolist() == list(range(len(lengths)))
    loads = torch.zeros(len(cut), ranks, dtype=torch.long)
    for number, turn in enumerate(cut):
        of_turn = table[turn]
        loads[number] = of_turn.sum((0, 2))
        padded = len(turn) * of_turn.amax(0).sum(-1)
        assert (loads[number] if packed else padded).max() <= tokens
    if packed:
        real = loads.sum(0)
        assert real.max() - real.min() <= 18
        # First fit decreasing leaves at most one row that is not more than half full.
        assert (loads.amax(1) * 2 <= tokens).sum() <= 1


def test_a_micro_batch_follows_from_the_settings() -> None:
    """With packing, as many tokens as a micro batch of the longest samples; otherwise only where tokens are set."""
    values = {"rollouts": 32, "max_prompt_length": 100, "sampling": {"max_new_tokens": 60}}
    for given_, expected in (
        ({"micro_batch_size": 4}, MicroBatch(4)),
        ({"micro_batch_size": 4, "packing": True}, MicroBatch(4, 640, packed=True)),
        ({"micro_batch_size": 64, "packing": True}, MicroBatch(32, 32 * 160, packed=True)),
        ({"micro_batch_tokens": 500}, MicroBatch(3, 500)),
        ({"micro_batch_tokens": 500, "packing": True}, MicroBatch(3, 500, packed=True)),
    ):
        settings = PpoSettings.model_validate(values | given_)
        assert MicroBatch.of(settings) == expected
        if settings.micro_batch_tokens:
            assert settings.micro_batch == 3


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ["policy", "value"])
def test_packed_samples_compute_on_a_gpu_what_padded_ones_do(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 with the kernel: as near to fp32 as padded samples in bf16 are."""
    monkeypatch.setattr(group, "device", lambda: torch.device("cuda"))
    # The results of all ranks go through this process's group, which is of CPUs.
    monkeypatch.setattr(group, "gather_rows", lambda rows, count: rows[:count].cpu())
    exact = readers(kind)[name].cuda()
    padded, packed = (deepcopy(exact).bfloat16() for _ in range(2))
    by_text: Any = packed.model
    varlen.attend_by_text(by_text)
    assert by_text.config._attn_implementation == varlen.NAME
    expected, gradients = found_by(exact, MicroBatch(6))
    of_padded, padded_gradients = found_by(padded, MicroBatch(6))
    own, own_gradients = found_by(packed, MicroBatch(1, 15, packed=True))
    assert (own - expected).norm() < 1.5 * (of_padded - expected).norm() + 1e-2 * expected.norm()
    for weight, gradient in gradients.items():
        gap = (padded_gradients[weight] - gradient).norm()
        assert (own_gradients[weight] - gradient).norm() < 2 * gap + 1e-2 * gradient.norm(), weight


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["policy", "value"])
def test_a_packed_micro_batch_never_waits_for_the_gpu(name: str) -> None:
    """Neither its forward nor its backward pass, the head's chunks included."""
    reader = readers("llama")[name].bfloat16().cuda()
    varlen.attend_by_text(reader.model)
    (part,) = minibatch_of(experience(), range(len(LENGTHS)), MicroBatch(1, 100, packed=True)).parts
    part = part.to(torch.device("cuda"))
    objective(reader, part).backward()  # the first pass loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective(reader, part).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
