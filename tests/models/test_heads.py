import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from rlhf.models import heads, text
from rlhf.models.heads import (
    SequenceScores,
    TokenLogprobs,
    TokenValues,
    compute_in_fp32,
    forbid_rows_without_token,
    initialise_head,
)

PROMPTS = [[5, 17, 40, 41, 99], [7], [12, 13, 200]]
RESPONSES = [[60, 61, 62, 4], [70, 4], [80, 81, 82, 83]]
TIME = 4


@pytest.fixture(scope="module")
def language_model(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny).eval()


@pytest.fixture(scope="module")
def classifier(tiny: Path) -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1).eval()


def batch(extra_padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask, and which response tokens are real."""
    prompts, prompt_mask = text.pad([[0] * (5 + extra_padding), *PROMPTS], 0, "left")
    responses, mask = text.pad(RESPONSES, 0, "right")
    ids = torch.cat([prompts[1:], responses], dim=1)
    return ids, torch.cat([prompt_mask[1:], mask], dim=1), mask.bool()


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probabilities_are_those_of_each_row_alone_in_float64(language_model: Any, temperature: float) -> None:
    """Plain log_softmax, row by row, without padding."""
    ids, attention_mask, mask = batch()
    logprobs, entropies = TokenLogprobs(language_model)(ids, attention_mask, TIME, temperature, True)
    exact = copy.deepcopy(language_model).double()
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        logits = exact(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / temperature, dim=-1)
        picked = expected.gather(-1, torch.tensor(response)[:, None]).squeeze(-1)
        torch.testing.assert_close(logprobs[row][mask[row]].double(), picked, atol=1e-4, rtol=0)
        entropy = -(expected.exp() * expected).sum(-1)
        torch.testing.assert_close(entropies[row][mask[row]].double(), entropy, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_left_padding_moves_no_log_probability_and_no_value(
    language_model: Any, classifier: Any, positions: str
) -> None:
    """Longer prompts elsewhere in a batch must not change what is said of this one, for GPT-2 as for Llama."""
    if positions == "absolute":
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2)
        config.num_labels, config.initializer_range = 1, 0.2
        language_model, classifier = GPT2LMHeadModel(config).eval(), GPT2ForSequenceClassification(config).eval()
    narrow, wide = batch(), batch(extra_padding=9)
    one, other = (TokenLogprobs(language_model)(ids, mask, TIME, 1.0, False)[0] for ids, mask, _ in (narrow, wide))
    torch.testing.assert_close(one[narrow[2]], other[narrow[2]], atol=1e-5, rtol=0)
    one, other = (TokenValues(classifier)(ids, mask, TIME) for ids, mask, _ in (narrow, wide))
    torch.testing.assert_close(one[narrow[2]], other[narrow[2]], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_value_is_read_one_position_before_its_token(classifier: Any) -> None:
    """It is the estimate before the token is emitted: of the first, after the prompt alone."""
    ids, attention_mask, _ = batch()
    values = TokenValues(classifier)(ids, attention_mask, TIME)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        for index in range(len(response)):
            before = torch.tensor([prompt + response[:index]])
            expected = classifier.score(classifier.model(before).last_hidden_state[0, -1])
            torch.testing.assert_close(values[row, index, None], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_scores_are_the_logits_of_the_plain_classifier(tiny: Path, classifier: Any) -> None:
    """On right-padded batches, where the text ends in EOS: what users of the exported folder will see."""
    tokenizer = text.load_tokenizer(tiny)
    texts = [text.scored_ids(tokenizer, "say so", words, 64) for words in ("a joy", "dull , dull , dull", "")]
    ids, mask = text.pad(texts, tokenizer.pad_token_id, "right")
    scores = SequenceScores(classifier)(ids, mask)
    torch.testing.assert_close(scores, classifier(input_ids=ids, attention_mask=mask).logits.squeeze(-1))
    assert scores.std() > 0.01


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_in_fp32_gives_fp32_s_products_and_gradients(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of input and weights in bf16, as if both had been cast; three digits are not enough for a logit.

    In blocks, of which the last is smaller.
    """
    monkeypatch.setattr(heads, "BLOCK", 64 * 70)
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 300, bias=bias, dtype=torch.bfloat16)
    hidden = (8 * torch.randn(2, 5, 64)).bfloat16().requires_grad_()
    direction = torch.randn(2, 5, 300)
    inputs = [hidden, *head.parameters()]
    rounded = head(hidden)
    product = torch.nn.functional.linear(hidden.float(), *(one.float() for one in head.parameters()))
    expected = torch.autograd.grad((product * direction).sum(), inputs)
    compute_in_fp32(head)
    found = head(hidden)
    torch.testing.assert_close(found, product)
    assert (rounded.float() - product).abs().max() > 0.01
    for ours, theirs in zip(torch.autograd.grad((found * direction).sum(), inputs), expected, strict=True):
        assert ours.dtype == torch.bfloat16
        # The terms of the gradients' sums are rounded to bf16 too.
        assert (ours - theirs).abs().max() < 2**-7 * theirs.abs().max()


