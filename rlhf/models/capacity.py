"""What decoding in slots takes of memory: the sizes that :mod:`rlhf.rollout.decoding` works with. Without torch, since
memory is also predicted before anything runs.
"""

ROWS_ON_CPU = 64
"""Slots on a CPU, where more rows hardly make a token cheaper."""
ROWS_ON_GPU = 512
"""Most slots on a GPU: beyond, a step takes longer as its rows grow."""
COLUMNS_ON_CPU = 1
"""Places that are read and masked change the rounding of bf16, so that a CPU reads none beyond the longest text."""
COLUMNS_ON_GPU = 128
"""A cache has, and a step reads, a multiple of so many places of a slot."""
TOKENS_ON_CPU = 2048
TOKENS_ON_GPU = 8192
"""Most tokens of prompts that are read at a time, where one prompt has no more."""
LOGIT_BYTES = 16
"""Bytes of a step for each row and token of the vocabulary: logits, their fp32, probabilities, and a copy."""
KEPT = 2**32
"""Bytes: a GPU's cache that takes no more stays from one call to the next, with the graphs that write to it."""


def rounded(places: int, columns: int) -> int:
    """Return the multiple of ``columns`` that has room for so many places."""
    return -(-places // columns) * columns
