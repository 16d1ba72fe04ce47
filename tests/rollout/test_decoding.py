import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from rlhf.errors import PreflightError
from rlhf.models.packable import PACKABLE
from rlhf.rollout import decoding
from rlhf.rollout.decoding import ON_GPU, UNPACKED, Decoder, Drawing, Pace, decodes_in_slots
from rlhf.rollout.drawing import drawn, uniforms
from rlhf.rollout.sampling import sample_responses
from rlhf.rollout.slots import Space
from tests.models.test_architectures import TAKEN
from tests.models.tiny import tiny_config
from tests.rollout.slow import slow_inverse_transform, slow_responses

TIME = 14
LIKE_A_GPU = Pace(steps=3, late=True, any_size=False, columns=8, tokens=20)
"""Several steps between looks, which are late, in rows and columns of few sizes."""
EXPERTS = {"granitemoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"}


def some_prompts() -> list[list[int]]:
    """Of 1 to 14 tokens, some of them several times, and one that begins as another."""
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 100) for _ in range(draw.randrange(1, 15))] for _ in range(7)]
    return [*prompts, prompts[2], [9], prompts[2], [*prompts[2][:-1], 50]]


PROMPTS = some_prompts()
NUMBERS = uniforms(0, range(len(PROMPTS)), TIME)


def model_of_type(model_type: str, **more: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **more)).eval()


def slowly(model: Any) -> tuple[int, Any]:
    """The commonest token, and responses that end with it, some early and some late."""
    free = slow_responses(model, PROMPTS, NUMBERS, 1.0, eos_token_id=-1, pad=0)
    eos = int(free.ids.flatten().mode()[0])
    expected = slow_responses(model, PROMPTS, NUMBERS, 1.0, eos_token_id=eos, pad=0)
    assert len({int(row.count_nonzero()) for row in expected.logprobs}) > 1
    return eos, expected


@pytest.mark.parametrize("model_type", sorted(PACKABLE | UNPACKED))
def test_slots_draw_the_tokens_of_one_padded_batch(model_type: str) -> None:
    """By every type that decodes in slots: few slots, prompts that wait, repeat each other and are read in parts."""
    model = model_of_type(model_type)
    assert decodes_in_slots(model)
    eos, expected = slowly(model)
    found = Decoder(model, LIKE_A_GPU, 4).sample(PROMPTS, NUMBERS, 1.0, eos_token_id=eos, pad=0)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=5e-5, rtol=0)


LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("gemma3_text", LAYERS),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("mistral", {"sliding_window": None}),
        ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    ],
)
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_any_number_of_slots_draws_the_same(model_type: str, more: Mapping[str, Any], rows: int) -> None:
    """Also on a CPU's pace, where every step looks, and with layers of two types."""
    model = model_of_type(model_type, **more)
    eos, expected = slowly(model)
    found = Decoder(model, None, rows).sample(PROMPTS, NUMBERS, 1.0, eos_token_id=eos, pad=0)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=5e-5, rtol=0)


