"""How much is computed at a time: sizes that the models and :mod:`rlhf.rollout.decoding` work with, and that the
prediction of memory (:mod:`rlhf.pipeline.memory`) follows. Without torch, since that is made before anything runs.
"""

AT_ONCE = 4
"""Micro batches that are computed at a time without gradients: nothing is kept for a backward pass."""
CHUNK = 2**27
"""Logits that a model computes at a time: half a gigabyte in float32."""
FEWEST = 1024
"""Tokens of a chunk even where their logits are more: with fewer, a matrix product leaves a GPU waiting for memory."""
BLOCK = 2**19
"""Elements of a matrix that a CPU casts at a time: two megabytes in float32."""

ROWS_ON_CPU = 64
"""Slots on a CPU, where more rows hardly make a token cheaper."""
ROWS_ON_GPU = 512
"""Most slots on a GPU: beyond, a step takes longer as its rows grow."""
COLUMNS_ON_CPU = 1
"""Places that are read and masked change the rounding of bf16, so that a CPU reads none beyond the longest text."""
COLUMNS_ON_GPU = 128
"""The places of a slot, and those that a step reads, are a multiple of this."""
TOKENS_ON_CPU = 2048
TOKENS_ON_GPU = 8192
"""Most tokens of prompts that are read at a time, where one prompt has no more."""
LOGIT_BYTES = 16
"""Bytes of a step for each row and token of the vocabulary: logits, their fp32, probabilities, and a copy."""
KEPT = 2**32
"""Bytes: a GPU's cache that takes no more stays from one call to the next, with the graphs that write to it."""


def rounded(places: int, columns: int) -> int:
    """Return the smallest multiple of ``columns`` that is not below the number of places."""
    return -(-places // columns) * columns
