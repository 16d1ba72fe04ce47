import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.models.capacity import AT_ONCE
from rlhf.models.micro_batches import MicroBatch
from rlhf.models.text import load_tokenizer
from rlhf.rollout.drawing import Responses
from rlhf.rollout.prompts import PromptBatch
from rlhf.rollout.rollout import Rollout, roll_out
from rlhf.rollout.sequences import Experience, minibatches, whitened
from tests.models.tiny import make_tiny_llama

Lengths = list[tuple[int, int]]
lengths = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6)


pytestmark = [
    # DeepSpeed's and torch's own.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.usefixtures("group_of_one"),
]


def experience_of(lengths: Lengths, extra: int = 0) -> Experience:
    """Samples of so many prompt and response tokens, no value twice; ``extra`` columns of padding on both sides."""
    prompt, time = (max(column) + extra for column in zip(*lengths, strict=True))
    attention_mask = torch.zeros((len(lengths), prompt + time), dtype=torch.long)
    for row, (before, after) in zip(attention_mask, lengths, strict=True):
        row[prompt - before : prompt + after] = 1
    mask = attention_mask[:, prompt:].bool()
    numbers = [torch.arange(mask.numel()).reshape(mask.shape) + 1000.0 * field for field in range(1, 6)]
    ids = torch.arange(attention_mask.numel()).reshape(attention_mask.shape) * attention_mask
    return Experience(ids, attention_mask, mask, *numbers)


def real_tokens(experience: Experience) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(experience.ids, experience.attention_mask, strict=True)]


@given(lengths, st.integers(0, 3), st.data())
def test_trimming_loses_padding_only(lengths: Lengths, extra: int, data: st.DataObject) -> None:
    """Every real token and what belongs to it is kept in its place; no column is padding throughout."""
    experience = experience_of(lengths, extra)
    indices = torch.tensor(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True)))
    rows = experience.rows(indices)
    assert real_tokens(rows) == [real_tokens(experience)[index] for index in indices]
    for name in ("logprobs", "reference_logprobs", "values", "advantages", "returns"):
        kept, whole = getattr(rows, name), getattr(experience, name)[indices]
        assert torch.equal(kept[rows.mask], whole[experience.mask[indices]]), name
    assert torch.equal(rows.attention_mask[:, -rows.time :].bool(), rows.mask)
    assert rows.attention_mask.any(0).all()


@given(lengths, st.integers(1, 3), st.integers(1, 4), st.integers(0, 9))
def test_minibatches_cover_every_sample_once(lengths: Lengths, count: int, micro: int, seed: int) -> None:
    """In micro batches of at most the size asked for; each minibatch knows how many response tokens it has."""
    experience = experience_of(lengths * count)
    drawn = list(minibatches(experience, count, MicroBatch(micro), seed))
    assert len(drawn) == count
    assert all(len(part.ids) <= micro for minibatch in drawn for part in minibatch.parts)
    seen = [row for minibatch in drawn for part in minibatch.parts for row in real_tokens(part)]
    assert sorted(seen) == sorted(real_tokens(experience))
    for minibatch in drawn:
        assert len(minibatch.parts[0].ids) <= len(lengths)
        assert minibatch.num_tokens == sum(int(part.mask.sum()) for part in minibatch.parts)


@pytest.mark.parametrize("count", [1, 3])
def test_a_minibatch_is_whitened_by_itself(count: int) -> None:
    """Over its real tokens, in slow float64; another epoch mixes other samples, from the same advantages."""
    experience = experience_of([(2, 1 + number % 4) for number in range(12)], extra=1)
    experience = replace(experience, advantages=(experience.advantages - 3000).square())
    for epoch in range(2):
        parts = minibatches(experience, count, MicroBatch(2), 5, epoch, prepare=whitened)
        plain = minibatches(experience, count, MicroBatch(2), 5, epoch)
        for minibatch, as_it_was in zip(parts, plain, strict=True):
            pairs = [
                (found.item(), given.item())
                for part, before in zip(minibatch.parts, as_it_was.parts, strict=True)
                for found, given in zip(part.advantages[part.mask], before.advantages[before.mask], strict=True)
            ]
            middle = sum(given for _, given in pairs) / len(pairs)
            spread = math.sqrt(sum((given - middle) ** 2 for _, given in pairs) / len(pairs))
            expected = [(given - middle) / spread for _, given in pairs]
            assert [found for found, _ in pairs] == pytest.approx(expected, abs=1e-6)
            assert all(not part.advantages[~part.mask].any() for part in minibatch.parts)


