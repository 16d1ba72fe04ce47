from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.limits import SHAPES, Ceilings, Part, Shape, Work, causal, decode, forward, prefill
from benchmarks.one_rank import drawn_lengths, with_lengths
from rlhf.rl.masks import response_mask
from rlhf.rollout.sampling import sample_responses, uniforms

GROUPED = Shape(48, 3, 80, heads=4, kv_heads=2, vocabulary=64, head_dim=16, tied=False)
shapes = pytest.mark.parametrize("shape", [SHAPES["tiny"], GROUPED])
ROWS, PROMPT, LENGTH = 2, 5, 4


def llama(shape: Shape, dtype: torch.dtype = torch.float32) -> Any:
    config: Any = shape.config(64)
    torch.manual_seed(0)
    # Eager attention's products are the ones that torch counts.
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")


@shapes
def test_decoding_costs_the_operations_that_torch_counts(shape: Shape) -> None:
    """Token by token with a cache, so that nothing is computed for a key behind a query."""
    model, cache = llama(shape), DynamicCache()
    ids = torch.arange(2, 2 + PROMPT + LENGTH - 1).repeat(ROWS, 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for place in range(ids.shape[1]):
            keep = torch.arange(0 if place < PROMPT - 1 else 1)
            model(input_ids=ids[:, place : place + 1], cache=cache, logits_to_keep=keep)
    steps = decode(shape, PROMPT, [LENGTH] * ROWS)
    assert len(steps) == LENGTH - 1
    assert counter.get_total_flops() == (prefill(shape, PROMPT, ROWS) + sum(steps, start=Work())).operations


@shapes
def test_training_costs_the_operations_that_torch_counts(shape: Shape) -> None:
    """Three times a forward pass; eager attention computes all pairs, and with the causal ones nothing is left out."""
    model, tokens = llama(shape), PROMPT + LENGTH
    ids = torch.arange(2, 2 + tokens).repeat(ROWS, 1)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, logits_to_keep=torch.arange(LENGTH), use_cache=False).logits.sum().backward()
    assert counter.get_total_flops() == 3 * forward(shape, ROWS * tokens, ROWS * LENGTH, ROWS * tokens**2).operations
    assert causal([tokens]) == int(torch.ones(tokens, tokens).tril().sum())


@shapes
def test_a_step_of_decoding_costs_the_bytes_of_its_tensors(shape: Shape) -> None:
    """Of the weights that are read whole, and of all keys and values after the step; prefill writes those before it."""
    model, cache = llama(shape, torch.bfloat16), DynamicCache()
    layers: Any = cache.layers
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    looked_up = 0 if shape.tied else model.get_input_embeddings().weight.nbytes
    weights = sum(weight.nbytes for weight in model.parameters()) - looked_up

    def held() -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    with torch.no_grad():
        model(input_ids=torch.full((ROWS, PROMPT), 2), cache=cache)
        assert prefill(shape, PROMPT, ROWS).bytes == weights + held()
        for step in decode(shape, PROMPT, [LENGTH] * ROWS):
            model(input_ids=torch.full((ROWS, 1), 2), cache=cache)
            assert step.bytes == weights + held()


def test_responses_that_have_ended_cost_nothing() -> None:
    """Of responses of several lengths: the operations and cached bytes of each alone, and weights once a step."""
    lengths = [1, 3, 7]
    together, alone = decode(GROUPED, PROMPT, lengths), [decode(GROUPED, PROMPT, [length]) for length in lengths]
    weights = forward(GROUPED, 0, 1, 0).bytes
    assert len(together) == 6
    assert sum(step.operations for step in together) == sum(step.operations for one in alone for step in one)
    cached = sum(step.bytes - weights for one in alone for step in one)
    assert sum(step.bytes - weights for step in together) == cached


def test_a_limit_is_the_longer_of_both_in_each_step() -> None:
    """Steps follow each other: what one has to spare the next cannot use."""
    ceilings = Ceilings("", operations=10.0, bytes=5.0)
    assert Part("", [Work(20.0, 5.0), Work(10.0, 15.0)]).seconds(ceilings) == 2 + 3


@pytest.mark.parametrize("kind", ["uniform", "spread"])
def test_responses_have_the_lengths_that_were_drawn(kind: str) -> None:
    """With the product's own sampling, and weights with preferences."""
    lengths = drawn_lengths(kind, 24, 8)
    assert sorted(lengths) == ([24] * 8 if kind == "uniform" else [24, 27, 31, 34, 38, 41, 45, 48])
    model = llama(GROUPED).eval()
    noise = with_lengths(uniforms(0, range(8), max(lengths)), lengths)
    responses = sample_responses(model, [[5, 6]] * 8, noise, 1.0, eos_token_id=0, pad=1)
    assert response_mask(responses.ids, 0).sum(1).tolist() == lengths
