from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.limits import SHAPES, Shape
from benchmarks.ranks import drawn_lengths, with_lengths
from rlhf.config.ppo import PpoSettings
from rlhf.models.footprint import Architecture, learned
from rlhf.rl.masks import response_mask
from rlhf.rollout.drawing import uniforms
from rlhf.rollout.sampling import sample_responses
from rlhf.rollout.sequences import Sequences
from rlhf.training.limits import (
    Ceilings,
    IterationLimit,
    IterationModels,
    Part,
    Sizes,
    Work,
    causal,
    decode,
    forward,
    passes,
    prefill,
)

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
    steps = decode(shape.sizes, [PROMPT] * ROWS, [LENGTH] * ROWS)
    assert len(steps) == LENGTH - 1
    assert counter.get_total_flops() == (prefill(shape.sizes, [PROMPT] * ROWS) + sum(steps, start=Work())).operations


@shapes
def test_training_costs_the_operations_that_torch_counts(shape: Shape) -> None:
    """Three times a forward pass; eager attention computes all pairs, and with the causal ones nothing is left out."""
    model, tokens = llama(shape), PROMPT + LENGTH
    ids = torch.arange(2, 2 + tokens).repeat(ROWS, 1)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, logits_to_keep=torch.arange(LENGTH), use_cache=False).logits.sum().backward()
    assert (
        counter.get_total_flops() == 3 * forward(shape.sizes, ROWS * tokens, ROWS * LENGTH, ROWS * tokens**2).operations
    )
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
        assert prefill(shape.sizes, [PROMPT] * ROWS).bytes == weights + held()
        for step in decode(shape.sizes, [PROMPT] * ROWS, [LENGTH] * ROWS):
            model(input_ids=torch.full((ROWS, 1), 2), cache=cache)
            assert step.bytes == weights + held()


def test_responses_that_have_ended_cost_nothing() -> None:
    """Of responses of several lengths: the operations and cached bytes of each alone, and weights once a step."""
    lengths = [1, 3, 7]
    prompts = [PROMPT, PROMPT + 4, 2]
    together = decode(GROUPED.sizes, prompts, lengths)
    alone = [decode(GROUPED.sizes, [prompt], [length]) for prompt, length in zip(prompts, lengths, strict=True)]
    weights = forward(GROUPED.sizes, 0, 1, 0).bytes
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


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    folder = tmp_path_factory.mktemp("model")
    llama(GROUPED).save_pretrained(folder)
    return Architecture.of(folder)


def test_sizes_are_read_off_a_model(architecture: Architecture) -> None:
    assert Sizes.of(architecture) == GROUPED.sizes


@pytest.mark.parametrize(
    ("method", "forwards"),
    [({"method": "full"}, 3), ({"method": "lora"}, 2), ({"method": "top", "blocks": 1}, 1 + 2 / 3)],
)
def test_what_trains_decides_what_training_costs(
    architecture: Architecture, method: dict[str, Any], forwards: float
) -> None:
    settings = ppo(tuning=method)
    assert passes(architecture, learned(architecture, settings.tuning, scores=False)) == pytest.approx(forwards)


def ppo(**values: Any) -> PpoSettings:
    return PpoSettings.model_validate({"value_init": "policy", "precision": "bf16"} | values)


def test_an_iteration_costs_its_samples(group: None, architecture: Architecture) -> None:
    """A real batch through three language models' and a value's passes; padding costs nothing, two ranks have half."""
    models = IterationModels.of(ppo(), {"policy": architecture})
    machine = Ceilings("", operations=1e9, bytes=1e9)
    prompts, lengths = [3, 5], [4, 2]
    mask = torch.tensor([[True] * 4 + [False], [True] * 2 + [False] * 3])
    attention = torch.cat([torch.tensor([[0, 0, 1, 1, 1], [1] * 5]), mask.long()], dim=1)
    sequences = Sequences(ids=torch.ones_like(attention), attention_mask=attention, mask=mask)
    counted = IterationLimit(models, ppo(epochs=2), machine).seconds(sequences)
    parts = models.parts(ppo(epochs=2), prompts, lengths)
    assert counted == sum(part.seconds(machine) for of_part in parts.values() for part in of_part)
    language = forward(GROUPED.sizes, 14, 6, causal([7, 7])).operations
    assert sum(part.work.operations for part in parts["score"]) == pytest.approx(
        2 * language + forward(GROUPED.sizes, 14, 0, causal([7, 7])).operations
    )
    assert parts["train"][0].work.operations == 2 * 3 * language
    both = models.parts(ppo(epochs=2), prompts, lengths, 2)
    assert both["train"][2].work.bytes * 2 == parts["train"][2].work.bytes