def test_the_order_follows_from_the_seeds_alone() -> None:
    """The same for the same seed, iteration and epoch, whatever the micro batches; other for any other."""
    experience = experience_of([(2, 3)] * 32)

    def order(micro: int, *seed: int) -> list[list[int]]:
        drawn = minibatches(experience, 4, MicroBatch(micro), *seed)
        return [row for minibatch in drawn for part in minibatch.parts for row in real_tokens(part)]

    assert order(2, 0, 5, 1) == order(8, 0, 5, 1)
    assert len({str(order(8, *seed)) for seed in ((0, 5, 1), (1, 5, 1), (0, 6, 1), (0, 5, 2))}) == 4


@given(lengths, st.integers(0, 3), st.integers(1, 3))
def test_scoring_gives_each_sample_its_own_result_within_the_budget(lengths: Lengths, extra: int, micro: int) -> None:
    """In the order of the samples, whatever the order they are computed in; longest first, and little of it padding."""
    experience = experience_of(lengths, extra)
    budget = AT_ONCE * micro * experience.ids.shape[1]
    widths: list[int] = []

    def compute(part: Experience) -> torch.Tensor:
        assert part.ids.numel() <= budget
        assert part.count == int(part.mask.sum())
        widths.append(int(part.attention_mask.sum(1).max()))
        return part.values * part.mask

    assert torch.equal(experience.scored(MicroBatch(micro), compute), experience.values * experience.mask)
    assert widths == sorted(widths, reverse=True)
    assert len(widths) <= -(-len(lengths) // micro)


def test_micro_batches_of_a_minibatch_hold_similar_lengths() -> None:
    """Two long and two short texts in alternation make a long part and a short one."""
    experience = experience_of([(5, 5), (1, 1), (5, 5), (1, 1)])
    (minibatch,) = minibatches(experience, 1, MicroBatch(2), 0)
    assert [part.ids.shape[1] for part in minibatch.parts] == [10, 2]


class Echo:
    """Answers with a prompt's first token and the places of its random numbers; says what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.asked: list[tuple[int, bool]] = []

    def sample(self, prompts: Sequence[list[int]], noise: Tensor, *, unchanged: bool = False) -> Responses:
        self.asked.append((len(prompts), unchanged))
        ids = 5 + (20 * noise).long()
        ids[:, 0] = torch.tensor([prompt[0] for prompt in prompts])
        return Responses(ids, noise.log())


def test_a_rollout_in_parts_is_the_whole_one(tmp_path: Path) -> None:
    """Whatever the number of parts; each is handed on in its turn, and weights are taken for the first alone."""
    policy = Echo(make_tiny_llama(tmp_path / "tiny"))
    batch = PromptBatch([*"abcde"], [[7], [8, 9, 10], [11], [12], [13, 14]], [*range(10, 15)])
    whole, handed = roll_out(policy, batch, 3, 4), list[Rollout]()
    for parts, sizes in ((2, [3, 2]), (3, [2, 2, 1]), (9, [1] * 5)):
        policy.asked.clear()
        handed.clear()
        joined = roll_out(policy, batch, 3, 4, parts=parts, sampled=handed.append)
        assert policy.asked == [(size, number > 0) for number, size in enumerate(sizes)]
        assert [text for part in handed for text in part.texts] == joined.texts == whole.texts
        assert joined.prompts == whole.prompts
        for name in ("ids", "attention_mask", "mask"):
            tensors = [getattr(part.sequences, name) for part in handed]
            assert torch.equal(torch.cat(tensors), getattr(whole.sequences, name))
            assert torch.equal(getattr(joined.sequences, name), getattr(whole.sequences, name))
        assert torch.equal(joined.logprobs, whole.logprobs)
        assert torch.equal(joined.ended, whole.ended)
