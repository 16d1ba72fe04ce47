"""On a GPU: cuDNN's attention of a step computes what a mask and repeated keys do, within the rounding of bf16."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlhf.models.packable import PACKABLE
from rlhf.rollout import grouped
from rlhf.rollout.decoding import UNPACKED, Decoder
from rlhf.rollout.slots import LayerShape
from tests.rollout.test_decoding import EXPERTS, LIKE_A_GPU, NUMBERS, PROMPTS, model_of_type
from tests.rollout.test_decoding_gpu import rescored, without_graphs
from tests.rollout.test_grouped import OWN_WAY

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
CUDA = torch.device("cuda")


def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    model = model_of_type("llama")
    with grouped.attending(model):
        return vars(grouped)["_attention"](model, query, key, value, mask, 0.2)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "shared", "size"), [(32, 8, 64), (4, 4, 8), (9, 3, 64), (32, 8, 128), (6, 1, 128)])
@pytest.mark.parametrize(("rows", "places"), [(1, 128), (3, 640), (128, 384), (64, 72)])
def test_the_kernel_sees_what_the_mask_says(
    rows: int, places: int, heads: int, shared: int, size: int, dtype: torch.dtype
) -> None:
    """Of a part of each slot; with rows that see one place, all places and any between."""
    assert grouped.computes(heads, [LayerShape((shared, size), (shared, size))], dtype, CUDA)
    generator = torch.Generator("cuda").manual_seed(0)
    position = torch.randint(places, (rows,), device="cuda", generator=generator)
    position[0], position[-1] = 0, places - 1
    seen = torch.arange(places, device="cuda") <= position[:, None]
    mask = torch.where(seen, 0.0, -torch.inf).to(dtype)[:, None, None]
    query = torch.randn(rows, 1, heads, size, device="cuda", dtype=dtype, generator=generator).transpose(1, 2)
    slots = [torch.randn(rows + 2, shared, places + 128, size, device="cuda", dtype=dtype) for _ in range(2)]
    key, value = (slot[:rows, :, :places] for slot in slots)
    found = attended(query, key, value, mask)
    repeated = [states.float().repeat_interleave(heads // shared, 1) for states in (key, value)]
    expected = scaled_dot_product_attention(query.float(), *repeated, attn_mask=mask.float(), scale=0.2)
    torch.testing.assert_close(found.float(), expected.transpose(1, 2), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("model_type", sorted((PACKABLE | UNPACKED) - EXPERTS - OWN_WAY))
def test_it_is_as_near_to_a_pass_over_each_row_as_transformers_attention(model_type: str) -> None:
    """In bf16; and graphs draw what the same steps draw without them."""
    model = model_of_type(model_type).to("cuda", torch.bfloat16)
    gaps: list[float] = []
    for use_grouped in (False, None):
        decoder = Decoder(model, LIKE_A_GPU, 4, use_grouped=use_grouped)
        assert vars(decoder)["_grouped"] == (use_grouped is None)
        found = decoder.sample(PROMPTS, NUMBERS, 1.0, eos_token_id=-1, pad=0)
        eager = without_graphs(model, pace=LIKE_A_GPU, most_rows=4, use_grouped=use_grouped)
        assert torch.equal(found.ids, eager.sample(PROMPTS, NUMBERS, 1.0, eos_token_id=-1, pad=0).ids)
        gaps.append(rescored(model, PROMPTS, found))
    print(f"\n{model_type}: transformers {gaps[0]:.2f}, cuDNN {gaps[1]:.2f} nats")
    assert gaps[1] < 2 * gaps[0] + 0.05


def test_what_cudnn_does_not_take_keeps_transformers_attention() -> None:
    """Float32, and heads of a width that is no multiple of 8."""
    assert not grouped.computes(4, [LayerShape((2, 64), (2, 64))], torch.float32, CUDA)
    assert not grouped.computes(4, [LayerShape((2, 12), (2, 12))], torch.bfloat16, CUDA)
