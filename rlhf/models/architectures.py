"""Which of transformers' architectures can be a policy, a reward model or a value model."""

import inspect
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
)
from transformers.modeling_layers import GenericForSequenceClassification

from rlhf.config.tuning import PrefixTuning, PromptTuning, PTuning, PTuningV2, Tuning
from rlhf.errors import PreflightError
from rlhf.models import safe_loading
from rlhf.models.layout import NUMBERED_FROM_PADDING, config_file
from rlhf.models.packable import keeps_texts_apart

ANOTHER_WITH_CACHE = frozenset({"falcon_mamba", "mamba", "minimax", "moshi", "nemotron_h"})
"""Model types that fail token by token, with a cache, or whose logits are then not those of the whole text."""


def check_policy(folder: Path) -> None:
    """Refuse a model that is no causal language model, or that cannot be sampled as it is trained.

    Raises:
        PreflightError: it is no such model, which says why; or its architecture needs code of its own.
    """
    safe_loading.refuse_code(folder)
    config = _config(folder)
    if why := _why_no_policy(config):
        raise PreflightError(
            f"{config.model_type} models cannot be trained or sampled here: {why}",
            str(config_file(folder)),
            "use a decoder, such as a Llama, Qwen or Gemma",
        )


def check_scorer(folder: Path) -> None:
    """Refuse, by a PreflightError, to train a reward model that transformers could not read: it has no such class."""
    config = _config(folder)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise PreflightError(
            f"transformers has no sequence classifier for {config.model_type} models, so that no program could read a "
            "reward model of this type",
            str(config_file(folder)),
            "train the reward model from a base of another type: ppo takes a reward model of any",
        )


def check_virtual_tokens(folder: Path, tuning: Tuning, longest: int, stage: str) -> None:
    """Refuse, by a PreflightError, virtual tokens of a kind that a model cannot have.

    longest  tokens of the longest text
    """
    if not isinstance(tuning, PromptTuning | PTuning | PrefixTuning | PTuningV2):
        return
    config = _config(folder)
    sizes = config.get_text_config()
    window = getattr(sizes, "sliding_window", None)
    if isinstance(tuning, PromptTuning | PTuning):
        if getattr(sizes, "word_embed_proj_dim", sizes.hidden_size) == sizes.hidden_size:
            return
        why = "PEFT knows no embeddings that are narrower than the model's layers"
    elif _causal_class(config)._is_stateful:
        why = f"{config.model_type} models have layers without keys and values"
    elif window and tuning.tokens + longest > window:
        why = f"with texts of {longest} tokens, the {tuning.tokens} before them leave the sliding window of {window}"
    else:
        return
    raise PreflightError(
        f"method {tuning.method} does not fit the model: {why}", f"{stage}.tuning.method", "choose lora, for instance"
    )


def check_packing(folder: Path, stage: str) -> None:
    """Refuse, by a PreflightError, to lay texts end to end for a model that would read on from one into the next."""
    config = _config(folder)
    if not keeps_texts_apart(config.get_text_config()):
        raise PreflightError(
            f"packing is true, and {config.model_type} models do not keep the samples of a row apart",
            f"{stage}.packing",
            f"leave {stage}.packing out: samples are padded then",
        )


def classifier_of(folder: Path) -> Any:
    """Return the class that loads a folder's body with a head ``score``: transformers' own, or one of its parts."""
    config = _config(folder)
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return AutoModelForSequenceClassification
    above: Any = _causal_class(config).__bases__[0]
    # A body has the name in its files that it has in the language model.
    named = {"base_model_prefix": above.base_model_prefix, "__module__": __name__}
    return type(f"{above.__name__}WithScore", (GenericForSequenceClassification, above), named)


def _config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(config_file(folder).parent, **safe_loading.TOKENIZER)


def _causal_class(config: Any) -> Any:
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _why_no_policy(config: Any) -> str | None:
    if config.is_encoder_decoder:
        return "their prompts go through an encoder, and stages read prompt and response as one text"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "transformers has no causal language model of this type"
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        return "they are encoders, whose attention sees the tokens that are to be predicted"
    if config.model_type in NUMBERED_FROM_PADDING:
        return "they number positions in a way of their own, from their padding token on"
    named = inspect.signature(_causal_class(config).forward).parameters
    if not {"cache", "logits_to_keep"} <= named.keys():
        return "they have no cache of transformers' kind, with which responses are sampled"
    if config.model_type in ANOTHER_WITH_CACHE:
        return "token by token, with a cache, they fail or compute another distribution than of the whole text"
    return None
