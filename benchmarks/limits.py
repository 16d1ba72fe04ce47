"""Shapes whose work is counted, and tables of measured times beside the hardware's limit.

What the limit counts is in :mod:`rlhf.training.limits`.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig

from rlhf.training.limits import Ceilings, Part, Sizes

NOMINAL = {"H100": 989e12, "H200": 989e12}
"""Operations a second in bf16, dense, that the vendor's data sheet states for the SXM cards."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int = 64
    tied: bool = True
    """Whether the language head is the embedding matrix."""

    @property
    def queries(self) -> int:
        """Return the width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Return the width of all key heads together, which is that of the values."""
        return self.kv_heads * self.head_dim

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Return inputs and outputs of a layer's seven matrices."""
        hidden, inner = self.hidden, self.intermediate
        attention = [(hidden, self.queries), (hidden, self.keys), (hidden, self.keys), (self.queries, hidden)]
        return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]

    @property
    def body(self) -> int:
        """Return the parameters of the layers' matrices."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.matrices)

    @property
    def head(self) -> int:
        """Return the parameters of the language head, which are also those of the embeddings."""
        return self.vocabulary * self.hidden

    @property
    def norms(self) -> int:
        """Return the parameters of the norms."""
        return (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        """Return the parameters of the whole model."""
        return self.body + self.norms + self.head * (1 if self.tied else 2)

    @property
    def sizes(self) -> Sizes:
        """Return what its work follows from."""
        return Sizes(self.body, self.head, self.norms, self.layers, self.queries, self.keys)

    def adapter(self, rank: int) -> int:
        """Return the parameters of LoRA on every matrix of the layers."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.matrices)

    def config(self, context: int) -> LlamaConfig:
        """Return transformers' configuration of it; EOS is the token 0, for :mod:`benchmarks.ranks`."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=self.tied,
            max_position_embeddings=context,
            eos_token_id=0,
            pad_token_id=1,
            bos_token_id=None,
        )


SHAPES = {
    "tiny": Shape(256, 4, 1024, 4, 4, 4096),
    "135m": Shape(576, 30, 1536, 9, 3, 49152),
    "1b": Shape(2048, 16, 8192, 32, 8, 128256),
    "3b": Shape(3072, 28, 8192, 24, 8, 128256, head_dim=128),
    "8b": Shape(4096, 32, 14336, 32, 8, 128256, head_dim=128, tied=False),
}
"""A small one for CPUs, then those of SmolLM2-135M, Llama 3.2 1B and 3B, and Llama 3 8B."""


def nominal(measured: Ceilings) -> float | None:
    """Return the operations a second that the vendor states, where they are known."""
    return next((peak for name, peak in NOMINAL.items() if name in measured.device), None)


def rows_of(parts: Sequence[Part], measured: Ceilings) -> list[dict[str, Any]]:
    """Return what the limit counts, part by part."""
    return [
        {"part": part.name, "TFLOP": part.work.operations / 1e12, "GB": part.work.bytes / 1e9}
        | {"limit, s": part.seconds(measured)}
        for part in parts
    ]


def row_of(name: str, seconds: Sequence[float], parts: Sequence[Part], measured: Ceilings) -> dict[str, Any]:
    """Return a measured part beside its limit: medians over the repetitions, and their range."""
    median, limit = statistics.median(seconds), sum(part.seconds(measured) for part in parts)
    row: dict[str, Any] = {"part": name, "s": median, "from": min(seconds), "to": max(seconds)}
    if not parts:
        return row
    rate = sum(part.work.operations for part in parts) / median
    row |= {"limit, s": limit, "measured / limit": median / limit, "share of limit": f"{limit / median:.1%}"}
    row["MFU of measured"] = f"{rate / measured.operations:.1%}"
    if peak := nominal(measured):
        row[f"MFU of {peak / 1e12:.0f} TFLOP/s"] = f"{rate / peak:.1%}"
    return row


def described(measured: Ceilings) -> str:
    """Return the ceilings in words."""
    rate, speed = measured.operations / 1e12, measured.bytes / 1e9
    return f"{measured.device}: measured ceilings {rate:.3g} TFLOP/s and {speed:.4g} GB/s"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table; columns are those of the longest row, numbers have three digits."""
    columns = list(max(rows, key=len))
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for row in rows:
        cells = [row.get(name, "") for name in columns]
        shown = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)