def test_a_call_of_fewer_prompts_takes_the_slots_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where they stay with their graphs: what an earlier call has left changes nothing."""
    model = model_of_type("llama")
    eos, expected = slowly(model)
    made: list[Space] = []

    class Kept(Space):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            made.append(self)

    monkeypatch.setattr(decoding, "Space", Kept)
    decoder = Decoder(model, LIKE_A_GPU, 4)
    decoder.sample(PROMPTS, 1 - NUMBERS, 1.0, eos_token_id=eos, pad=0)
    monkeypatch.setattr(Decoder, "_space_for", lambda *_: made[0])
    found = decoder.sample(PROMPTS[:3], NUMBERS[:3], 1.0, eos_token_id=eos, pad=0)
    assert len(made) == 1
    assert torch.equal(found.ids, expected.ids[:3])
    torch.testing.assert_close(found.logprobs, expected.logprobs[:3], atol=5e-5, rtol=0)


def test_greedy_responses_are_the_likeliest_tokens() -> None:
    """And their log-probabilities are 0, whatever the numbers are."""
    model = model_of_type("llama")
    expected = slow_responses(model, PROMPTS, NUMBERS, 0.0, eos_token_id=7, pad=0)
    found = sample_responses(model, PROMPTS, 1 - NUMBERS, 0.0, eos_token_id=7, pad=0)
    assert torch.equal(found.ids, expected.ids)
    assert not found.logprobs.any()


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("bloom", {}),
        ("falcon", {"alibi": True}),
        ("gpt_oss", {}),
        ("mamba2", TAKEN["mamba2"]),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ],
)
def test_models_that_slots_would_change_are_sampled_in_a_batch(model_type: str, more: Mapping[str, Any]) -> None:
    """Those with a bias by place, a state beside the cache, or positions that follow from the batch."""
    model = model_of_type(model_type, **more)
    assert not decodes_in_slots(model)
    eos, expected = slowly(model)
    found = sample_responses(model, PROMPTS, NUMBERS, 1.0, eos_token_id=eos, pad=0)
    assert torch.equal(found.ids, expected.ids)


def shapes_read(model: Any) -> list[tuple[int, int]]:
    """The shapes of the token ids that the model's body will be given."""
    shapes: list[tuple[int, int]] = []
    model.model.register_forward_pre_hook(
        lambda _, __, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_equal_prompts_are_read_once_and_ended_rows_cost_nothing() -> None:
    """Of eleven prompts eight differ before their last token and have one; each token is computed once."""
    model = model_of_type("llama")
    eos, expected = slowly(model)
    decoder, shapes = Decoder(model), shapes_read(model)
    decoder.sample(PROMPTS, NUMBERS, 1.0, eos_token_id=eos, pad=0)
    [prompts, *steps] = shapes
    assert prompts == (len({tuple(prompt[:-1]) for prompt in PROMPTS} - {()}), max(map(len, PROMPTS)) - 1)
    assert sum(rows for rows, _ in steps) == int(expected.logprobs.count_nonzero())


def test_waiting_prompts_fill_the_slots_of_ended_rows() -> None:
    """Four slots stay busy: hardly more rows are computed than there are tokens."""
    model = model_of_type("llama")
    eos, expected = slowly(model)
    decoder, shapes = Decoder(model, None, 4), shapes_read(model)
    decoder.sample(PROMPTS, NUMBERS, 1.0, eos_token_id=eos, pad=0)
    steps = [rows for rows, width in shapes if width == 1]
    assert max(steps) <= 4
    assert sum(steps) <= int(expected.logprobs.count_nonzero()) + len(PROMPTS)


def test_few_rows_read_lengths_of_few_sizes() -> None:
    """Never less than is needed, and less than half as much again; a GPU makes a graph for each."""
    needed = range(1, 4000, 7)
    lengths = {wanted: ON_GPU.length(wanted, few_rows=True) for wanted in needed}
    assert all(ON_GPU.length(wanted) <= length < 1.5 * wanted + 128 for wanted, length in lengths.items())
    assert len(set(lengths.values())) <= 11
    assert len({ON_GPU.length(wanted) for wanted in needed}) > 30


class HostWatch(TorchDispatchMode):
    """Notes operations that copy between devices, or whose result the host would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        # A number from the host is an argument of its kernel, but where it is copied.
        copies = "copy" in str(func)
        devices = {tensor.device.type for tensor in tensors if copies or tensor.dim()}
        if len(devices) > 1 or any(name in str(func) for name in ("local_scalar", "nonzero", "unique")):
            self.seen.append(str(func))
        return result


@torch.no_grad()
def operations_with_the_host(model_type: str) -> Sequence[str]:
    """Those of a step of a model on a device of torch's that holds no numbers."""
    decoder = copy.copy(Decoder(model_of_type(model_type)))
    device = torch.device("meta")
    for name, value in vars(decoder).items():
        if isinstance(value, Tensor):
            setattr(decoder, name, value.to(device))
    shapes, own = vars(decoder)["_shapes"], vars(decoder)
    own["_model"], own["_forbidden"] = model_of_type(model_type).to(device), torch.zeros(3, dtype=torch.long).to(device)
    space = Space(shapes, torch.float32, device, slots=6, samples=9, time=12, length=32)
    with HostWatch() as watch:
        decoder.advance(space, Drawing(1.0, 2), rows=4, length=16, steps=1)
    return watch.seen


@pytest.mark.parametrize("model_type", sorted((PACKABLE | UNPACKED) - EXPERTS))
def test_a_step_never_needs_the_host(model_type: str) -> None:
    """So that it can be captured as a graph: it copies nothing from the host, and no shape follows from a number."""
    assert operations_with_the_host(model_type) == []


def test_what_needs_the_host_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above were none."""

    def watched(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        chosen = logits.index_select(-1, torch.arange(3).to(logits.device))
        return chosen.argmax(-1), chosen.amax(-1)

    monkeypatch.setattr(decoding, "drawn", watched)
    assert operations_with_the_host("llama")


@pytest.mark.parametrize("vocabulary", [1, 40, 256, 257, 1000, 5120])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_a_token_is_where_the_sum_over_the_whole_vocabulary_passes_its_number(
    vocabulary: int, temperature: float
) -> None:
    """In two steps as in one, with whole blocks of impossible tokens, and numbers at both ends."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, vocabulary, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < 0.3] = -torch.inf
    logits[:, 300:700] = -torch.inf
    logits[::2, -260:-1] = -torch.inf
    logits[:, min(20, vocabulary - 1)] = 0.5
    numbers = torch.rand(400, generator=generator, dtype=torch.float64)
    numbers[:40], numbers[40:80] = 0, 1 - 2**-53
    tokens, logprobs = drawn(logits, numbers, temperature)
    # At the upper end the last bit of a sum decides.
    expected = slow_inverse_transform(logits, numbers, temperature)
    assert torch.equal(torch.cat([tokens[:40], tokens[80:]]), torch.cat([expected[:40], expected[80:]]))
    expected = (logits.double() / temperature).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    assert expected.isfinite().all()
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=0)


def test_a_gpu_too_small_for_one_response_is_refused_with_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that is large enough for some has as many slots."""
    decoder = Decoder(model_of_type("llama"))
    # Two layers, keys and values of two heads of 8 in fp32, and the logits of 100 tokens.
    place, logits = 2 * 2 * 2 * 8 * 4, 1600
    free = {"bytes": 0.0}
    monkeypatch.setattr(decoder, "_device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free["bytes"]), 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    rows = vars(Decoder)["_rows"]
    free["bytes"] = 3.5 * (place * 512 + logits) / decoding.SHARE
    assert rows(decoder, 100, 512) == 3
    assert rows(decoder, 2, 512) == 2
    free["bytes"] = (place * 400.5 + logits) / decoding.SHARE
    with pytest.raises(PreflightError, match="keys and values of 512 tokens") as error:
        rows(decoder, 100, 512)
    assert error.value.where == "sampling.max_new_tokens"
    assert "of 400 tokens together fit" in error.value.next_step
