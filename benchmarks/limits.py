"""What the hardware allows: operations and bytes that the work must cost, over a machine's two measured ceilings.

The ceilings are a large matrix product and a large copy, measured in the process that is judged: ratios of one process
can be compared between machines, and seconds cannot. A part's limit is the longer of its operations at the first and
its bytes at the second. Counted are

- matrix products: 2 operations a parameter and token; the language head only where logits are needed, at response
  tokens, and at a prompt's last token before the first; heads with one output are left out;
- attention: 4 operations for each query, key and channel, over the keys up to the query (the causal half);
- gradients of whole weights: twice the forward's; with adapters once, for the activations, and the adapters' own
  products are left out;
- bytes of weights once in a forward pass, and in each step of decoding; of keys and values, read and written, of the
  responses that are still running; of AdamW's states. Activations count as if they never left the chip.

Not counted, since good code needs none of it: padding, layers computed again, gathering of shards, copies of weights.
The policy's log-probabilities count as a forward pass of their own, though a sampler could give them.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig

from rlhf.config.stages import Precision
from rlhf.zero.engine import DTYPES

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

    def adapter(self, rank: int) -> int:
        """Return the parameters of LoRA on every matrix of the layers."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.matrices)

    def config(self, context: int) -> LlamaConfig:
        """Return transformers' configuration of it; EOS is the token 0, for :mod:`benchmarks.one_rank`."""
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
    "8b": Shape(4096, 32, 14336, 32, 8, 128256, head_dim=128, tied=False),
}
"""A small one for CPUs, then those of SmolLM2-135M, Llama 3.2 1B and Llama 3 8B."""


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best, measured."""

    device: str
    operations: float
    """A second, in a large matrix product of the precision."""
    bytes: float
    """A second, read and written in a large copy."""

    @property
    def nominal(self) -> float | None:
        """Return the operations a second that the vendor states, where they are known."""
        return next((peak for name, peak in NOMINAL.items() if name in self.device), None)


@dataclass(frozen=True)
class Work:
    """What a part must cost."""

    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.operations + other.operations, self.bytes + other.bytes)

    def times(self, factor: float) -> "Work":
        """Return the work of as many repetitions."""
        return Work(factor * self.operations, factor * self.bytes)

    def seconds(self, ceilings: Ceilings) -> float:
        """Return the least time that it takes."""
        return max(self.operations / ceilings.operations, self.bytes / ceilings.bytes)


@dataclass(frozen=True)
class Part:
    """A named part of the work; its steps follow each other, so that the sum of their limits is its own."""

    name: str
    steps: Sequence[Work]

    @property
    def work(self) -> Work:
        """Return the work of all steps."""
        return sum(self.steps, start=Work())

    def seconds(self, ceilings: Ceilings) -> float:
        """Return the least time that it takes."""
        return sum(step.seconds(ceilings) for step in self.steps)


def ceilings(precision: Precision, device: torch.device) -> Ceilings:
    """Measure a machine: medians of five, of a product of 8192 x 8192 (on a CPU 2048 x 2048) and a copy."""
    gpu, dtype = device.type == "cuda", DTYPES[precision]
    width, length, rounds = (8192, 2**30, 10) if gpu else (2048, 2**27, 2)
    left, right = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    product = _median_time(lambda: left @ right, rounds, device)
    source = torch.ones(length, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy = _median_time(lambda: target.copy_(source), rounds, device)
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    return Ceilings(name, 2 * width**3 / product, 2 * source.nbytes / copy)


def _median_time(call: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """Return the seconds of a call, the median of five times ``rounds`` calls."""
    times: list[float] = []
    for _ in range(6):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(rounds):
            call()
        synchronise(device)
        times.append((time.perf_counter() - start) / rounds)
    return statistics.median(times[1:])  # the first warms up


def synchronise(device: torch.device) -> None:
    """Wait for all work that a device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def causal(lengths: Sequence[int]) -> int:
    """Return the pairs of a query and a key up to it, in sequences of these lengths."""
    return sum(length * (length + 1) // 2 for length in lengths)


def forward(shape: Shape, tokens: int, logits: int, pairs: int, width: int = 2) -> Work:
    """Return the work of a forward pass.

    tokens  in all sequences
    logits  tokens whose logits are computed
    pairs   of a query and a key, see :func:`causal`
    width   bytes of a weight
    """
    operations = 2 * shape.body * tokens + 2 * shape.head * logits + 4 * shape.layers * shape.queries * pairs
    weights = shape.body + shape.norms + (shape.head if logits else 0)
    return Work(operations, width * weights)


def prefill(shape: Shape, prompt: int, rows: int, width: int = 2) -> Work:
    """Return the work of reading ``rows`` prompts of ``prompt`` tokens, up to the logits of their first tokens."""
    cache = 2 * shape.layers * shape.keys * width * rows * prompt
    return forward(shape, rows * prompt, rows, causal([prompt] * rows), width) + Work(bytes=cache)


def decode(shape: Shape, prompt: int, lengths: Sequence[int], width: int = 2) -> list[Work]:
    """Return the work of each step behind prefill: all responses at once, each until its own end.

    Step t reads token t of the responses that have more, and attends to ``prompt`` + t keys: all but its own are read,
    and its own is written.

    lengths  of the responses, EOS included
    """
    steps: list[Work] = []
    for place in range(1, max(lengths)):
        rows = sum(length > place for length in lengths)
        keys = rows * (prompt + place)
        cache = 2 * shape.layers * shape.keys * width * keys
        steps.append(forward(shape, rows, rows, keys, width) + Work(bytes=cache))
    return steps


def adamw(trained: int, precision: Precision) -> Work:
    """Return the work of one step of AdamW with fp32 states on ``trained`` parameters.

    Read are gradient, weight and two moments, written weight and moments; in bf16 also the weights of the model.
    """
    return Work(bytes=trained * (4 * 7 + (2 if precision == "bf16" else 0)))


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
    if measured.nominal:
        row[f"MFU of {measured.nominal / 1e12:.0f} TFLOP/s"] = f"{rate / measured.nominal:.1%}"
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
