"""Which models keep the texts of a packed row apart, which can compute a row's texts one by one, and which have fused
kernels; without torch.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

PACKABLE = frozenset(
    {
        "apertus",
        "arcee",
        "codegen",
        "cohere",
        "cohere2",
        "ernie4_5",
        "exaone4",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gptj",
        "granite",
        "granitemoe",
        "helium",
        "hunyuan_v1_dense",
        "llama",
        "ministral",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "persimmon",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)
"""The model types that keep texts of one row apart, each with a test: OPT or gpt-oss read on, without an error."""
FUSED = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
"""Model types that compute the same with Liger's kernels, each with a test on a GPU."""


def keeps_texts_apart(config: Any) -> bool:
    """Return whether a model with this configuration of transformers' computes the same for a packed text and alone."""
    # ALiBi adds the place in the row, in bf16: the later a text begins, the coarser its own places become.
    return config.model_type in PACKABLE and not getattr(config, "alibi", False)


def attends_to_whole_texts(config: Mapping[str, Any]) -> bool:
    """Return whether each token of a model attends to all of its text up to itself, and to nothing else.

    So a kernel that knows no more than where texts begin computes the same: no windows, caps or dropout. Flash
    attention also wants heads whose width is a multiple of 8, up to 256.

    config  as transformers writes it
    """
    width = config.get("head_dim") or config.get("hidden_size", 0) // max(1, config.get("num_attention_heads", 1))
    windows = config.get("sliding_window") and config.get("use_sliding_window", True)
    other_layers = set(config.get("layer_types") or ()) - {"full_attention"}
    more = any(config.get(name) for name in ("attn_logit_softcapping", "attention_dropout", "attn_pdrop", "alibi"))
    plain = not windows and not other_layers and not more and config.get("is_causal", True)
    # Falcon's layers know transformers' own attentions alone.
    return config.get("model_type") in PACKABLE - {"falcon"} and bool(plain) and width in range(8, 257, 8)


def has_fused_kernels(model_type: str) -> bool:
    """Return whether a GPU computes a model's norms and gates in one kernel each (:mod:`rlhf.models.kernels`)."""
    return model_type in FUSED and find_spec("liger_kernel") is not None
