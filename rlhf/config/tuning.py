"""Which weights of a model train, and how: one settings block ``tuning``, chosen by its ``method``.

docs/tuning.md compares the methods; :mod:`rlhf.models.tuning` carries them out.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.base import Settings, semantic


class FullTuning(Settings):
    """Every weight trains."""

    method: Literal["full"] = semantic("full")
    """The method."""


class TopTuning(Settings):
    """The top blocks, the norm above them and the head train; everything below is frozen. A head that is tied to the
    embeddings stays frozen with them.
    """

    method: Literal["top"] = semantic("top")
    """The method."""
    blocks: int = semantic(2, ge=1)
    """Number of blocks, counted from the top, that train."""


class BottomFrozenTuning(Settings):
    """Everything trains but the embeddings, a head that is tied to them, and the lowest blocks."""

    method: Literal["bottom-frozen"] = semantic("bottom-frozen")
    """The method."""
    blocks: int = semantic(2, ge=1)
    """Number of blocks, counted from the bottom, that are frozen."""


class GradualTuning(Settings):
    """Gradual unfreezing with discriminative learning rates (Howard and Ruder 2018, arXiv:1801.06146, §3.2 and §3.3).

    The head and the norm below it train from the first step. The embeddings are unfrozen with the lowest block.
    """

    method: Literal["gradual"] = semantic("gradual")
    """The method."""
    start: Literal["top", "bottom"] = semantic("top")
    """Where unfreezing begins: at the top block, as in the paper, or at the bottom one."""
    every: int = semantic(50, ge=1)
    """Optimiser steps from one unfreezing to the next; the first block is unfrozen from the first step."""
    decay: float = semantic(1.0, ge=1)
    """The learning rate of each block is that of the block above divided by this: 1 for one rate, 2.6 in the paper."""


class TransferTuning(Settings):
    """A fresh head on a model's body. In rm, and for PPO's value model, it is the score's head, which is fresh in every
    method; in sft it is a language head, no longer tied to the embeddings; PPO's policy keeps its head.
    """

    method: Literal["transfer"] = semantic("transfer")
    """The method."""
    body: Literal["frozen", "trained"] = semantic("frozen")
    """Whether the body below the head trains too."""


class LowRankTuning(Settings):
    """What low-rank adapters have in common, whatever the precision of their base."""

    method: Literal["lora", "qlora"] = semantic()
    """The method."""
    rank: int = semantic(16, ge=1)
    """Rank r of the update; 8 to 64 are usual."""
    alpha: float = semantic(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = semantic(0.0, ge=0, lt=1)
    """Dropout on the adapter's input while the SFT and reward models train. PPO switches all dropout off."""
    targets: list[str] | None = semantic(None, min_length=1)
    """Names, or ends of names, of the modules that get an adapter, such as ``q_proj``; null takes every linear layer of
    the body."""


