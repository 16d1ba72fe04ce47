from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.config.stages import SftSettings
from rlhf.errors import PreflightError
from rlhf.models import heads, text
from rlhf.models.architectures import ANOTHER_WITH_CACHE, check_policy, check_scorer, check_virtual_tokens
from rlhf.models.heads import TokenLogprobs
from rlhf.models.packable import PACKABLE
from rlhf.rollout.drawing import Responses, uniforms
from rlhf.rollout.sampling import sample_responses
from rlhf.rollout.sequences import lay_out
from tests.models.tiny import tiny_config

HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1}
# Beside those that are packed: with a state beside or in place of a cache, with ALiBi, and with a window of their own.
TAKEN: dict[str, dict[str, Any]] = {name: {} for name in sorted(PACKABLE)} | {
    "biogpt": {},
    "bloom": {},
    "deepseek_v4": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "gpt_oss": {},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "lfm2": {},
    "llama4_text": {},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1, "state_size": 8},
    "mpt": {},
    "opt": {},
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xglm": {},
}
REFUSED = {
    "t5": "through an encoder",
    "bart": "through an encoder",
    "bert": "are encoders",
    "roberta": "are encoders",
    "siglip": "no causal language model",
    "openai-gpt": "no cache of transformers' kind",
    "rwkv": "no cache of transformers' kind",
    "xlnet": "no cache of transformers' kind",
    "mamba": "another distribution",
    "minimax": "another distribution",
}

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [8, 20], [9, 10, 40, 41, 42]]
TIME = 12


def config_of_type(model_type: str) -> Any:
    own = {"xlnet": {"d_model": 32, "n_head": 4, "d_head": 8}}
    return tiny_config(model_type, **TAKEN.get(model_type, own.get(model_type, {})))


def sampled(model_type: str) -> tuple[Any, Responses]:
    """A tiny model and its responses, beyond the tiny window, to prompts of which some are padded."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config_of_type(model_type)).eval()
    return model, sample_responses(model, PROMPTS, uniforms(0, range(3), TIME), 1.0, eos_token_id=-1, pad=0)


@torch.no_grad()
def alone(model: Any, responses: Responses) -> Tensor:
    """The responses' log-probabilities by one pass over each row without padding."""
    rows: list[Tensor] = []
    for prompt, response in zip(PROMPTS, responses.ids.tolist(), strict=True):
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.float().log_softmax(-1)[range(TIME), response])
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("model_type", TAKEN)
def test_what_is_sampled_is_what_is_trained(model_type: str, tmp_path: Path) -> None:
    """Token by token with a cache, in a padded batch, and alone, a response has the same log-probabilities."""
    model, responses = sampled(model_type)
    expected = alone(model, responses)
    torch.testing.assert_close(responses.logprobs, expected, atol=1e-4, rtol=1e-4)
    rows = lay_out(PROMPTS, responses.ids.tolist(), 0)
    logprobs, _ = TokenLogprobs(model)(rows.ids, rows.attention_mask, TIME, 1.0, False)
    torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=1e-4)
    model.config.save_pretrained(tmp_path)
    check_policy(tmp_path)


