"""Reward models unlike the tiny policy: encoders, and a decoder with a tokenizer and template of its own."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rlhf.config.stages import ScratchSettings
from rlhf.models.base_models import make_from_scratch

WORDS = ["a", "film", "of", "two", "halves", "the", "is", "joy", "dull", ",", "say", "so", "."]
CONTEXT = 24
MEAN, DEVIATION = 0.25, 2.0
NORMALISER = {"score_mean": MEAN, "score_std": DEVIATION}
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_labels": 1,
}


def _written(model: Any, folder: Path, view: dict[str, Any]) -> Path:
    """Write the model, with weights so large that it has opinions, and what PPO must know of its scores."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.5 if parameter.dim() > 1 else parameter + noise * 0.2)
    model.save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | NORMALISER | view))
    return folder


def make_bert(folder: Path, sees: str = "conversation") -> Path:
    """An encoder without EOS whose tokens have types: [CLS] prompt [SEP] response [SEP]."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=CONTEXT, **SHAPE)
    return _written(BertForSequenceClassification(config), folder, {"sees": sees, "score_max_length": CONTEXT})


def make_roberta(folder: Path) -> Path:
    """An encoder with EOS, without types, whose positions are numbered from its padding: <s> a </s></s> b </s>."""
    vocabulary = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue] - typed read-only
    words.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))  # pyright: ignore[reportAttributeAccessIssue] - typed read-only
    # As saved by people who had cut and padded: neither must reach what is scored.
    words.enable_truncation(4)
    words.enable_padding(length=9)
    wrapped: Any = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", cls_token="<s>"
    )
    wrapped.save_pretrained(folder)
    config = RobertaConfig(
        vocab_size=len(vocabulary),
        max_position_embeddings=CONTEXT + 2,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        **SHAPE,
    )
    view = {"sees": "conversation", "score_max_length": CONTEXT}
    return _written(RobertaForSequenceClassification(config), folder, view)


def make_other_llama(folder: Path) -> Path:
    """A decoder of another size than the tiny policy, with another vocabulary and another chat template."""
    shape = ScratchSettings(vocabulary=340, hidden_size=16, layers=1, heads=2, context=48)
    make_from_scratch(shape, ["say so , of two halves", " ".join(WORDS)], seed=3, target=folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] }}"
        "{% else %}Q {{ message['content'] }} A {% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    return _written(model, folder, {"sees": "conversation", "score_max_length": 48})
