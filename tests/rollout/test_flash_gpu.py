"""On a GPU: attention by lengths computes what a mask does, within the rounding of bf16."""

import pytest
import torch

from rlhf.models.packable import PACKABLE
from rlhf.rollout import flash
from rlhf.rollout.decoding import UNPACKED, Decoder
from rlhf.rollout.slots import Lengths
from tests.rollout.test_decoding import EXPERTS, LIKE_A_GPU, NUMBERS, PROMPTS, model_of_type
from tests.rollout.test_decoding_gpu import rescored, without_graphs
from tests.rollout.test_flash import MASKED, looped

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
PLACES = 640


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 7, 300])
@pytest.mark.parametrize(("heads", "shared", "size"), [(32, 8, 64), (4, 4, 8), (9, 3, 64), (8, 4, 256), (6, 1, 128)])
@pytest.mark.parametrize("rows", [1, 3, 128])
def test_the_kernel_sees_what_lengths_and_window_say(
    rows: int, heads: int, shared: int, size: int, window: int | None, dtype: torch.dtype
) -> None:
    """Of rows with one place, all places and any between; what lies behind a length may be any number."""
    generator = torch.Generator("cuda").manual_seed(0)
    position = torch.randint(PLACES, (rows,), device="cuda", generator=generator)
    position[0], position[-1] = 0, PLACES - 1
    lengths = Lengths(rows + 2, shared, PLACES, position.device)
    lengths.up_to(position)
    table = lengths.in_place_of_mask(rows, window)[0, :, :, 0]
    drawn = [
        torch.randn(shape, device="cuda", dtype=dtype, generator=generator)
        for shape in ((rows * shared, heads // shared, size), *[(rows, shared, PLACES, size)] * 2)
    ]
    unseen = torch.arange(PLACES, device="cuda") > position[:, None, None]
    query = drawn[0]
    key, value = (states.masked_fill_(unseen[..., None], 1e4).view(-1, 1, size) for states in drawn[1:])
    by_length = vars(flash)["_by_length"]
    found = by_length(query, key, value, table, PLACES, window or PLACES, 0.2)
    expected = looped(query.float(), key.float(), value.float(), table, PLACES, window or PLACES, 0.2)
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("model_type", sorted((PACKABLE | UNPACKED) - EXPERTS - MASKED))
def test_lengths_are_as_near_to_a_pass_over_each_row_as_masks(model_type: str) -> None:
    """In bf16; and graphs draw what the same steps draw without them."""
    model = model_of_type(model_type).to("cuda", torch.bfloat16)
    gaps: list[float] = []
    for masked in (True, False):
        decoder = Decoder(model, LIKE_A_GPU, 4, masked=masked)
        assert vars(decoder)["_flash"] != masked
        found = decoder.sample(PROMPTS, NUMBERS, 1.0, eos_token_id=-1, pad=0)
        eager = without_graphs(model, pace=LIKE_A_GPU, most_rows=4, masked=masked)
        assert torch.equal(found.ids, eager.sample(PROMPTS, NUMBERS, 1.0, eos_token_id=-1, pad=0).ids)
        gaps.append(rescored(model, PROMPTS, found))
    print(f"\n{model_type}: masked {gaps[0]:.2f}, by lengths {gaps[1]:.2f} nats")
    assert gaps[1] < 2 * gaps[0] + 0.05


def test_one_graph_serves_all_lengths() -> None:
    """As many graphs as numbers of rows."""
    decoder = Decoder(model_of_type("llama").to("cuda", torch.bfloat16), LIKE_A_GPU, 4)
    decoder.sample(PROMPTS, NUMBERS, 1.0, eos_token_id=-1, pad=0)
    graphs = vars(decoder)["_space"].graphs
    assert len({length for _, length in graphs}) == 1
    assert {rows for rows, _ in graphs} <= {1, 2, 3, 4}
