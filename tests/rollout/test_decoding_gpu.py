"""On a GPU: graphs draw what the same steps draw without them, and how fast. ``-s`` shows the figures."""

import time
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf.models.heads import compute_in_fp32
from rlhf.models.packable import PACKABLE
from rlhf.rollout import decoding
from rlhf.rollout.decoding import ON_CPU, UNCAPTURED, UNPACKED, Decoder
from rlhf.rollout.drawing import Responses, drawn, uniforms
from tests.rollout.slow import slow_inverse_transform
from tests.rollout.test_decoding import EXPERTS, LIKE_A_GPU, NUMBERS, PROMPTS, model_of_type, slowly

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


def without_graphs(model: Any, **more: Any) -> Decoder:
    decoder = Decoder(model, **more)
    vars(decoder)["_captures"] = False
    return decoder


@pytest.fixture(autouse=True)
def exact() -> Any:
    """No TF32, and not the kernels that ranks do without."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("model_type", sorted(PACKABLE | UNPACKED))
def test_graphs_draw_the_tokens_of_one_padded_batch(model_type: str) -> None:
    """In fp32, with few slots; graphs stay for a second call, also after the weights have changed in their place."""
    model = model_of_type(model_type).cuda()
    eos, expected = slowly(model)
    decoder = Decoder(model, LIKE_A_GPU, 4)
    assert vars(decoder)["_captures"] == (model_type not in EXPERTS | UNCAPTURED)
    for _ in range(2):
        found = decoder.sample(PROMPTS, NUMBERS, 1.0, eos_token_id=eos, pad=0)
        assert torch.equal(found.ids, expected.ids)
        torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-4, rtol=0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.9)
    eos, expected = slowly(model)
    found = decoder.sample(PROMPTS, NUMBERS, 1.0, eos_token_id=eos, pad=0)
    assert torch.equal(found.ids, expected.ids)


def test_graphs_are_made_anew_where_weights_have_moved() -> None:
    """Old graphs would read what is no longer there."""
    model = model_of_type("llama").cuda()
    decoder = Decoder(model, LIKE_A_GPU, 4)
    decoder.sample(PROMPTS, NUMBERS, 1.0, eos_token_id=-1, pad=0)
    for weight in model.parameters():
        weight.data = weight.data * 0.9
    eos, expected = slowly(model)
    assert torch.equal(decoder.sample(PROMPTS, NUMBERS, 1.0, eos_token_id=eos, pad=0).ids, expected.ids)


def billion(dtype: torch.dtype = torch.bfloat16, **more: Any) -> Any:
    """The shape of Llama 3.2 1B, with a head in fp32."""
    shape: dict[str, Any] = {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**shape | more), dtype=dtype).eval()
    compute_in_fp32(model.get_output_embeddings())
    return model


def prompts_of(count: int, low: int, high: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def rescored(model: Any, prompts: list[list[int]], responses: Responses) -> float:
    """The largest gap to the log-probabilities of one pass over each row alone, nats."""
    gaps: list[float] = []
    for prompt, ids, logprobs in zip(prompts, responses.ids, responses.logprobs, strict=True):
        count = int(logprobs.count_nonzero())
        row = torch.tensor([prompt + ids[:count].tolist()], device="cuda")
        logits = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(-1, ids[:count, None].cuda()).squeeze(-1)
        gaps.append(float((expected.cpu() - logprobs[:count]).abs().max()))
    return max(gaps)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 0.2)])
def test_graph_and_eager_steps_draw_the_same(dtype: torch.dtype, limit: float) -> None:
    """Bit for bit in fp32; in bf16, by cuDNN, but for rounding. Re-scored, the log-probabilities differ by rounding."""
    model = billion(dtype, num_hidden_layers=4)
    prompts = prompts_of(24, 5, 200, 128256)
    numbers = uniforms(0, range(24), 100)
    eos = -1
    found = Decoder(model).sample(prompts, numbers, 1.0, eos_token_id=eos, pad=0)
    eager = without_graphs(model).sample(prompts, numbers, 1.0, eos_token_id=eos, pad=0)
    if dtype == torch.float32:
        assert torch.equal(found.ids, eager.ids)
        assert torch.equal(found.logprobs, eager.logprobs)
    else:
        # Behind the first token that rounding changes, a response is another.
        assert (found.ids == eager.ids)[:, :10].double().mean() > 0.8
    gaps = [rescored(model, prompts, responses) for responses in (found, eager)]
    print(f"\n{dtype}: largest gaps {gaps} nats")
    assert max(gaps) < limit


def test_the_sampler_is_the_slow_one_on_a_gpu() -> None:
    """Of a real vocabulary, in fp32: but for rounding, each number lies between the sums before and with its token."""
    logits = 3 * torch.randn(512, 128256, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    logits[:, 300:900] = -torch.inf
    numbers = uniforms(0, range(512), 1)[:, 0].cuda()
    numbers[:40], numbers[40:80] = 0, 1 - 2**-53
    tokens, logprobs = drawn(logits, numbers, 1.0)
    assert logprobs.isfinite().all()
    sums = logits.softmax(-1).double().cumsum(-1)
    at = sums.gather(-1, tokens[:, None]).squeeze(-1)
    assert (at > numbers * sums[:, -1] - 1e-6).all()
    assert (at - logprobs.double().exp() < numbers * sums[:, -1] + 1e-6).all()
    assert (tokens == slow_inverse_transform(logits, numbers, 1.0)).float().mean() > 0.9


def timed(decoder: Decoder, prompts: list[list[int]], numbers: Any, eos: int) -> tuple[float, int]:
    """Seconds and tokens of a call, the graphs being there."""
    responses = decoder.sample(prompts, numbers, 1.0, eos_token_id=eos, pad=0)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    decoder.sample(prompts, numbers, 1.0, eos_token_id=eos, pad=0)
    torch.cuda.synchronize()
    return time.perf_counter() - begin, int(responses.logprobs.count_nonzero())


def test_tokens_a_second_of_a_billion_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform lengths, 256 + 256, and lengths spread over 32 … 512."""
    decoder = Decoder(billion())
    prompts = prompts_of(128, 256, 256, 128256)
    seconds, tokens = timed(decoder, prompts, uniforms(0, range(128), 256), -1)
    uniform = tokens / seconds
    torch.cuda.reset_peak_memory_stats()
    print(f"\nuniform: {seconds:.3f} s, {uniform:.0f} tokens/s, {100 * 0.43 / seconds:.0f} % of the limit of an H100")

    # A response ends where its number says: the draw is replaced for numbers above 1, which only these places have.
    plain, numbers = decoding.drawn, uniforms(0, range(128), 512)
    ends = torch.randint(32, 513, (128,), generator=torch.Generator().manual_seed(0))
    numbers[torch.arange(128), ends - 1] = 2.0

    def ending(logits: Any, given: Any, temperature: float) -> Any:
        ids, logprobs = plain(logits, given.clamp(max=0.5), temperature)
        return torch.where(given > 1, 2, torch.where(ids == 2, 3, ids)), logprobs

    monkeypatch.setattr(decoding, "drawn", ending)
    seconds, tokens = timed(decoder, prompts, numbers, 2)
    assert abs(tokens - int(ends.sum())) < 20
    print(f"32 … 512: {seconds:.3f} s, {tokens / seconds:.0f} useful tokens/s, {tokens / seconds / uniform:.0%}")
    print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def test_a_cpu_s_pace_works_on_a_gpu() -> None:
    """A graph for each number of rows, and a look at each step."""
    model = model_of_type("llama").cuda()
    eos, expected = slowly(model)
    found = Decoder(model, ON_CPU).sample(PROMPTS, NUMBERS, 1.0, eos_token_id=eos, pad=0)
    assert torch.equal(found.ids, expected.ids)