class LoraTuning(LowRankTuning):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) and a whole score head."""

    method: Literal["lora"] = semantic("lora")  # pyright: ignore[reportIncompatibleVariableOverride] - frozen
    """The method."""
    rslora: bool = semantic(False)
    """Scale by alpha / √rank, which keeps updates of one size at every rank (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = semantic(False)
    """Learn each weight's magnitude apart from its direction (Liu et al. 2024, arXiv:2402.09353)."""
    init: Literal["zero", "pissa"] = semantic("zero")
    """Where the update starts: at zero, or at the base's largest singular values, which are taken out of the base
    (PiSSA, Meng et al. 2024, arXiv:2404.02948). The result is plain LoRA of twice the rank, on the unchanged base."""
    merge: bool = semantic(False)
    """Fold the adapter into the weights of the result, which are then fp32. Otherwise the result is a PEFT adapter
    beside its base; a later stage in bf16 reads that exactly, and rounds folded weights."""

    @model_validator(mode="after")
    def _variants_fit(self) -> "LoraTuning":
        if self.dora and self.init == "pissa":
            raise ValueError("dora scales the whole weight, of which pissa takes a part away; choose one of them")
        return self


class QLoraTuning(LowRankTuning):
    """LoRA on a base of 4-bit weights (Dettmers et al. 2023, arXiv:2305.14314), on GPUs; needs the extra ``qlora``."""

    method: Literal["qlora"] = semantic("qlora")  # pyright: ignore[reportIncompatibleVariableOverride] - frozen
    """The method."""
    double_quantisation: bool = semantic(True)
    """Quantise the constants of the 4-bit blocks too: 0.37 bits a parameter less (§3 there)."""


class PromptTuning(Settings):
    """A soft prompt before every text (Lester et al. 2021, arXiv:2104.08691); the model is frozen."""

    method: Literal["prompt"] = semantic("prompt")
    """The method."""
    tokens: int = semantic(20, ge=1)
    """Virtual tokens."""
    text: str | None = semantic(None, min_length=1)
    """Text whose embeddings the prompt starts from, repeated or cut to its length; null draws tokens at random."""


class PTuning(Settings):
    """P-tuning (Liu et al. 2021, arXiv:2103.10385): a BiLSTM and an MLP make the embeddings of pseudo-tokens, between
    which words of the language, the anchors, may stay. The result is a soft prompt without the encoder.
    """

    method: Literal["p-tuning"] = semantic("p-tuning")
    """The method."""
    template: list[int | str] = semantic([20], min_length=1)
    """The prompt in order: a number stands for that many pseudo-tokens, text for an anchor of one token, as in
    ``[3, " capital", 3, " Britain", 3]``."""
    hidden_size: int | None = semantic(None, ge=1)
    """Width of the encoder; null takes the model's."""

    @property
    def tokens(self) -> int:
        """Return the number of virtual tokens, anchors included."""
        return sum(part if isinstance(part, int) else 1 for part in self.template)

    @model_validator(mode="after")
    def _template_has_pseudo_tokens(self) -> "PTuning":
        if any(isinstance(part, int) and part < 1 for part in self.template):
            raise ValueError("template has a number below 1; a number is how many pseudo-tokens stand there")
        if "" in self.template:
            raise ValueError("template has an empty anchor")
        if not any(isinstance(part, int) for part in self.template):
            raise ValueError("template has no pseudo-tokens, so nothing would train; add a number, such as 3")
        return self


class PrefixTuning(Settings):
    """Keys and values before every text in every layer, made by an MLP while they train (Li and Liang 2021,
    arXiv:2101.00190); the MLP is not part of the result.
    """

    method: Literal["prefix"] = semantic("prefix")
    """The method."""
    tokens: int = semantic(20, ge=1)
    """Virtual tokens."""
    text: str | None = semantic(None, min_length=1)
    """Text whose keys and values the prefix starts from, repeated or cut to its length; null draws tokens at random."""
    hidden_size: int | None = semantic(None, ge=1)
    """Width of the MLP; null takes the model's."""


class PTuningV2(Settings):
    """Keys and values before every text in every layer, learned as they are (Liu et al. 2022, arXiv:2110.07602)."""

    method: Literal["p-tuning-v2"] = semantic("p-tuning-v2")
    """The method."""
    tokens: int = semantic(20, ge=1)
    """Virtual tokens."""
    text: str | None = semantic(None, min_length=1)
    """Text whose keys and values the prefix starts from, repeated or cut to its length; null draws tokens at random."""


class Ia3Tuning(Settings):
    """(IA)³ (Liu et al. 2022, arXiv:2205.05638): a learned scale for each output of keys and values and for each input
    of the last feed-forward layer.
    """

    method: Literal["ia3"] = semantic("ia3")
    """The method."""
    merge: bool = semantic(False)
    """Fold the scales into the weights of the result, which are then fp32."""


Tuning = Annotated[
    FullTuning
    | TopTuning
    | BottomFrozenTuning
    | GradualTuning
    | TransferTuning
    | LoraTuning
    | QLoraTuning
    | PromptTuning
    | PTuning
    | PrefixTuning
    | PTuningV2
    | Ia3Tuning,
    Field(discriminator="method"),
]
FULL = FullTuning()


def trains_own_weights(tuning: Tuning) -> bool:
    """Return whether a method trains some or all of the model's own weights, and adds none."""
    return isinstance(tuning, FullTuning | TopTuning | BottomFrozenTuning | GradualTuning | TransferTuning)


def results_in_adapter(tuning: Tuning) -> bool:
    """Return whether a stage's result is an adapter beside its base rather than whole weights."""
    folded = isinstance(tuning, LoraTuning | Ia3Tuning) and tuning.merge
    return not trains_own_weights(tuning) and not folded


def virtual_tokens(tuning: Tuning) -> tuple[tuple[str, str], int] | None:
    """Return the methods that can train a method's virtual tokens further, and their number; None without any."""
    match tuning:
        case PromptTuning() | PTuning():
            return ("prompt", "p-tuning"), tuning.tokens
        case PrefixTuning() | PTuningV2():
            return ("p-tuning-v2", "prefix"), tuning.tokens
        case _:
            return None
