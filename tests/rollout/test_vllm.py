"""vLLM as the engine of rollouts: the real one, on a CPU or a GPU. ``pytest -m vllm`` where vLLM is installed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.config.stages import Precision, ScratchSettings
from rlhf.models import folders
from rlhf.rollout.drawing import Responses, uniforms
from rlhf.rollout.vllm_sampling import Room, VllmSampler, obstacle
from rlhf.zero import group as ranks
from rlhf.zero.engine import DTYPES
from tests.models.tiny import make_tiny_llama
from tests.zero.groups import run_groups

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("group"),
]

# vLLM's attention on a CPU has heads of 32 and more.
SHAPE = ScratchSettings(vocabulary=300, hidden_size=64, layers=2, heads=2, context=320)
# The last fills a block of the engine's cache, which another call would find there.
PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7], [10 + place % 200 for place in range(300)]]
TEMPERATURE = 0.7
NOISE = uniforms(3, range(len(PROMPTS)), 16)
# On a GPU vLLM's attention multiplies fp32 as TF32.
TOLERANCE = {"fp32": 0.02 if torch.cuda.is_available() else 1e-4, "bf16": 0.1}


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def precision(request: pytest.FixtureRequest) -> Precision:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with rows that are no token, whose generation_config.json would change what is sampled."""
    folder = make_tiny_llama(tmp_path_factory.mktemp("model"), SHAPE)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + 20)
    model.save_pretrained(folder)
    odd = {"temperature": 0.1, "top_k": 2, "repetition_penalty": 3.0, "eos_token_id": list(range(2, 200))}
    (folder / "generation_config.json").write_text(json.dumps(odd))
    return folder


@pytest.fixture(scope="module")
def policy(folder: Path, precision: Precision, group_of_one: None) -> Any:
    return folders.load_policy(folder, DTYPES[precision]).to(ranks.device()).eval()


@pytest.fixture(scope="module")
def sampler(folder: Path, precision: Precision, policy: Any) -> VllmSampler:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return VllmSampler(folder, precision, TEMPERATURE, Room(len(PROMPTS), 316), fp32_head=True, source=policy)


def rescored(policy: Any, responses: Responses, prompts: list[list[int]], temperature: float) -> Tensor:
    """The log-probabilities of the responses' tokens under the policy, one text at a time."""
    rows: list[Tensor] = []
    for prompt, response in zip(prompts, responses.ids.tolist(), strict=True):
        ids = torch.tensor([prompt + response], device=policy.device)
        logits = policy(ids).logits[0, len(prompt) - 1 : -1].float() / temperature
        rows.append(logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0].cpu())
    return torch.stack(rows)


@torch.no_grad()
def check(sampler: VllmSampler, policy: Any, precision: Precision) -> Responses:
    """The sampler's log-probabilities are the policy's, up to and with EOS; behind it is padding."""
    responses = sampler.sample(PROMPTS, NOISE)
    eos, pad = sampler.tokenizer.eos_token_id, sampler.tokenizer.pad_token_id
    before = (responses.ids == eos).cumsum(-1) - (responses.ids == eos).long() == 0
    gaps = (responses.logprobs - rescored(policy, responses, PROMPTS, TEMPERATURE)).abs()
    assert gaps[before].max() < TOLERANCE[precision]
    assert (responses.logprobs[before] < 0).all()
    assert (responses.ids[~before] == pad).all()
    assert (responses.logprobs[~before] == 0).all()
    return responses


def test_the_engine_is_found_and_knows_the_model(folder: Path, tmp_path: Path) -> None:
    """An architecture of ours has no obstacle; one that it lacks is named."""
    assert obstacle(folder) is None
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BioGptForCausalLM"]}))
    what, _ = obstacle(tmp_path) or ("", "")
    assert what.endswith("does not know the architecture BioGptForCausalLM")


def test_log_probabilities_are_the_policys_also_after_an_update(
    sampler: VllmSampler, policy: Any, precision: Precision
) -> None:
    """Weights are handed over before each rollout, those of a head that is tied to the embeddings too."""
    first = check(sampler, policy, precision)
    again = check(sampler, policy, precision)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.logprobs, again.logprobs)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.8)
    assert not torch.equal(check(sampler, policy, precision).ids, first.ids)


def test_a_sample_does_not_depend_on_those_beside_it(sampler: VllmSampler, policy: Any) -> None:
    """Its tokens follow from its own random numbers, in any batch, but for rounding."""
    whole = sampler.sample(PROMPTS, NOISE)
    alone = sampler.sample(PROMPTS[1:2], NOISE[1:2])
    assert torch.equal(whole.ids[1:2], alone.ids)
    assert not torch.equal(whole.ids[0], whole.ids[2])


def test_ranks_that_hold_one_copy_sample_as_one_with_its_own(tmp_path: Path) -> None:
    """The same tokens in fp32, before and after an update of sharded weights."""
    if torch.cuda.is_available():
        pytest.skip("its ranks are processes on a CPU")
    make_tiny_llama(tmp_path / "tiny", SHAPE)
    run_groups("tests.rollout.vllm_ranks", tmp_path)
    one, *two = (
        torch.load(tmp_path / str(size) / f"found-{rank}.pt", weights_only=False)
        for size, rank in ((1, 0), (2, 0), (2, 1))
    )
    assert not torch.equal(one[0].ids, one[1].ids)
    for others in two:
        for ours, other in zip(one, others, strict=True):
            assert torch.equal(ours.ids, other.ids)
            torch.testing.assert_close(ours.logprobs, other.logprobs, atol=1e-4, rtol=0)


def test_responses_end_with_eos_or_at_the_limit(sampler: VllmSampler, policy: Any, precision: Precision) -> None:
    """EOS is part of a response, and is the only token that ends it; rows without a token are never drawn."""
    eos, tokens = sampler.tokenizer.eos_token_id, len(sampler.tokenizer)
    embeddings = policy.get_input_embeddings().weight
    kept = embeddings.detach().clone()
    with torch.no_grad():
        embeddings[eos] = 2 * embeddings.mean(0) + 0.3 * embeddings[eos]
        embeddings[tokens:] = 3 * embeddings[eos]
    noise = uniforms(4, range(64), 16)
    prompts = [PROMPTS[row % 4] for row in range(64)]
    responses = sampler.sample(prompts, noise)
    with torch.no_grad():
        embeddings.copy_(kept)
    assert int(responses.ids.max()) < tokens
    lengths = (responses.logprobs < 0).sum(-1)
    ends = (responses.ids == eos).any(-1)
    assert 0 < int(ends.sum()) < 64
    assert (lengths[~ends] == 16).all()
    assert (responses.ids[ends, lengths[ends] - 1] == eos).all()


def test_temperature_0_is_greedy(sampler: VllmSampler, policy: Any, precision: Precision) -> None:
    """The likeliest token at each place, with the log-probability 0."""
    vars(sampler)["_temperature"] = 0.0
    responses = sampler.sample(PROMPTS, NOISE)
    vars(sampler)["_temperature"] = TEMPERATURE
    assert not responses.logprobs.any()
    with torch.no_grad():
        likeliest = policy(torch.tensor(PROMPTS[:1], device=policy.device)).logits[0, -1].argmax()
    assert responses.ids[0, 0] == likeliest
