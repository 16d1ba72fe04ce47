import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.rl.masks import ended, last_token_mask, masked, masked_mean, masked_sum, response_mask
from tests.rl.batches import JUNK, Batch, batches

EOS = 2
responses = st.integers(1, 8).flatmap(
    lambda time: st.lists(st.lists(st.integers(0, 4), min_size=time, max_size=time), min_size=1, max_size=4)
)


@given(rows=responses)
def test_a_response_is_real_up_to_and_including_its_first_eos(rows: list[list[int]]) -> None:
    """Against looking for the EOS row by row; a response without one is real to its end."""
    expected = [[EOS not in row[:t] for t in range(len(row))] for row in rows]
    assert response_mask(torch.tensor(rows), EOS).tolist() == expected
    assert ended(torch.tensor(rows), EOS).tolist() == [EOS in row for row in rows]


@given(batch=batches())
def test_the_last_token_is_where_the_length_says(batch: Batch) -> None:
    """Exactly one token of each row that has any, and none of an empty row."""
    expected = [[t == length - 1 for t in range(batch.mask.shape[1])] for length in batch.lengths]
    assert last_token_mask(batch.mask).tolist() == expected


@given(batch=batches(min_length=1), junk=st.sampled_from(JUNK))
def test_sums_and_means_count_real_tokens_only(batch: Batch, junk: float) -> None:
    """Whatever the padding holds, sums and means are those of the list of real values."""
    values = batch.tensor(junk=junk)
    real = [values[i, t].item() for i, length in enumerate(batch.lengths) for t in range(length)]
    torch.testing.assert_close(masked_sum(values, batch.mask).item(), sum(real))
    torch.testing.assert_close(masked_mean(values, batch.mask).item(), sum(real) / len(real))
    rows = torch.tensor([values[i, :length].mean().item() for i, length in enumerate(batch.lengths)])
    torch.testing.assert_close(masked_mean(values, batch.mask, dim=1), rows.double())


@given(batch=batches(), junk=st.sampled_from(JUNK))
def test_masking_stops_the_gradient_of_what_is_not_finite(batch: Batch, junk: float) -> None:
    """The gradient is 1 on real tokens and 0 on padding, with no NaN from 0 times infinity."""
    values = batch.tensor(junk=junk).requires_grad_()
    masked(values, batch.mask).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, batch.mask.double())