# With a tied head, with logits that are scaled or capped, with a head's bias, with experts, with another name.
@pytest.mark.parametrize(
    ("model_type", "method"),
    [(name, "full") for name in ("gemma2", "cohere", "granite", "phi", "mixtral", "opt")] + [("llama", "lora")],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's
def test_chunks_of_real_tokens_have_the_results_and_gradients_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, model_type: str, method: str
) -> None:
    """Whatever a model does to its logits, and where its head is tied; against plain autograd."""
    monkeypatch.setattr(heads, "CHUNK", 1)
    monkeypatch.setattr(heads, "FEWEST", 4)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config_of_type(model_type)).eval()
    if method == "lora":
        # On the head too.
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    rows = lay_out(PROMPTS, [[10, 11, 12, 13, 14], [9], [15, 16, 17]], 0)
    directions = torch.randn(2, *rows.mask.shape)

    def loss(logprobs: Tensor, entropies: Tensor) -> Tensor:
        return (directions * torch.stack([logprobs, entropies]))[:, rows.mask].sum()

    trained = [weight for weight in model.parameters() if weight.requires_grad]
    place = text.positions(rows.attention_mask)
    logits = model(input_ids=rows.ids, attention_mask=rows.attention_mask, position_ids=place, use_cache=False).logits
    whole = (logits[:, -rows.time - 1 : -1] / 0.7).log_softmax(-1)
    picked = whole.gather(-1, rows.ids[:, -rows.time :, None]).squeeze(-1)
    expected = loss(picked, -(whole.exp() * whole).sum(-1))
    found = loss(*TokenLogprobs(model)(rows.ids, rows.attention_mask, rows.time, 0.7, True, count=9))
    torch.testing.assert_close(found, expected)
    gradients = zip(*(torch.autograd.grad(one, trained, allow_unused=True) for one in (found, expected)), strict=True)
    for ours, theirs in gradients:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_padding_has_no_logits() -> None:
    """As many tokens go through the head as are asked for."""
    model, _ = sampled("llama")
    rows = lay_out(PROMPTS, [[10, 11, 12, 13, 14], [9], [15, 16, 17]], 0)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[:-1].numel()))
    logprobs, _ = TokenLogprobs(model)(rows.ids, rows.attention_mask, rows.time, 1.0, False, count=9)
    assert seen == [9]
    assert not logprobs[~rows.mask].any()
    assert logprobs[rows.mask].all()


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_no_causal_language_model_for_the_sampler_is_refused(model_type: str, tmp_path: Path) -> None:
    """By its configuration alone, and with the reason."""
    config_of_type(model_type).save_pretrained(tmp_path)
    with pytest.raises(PreflightError, match=f"{model_type} models cannot be .* {REFUSED[model_type]}") as error:
        check_policy(tmp_path)
    assert error.value.where == str(tmp_path / "config.json")


@pytest.mark.parametrize("model_type", sorted(ANOTHER_WITH_CACHE))
def test_no_type_is_refused_that_could_be_sampled(model_type: str) -> None:
    """Those named for it fail with a cache, or compute something else."""
    try:
        model, responses = sampled(model_type)
    except ValueError:
        return
    assert (responses.logprobs - alone(model, responses)).abs().max() > 0.01


def test_a_reward_model_that_no_program_could_read_is_refused(tmp_path: Path) -> None:
    """transformers has a sequence classifier for Llama, and none for OLMoE."""
    for name in ("llama", "olmoe"):
        tiny_config(name).save_pretrained(tmp_path / name)
    check_scorer(tmp_path / "llama")
    with pytest.raises(PreflightError, match="no sequence classifier for olmoe models"):
        check_scorer(tmp_path / "olmoe")


@pytest.mark.parametrize(
    ("model_type", "more", "method", "longest", "why"),
    [
        ("mistral", {}, "p-tuning-v2", 3, "leave the sliding window of 6"),
        ("mistral", {}, "prefix", 2, None),
        ("mistral", {}, "prompt", 60, None),
        ("mistral", {"sliding_window": None}, "prefix", 60, None),
        ("opt", {"word_embed_proj_dim": 16}, "prompt", 60, "narrower than the model's layers"),
        ("opt", {}, "prompt", 60, None),
        ("qwen3_next", HYBRID, "prefix", 60, "layers without keys and values"),
        ("qwen3_next", HYBRID, "lora", 60, None),
    ],
)
def test_virtual_tokens_that_a_model_cannot_have_are_refused(
    tmp_path: Path, model_type: str, more: dict[str, Any], method: str, longest: int, why: str | None
) -> None:
    """Four of them, before texts of some length."""
    tiny_config(model_type, **more).save_pretrained(tmp_path)
    own = {} if method == "lora" else {"tokens": 4}
    tuning = SftSettings.model_validate({"tuning": {"method": method} | own}).tuning
    if why is None:
        check_virtual_tokens(tmp_path, tuning, longest, "sft")
    else:
        with pytest.raises(PreflightError, match=why) as error:
            check_virtual_tokens(tmp_path, tuning, longest, "sft")
        assert error.value.where == "sft.tuning.method"
