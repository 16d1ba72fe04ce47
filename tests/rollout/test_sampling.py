import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from rlhf.models import folders, text
from rlhf.rollout.drawing import inverse_transform, uniforms
from rlhf.rollout.sampling import sample_in_batch, sample_responses
from rlhf.rollout.speaker import Speaker


def sampled(logits: torch.Tensor, numbers: torch.Tensor, temperature: float) -> torch.Tensor:
    """One token a number."""
    return inverse_transform(logits.expand(len(numbers), -1), numbers, temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_distributed_as_softmax(temperature: float) -> None:
    """Pearson's chi-squared test over 50,000 samples of 40 tokens does not tell the two apart."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0))
    tokens = sampled(logits, uniforms(0, range(50_000), 1)[:, 0], temperature)
    observed = torch.bincount(tokens, minlength=40).numpy()
    expected = torch.softmax(logits.double() / temperature, -1).numpy() * 50_000
    assert stats.chisquare(observed, expected).pvalue > 0.01
    wrong = torch.softmax(logits.double() / (1.1 * temperature), -1).numpy() * 50_000
    assert stats.chisquare(observed, wrong).pvalue < 1e-6


def test_impossible_tokens_are_never_sampled_at_either_end() -> None:
    """Numbers 0 and just below 1 fall on the first and last token that have any probability."""
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 0.0, -torch.inf])
    numbers = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert sampled(logits, numbers, 1.0).tolist() == [1, 3]


def test_a_sample_s_numbers_are_its_own() -> None:
    """They follow from the seed and the sample's index: not from its neighbours, nor from how many are drawn."""
    whole = uniforms(7, range(20), 16)
    assert torch.equal(uniforms(7, [11, 3], 16), whole[[11, 3]])
    assert torch.equal(uniforms(7, range(20), 9), whole[:, :9])
    assert not (uniforms(8, range(20), 16) == whole).any()
    assert len(whole.unique()) == whole.numel()
    assert whole.min() >= 0
    assert whole.max() < 1
    assert stats.kstest(uniforms(7, range(500), 16).flatten().numpy(), "uniform").pvalue > 0.01


def test_a_response_does_not_depend_on_its_neighbours_in_the_batch(tiny: Path) -> None:
    """A prompt alone, beside others, and padded for a longer one is answered alike; another seed answers otherwise."""
    prompts = ["a film", "the joy of a film of two halves", "dull"]
    answers = Speaker(tiny).answers
    together = answers(prompts, 1.0, max_new_tokens=12, seed=0)
    assert answers(prompts[:1], 1.0, max_new_tokens=12, seed=0) == together[:1]
    assert answers(prompts[:2], 1.0, max_new_tokens=12, seed=0) == together[:2]
    assert answers(prompts, 1.0, max_new_tokens=12, seed=1) != together
    greedy = answers(prompts, 0.0, max_new_tokens=12, seed=0)
    assert greedy == answers(prompts, 0.0, max_new_tokens=12, seed=1)
    assert greedy == answers(prompts, 1e-4, max_new_tokens=12, seed=2)


# Every kind that ``generate`` knows: filters, penalties, forced and forbidden tokens, more and other ends.
OBEYED = {
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 2,
    "top_p": 0.5,
    "min_p": 0.2,
    "typical_p": 0.4,
    "repetition_penalty": 1.8,
    "encoder_repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 9,
    "min_length": 20,
    "suppress_tokens": list(range(40, 60)),
    "begin_suppress_tokens": list(range(60, 160)),
    "bad_words_ids": [[170], [171]],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 9,
    "exponential_decay_length_penalty": [1, 1.5],
    "sequence_bias": [[[61], 9.0]],
    "eos_token_id": [8, 9, 10, 11, 12],
    "max_new_tokens": 2,
    "num_beams": 3,
    "guidance_scale": 2.0,
    "use_cache": False,
}


@torch.no_grad()
def written_out(model: Any, prompt: list[int], numbers: list[float], temperature: float, eos: int, tokens: int) -> Any:
    """Ids and log-probabilities of one response: the definition, one whole forward pass a token, in float64."""
    ids: list[int] = []
    logprobs: list[float] = []
    for number in numbers:
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, -1, :tokens] / temperature
        probabilities = torch.softmax(logits, -1)
        token, total = 0, float(probabilities[0])
        while total <= number:
            token += 1
            total += float(probabilities[token])
        ids.append(token)
        logprobs.append(float(probabilities[token].log()))
        if token == eos:
            break
    return ids, logprobs


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_what_the_model_s_folder_says_of_generating_is_no_part_of_the_policy(
    tiny: Path, tmp_path: Path, temperature: float
) -> None:
    """Tokens and their log-probabilities are those of softmax(logits / temperature), whatever else it asks for."""
    folder = tmp_path / "opinionated"
    shutil.copytree(tiny, folder)
    (folder / "generation_config.json").write_text(json.dumps(OBEYED))
    tokenizer, numbers = text.load_tokenizer(folder), uniforms(3, range(40), 12)
    prompts = [[20 + row % 30] * (1 + row % 3) for row in range(40)]
    model, pad = folders.load_policy(folder, torch.float32).eval(), tokenizer.pad_token_id
    # The commonest token ends a response, so that they end everywhere.
    eos = int(sample_responses(model, prompts, numbers, temperature, eos_token_id=-1, pad=pad).ids.flatten().mode()[0])
    found = sample_responses(model, prompts, numbers, temperature, eos_token_id=eos, pad=pad)
    exact: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64).eval()
    lengths: set[int] = set()
    for row, prompt in enumerate(prompts):
        ids, logprobs = written_out(exact, prompt, numbers[row].tolist(), temperature, eos, len(tokenizer))
        assert found.ids[row].tolist() == ids + [pad] * (12 - len(ids))
        expected = torch.tensor(logprobs + [0.0] * (12 - len(ids)))
        torch.testing.assert_close(found.logprobs[row], expected, atol=1e-4, rtol=0)
        lengths.add(len(ids))
    assert len(lengths) > 2


@pytest.mark.parametrize("sample", [sample_responses, sample_in_batch])
def test_sampling_stops_when_every_response_has_ended(tiny: Path, sample: Any) -> None:
    """The model is asked for as many tokens as the longest response has, and not for those beyond."""
    heads: list[int] = []
    model = folders.load_policy(tiny, torch.float32).eval()
    prompts = [[20], [21, 22]]
    model.lm_head.register_forward_pre_hook(lambda *_: heads.append(1))
    sample(model, prompts, uniforms(0, range(2), 1), 1.0, eos_token_id=-1, pad=0)
    beside = len(heads) - 1

    def common(seed: int) -> set[int]:
        heads.clear()
        free = sample(model, prompts, uniforms(seed, range(2), 30), 1.0, eos_token_id=-1, pad=0).ids
        assert len(heads) == beside + 30
        return {*free[0, :25].tolist()} & {*free[1, :25].tolist()}

    # Both responses are to end, and before the limit.
    seed = next(seed for seed in range(20) if common(seed))
    end, numbers = min(common(seed)), uniforms(seed, range(2), 30)
    free = sample(model, prompts, numbers, 1.0, eos_token_id=-1, pad=0).ids
    heads.clear()
    sample(model, prompts, numbers, 1.0, eos_token_id=end, pad=0)
    assert len(heads) - beside == max(row.tolist().index(end) for row in free) + 1 < 30