def mm_by_float64(left: Tensor, right: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """What torch's product of bf16 matrices gives on a GPU, where it sums in fp32."""
    assert left.dtype == right.dtype == torch.bfloat16
    return (left.double() @ right.double()).to(out_dtype)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("outputs", [1, 304])
def test_tensor_cores_give_fp32_s_products_and_gradients_within_bf16_s_rounding(
    monkeypatch: pytest.MonkeyPatch, device: str, outputs: int
) -> None:
    """Against float64; on a CPU by a twin of the product that a GPU computes."""
    if device == "cpu":
        monkeypatch.setattr(heads, "_exact_in_bf16", lambda *both: all(one.dtype == torch.bfloat16 for one in both))
        monkeypatch.setattr(torch, "mm", mm_by_float64)
    torch.manual_seed(0)
    head = torch.nn.Linear(64, outputs, bias=False, dtype=torch.bfloat16, device=device)
    hidden = (8 * torch.randn(2, 40, 64, device=device)).bfloat16().requires_grad_()
    direction = torch.randn(2, 40, outputs, device=device)
    exact = [one.detach().double().requires_grad_() for one in (hidden, head.weight)]
    product = torch.nn.functional.linear(*exact)
    compute_in_fp32(head)
    found = head(hidden)
    assert found.dtype == torch.float32
    found.index_fill_(-1, torch.tensor([], dtype=torch.long, device=device), 0.0)  # as logits are changed
    torch.testing.assert_close(found.double(), product, atol=1e-4, rtol=1e-6)
    ours = torch.autograd.grad((found * direction).sum(), [hidden, head.weight])
    for gradient, expected in zip(ours, torch.autograd.grad((product * direction).sum(), exact), strict=True):
        assert gradient.dtype == torch.bfloat16
        # Rounding to bf16's 8 bits, twice, moves a number by at most 2⁻⁸ of it.
        assert (gradient - expected).abs().max() < 2**-7 * expected.abs().max()


# Padding at the end, and holes in the middle.
HOLES = sorted({*range(250, 300), 30, 31, 222})


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rows_that_no_token_has_are_no_part_of_any_distribution(tiny: Path, family: str) -> None:
    """Log-probabilities and entropies are over the tokens alone, and nothing is learned of the other rows' logits.

    Gemma 2 squashes its logits after the last layer: minus infinity would not outlive that.
    """
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    }
    config = Gemma2Config(vocab_size=300, hidden_size=32, head_dim=16, final_logit_softcapping=5.0, **small)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny) if family == "llama" else Gemma2ForCausalLM(config)
    plain = copy.deepcopy(model).double().eval()
    tokens = [row for row in range(300) if row not in HOLES]
    words = Tokenizer(models.WordLevel({f"w{row}": row for row in tokens}, unk_token="w0"))
    forbid_rows_without_token(model.eval(), PreTrainedTokenizerFast(tokenizer_object=words))
    ids, attention_mask, mask = batch()
    logprobs, entropies = TokenLogprobs(model)(ids, attention_mask, TIME, 0.7, True)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, tokens]
        expected = torch.log_softmax(logits / 0.7, dim=-1)
        places = torch.tensor([tokens.index(token) for token in response])
        picked = expected.gather(-1, places[:, None]).squeeze(-1)
        torch.testing.assert_close(logprobs[row][mask[row]].double(), picked, atol=1e-4, rtol=0)
        entropy = -(expected.exp() * expected).sum(-1)
        torch.testing.assert_close(entropies[row][mask[row]].double(), entropy, atol=1e-4, rtol=0)
    head = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.lm_head.weight = head  # apart from the embeddings, whose rows learn as inputs
    logprobs, entropies = TokenLogprobs(model)(ids, attention_mask, TIME, 0.7, True)
    (logprobs + entropies)[mask].sum().backward()
    assert head.grad is not None
    assert head.grad[HOLES].abs().max() == 0
    assert head.grad[tokens].abs().max() > 0


def test_a_head_is_drawn_with_the_deviation_asked_for_and_by_its_seed() -> None:
    """N(0, 1/√(d + 1)): small beside what the layers below give it."""
    width = 100_000
    first, again, other = (torch.empty(1, width) for _ in range(3))
    for head, seed in ((first, 0), (again, 0), (other, 1)):
        initialise_head(head, "value head", seed)
    assert first.std().item() == pytest.approx((width + 1) ** -0.5, rel=0.02)
    assert abs(first.mean().item()) < 5 / width
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    initialise_head(again, "reward head", 0)
    assert not torch.equal(first, again)
