"""How long a text a model takes, by its ``config.json`` alone: needs no torch."""

from collections.abc import Mapping
from typing import Any

UNBOUNDED = 1 << 30
"""The context of models whose positions are relative or none, which any text fits."""

# These number positions from pad_token_id + 1 on, so that their table holds that many texts' tokens less.
NUMBERED_FROM_PADDING = frozenset(
    {
        "camembert",
        "data2vec-text",
        "longformer",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)


def context_length(config: Mapping[str, Any]) -> int:
    """The longest sequence in tokens, special tokens included."""
    # A model that reads more than text keeps what concerns text by itself.
    config = config.get("text_config", config)
    length = config.get("max_position_embeddings", config.get("n_positions"))
    if not isinstance(length, int) or length < 1:  # XLNet says -1
        return UNBOUNDED
    if config.get("model_type") in NUMBERED_FROM_PADDING:
        return length - int(config.get("pad_token_id", 1)) - 1
    return length
