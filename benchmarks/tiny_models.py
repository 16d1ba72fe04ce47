"""Models made from nothing, and tokenizers with a token for each letter or word."""

from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf.models.templates import Tokenizer

PAD, EOS = "<pad>", "<eos>"


def save_letter_tokenizer(letters: str, folder: Path) -> Tokenizer:
    """Write a tokenizer that knows the letters, padding (id 0) and EOS (id 1), and no chat template."""
    # Byte-pair encoding with no pair to merge is a token for each letter.
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *letters])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    wrapped: Tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)
    wrapped.save_pretrained(folder)
    return wrapped


def save_word_tokenizer(words: int, folder: Path, *, pad: int = 0, eos: int = 1) -> None:
    """Write a tokenizer with the words w0, w1, …; w2 is also any unknown word.

    pad, eos  the words that are padding and EOS
    """
    tokenizer = tokenizers.Tokenizer(models.WordLevel({f"w{row}": row for row in range(words)}, unk_token="w2"))  # noqa: S106 - no password
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": f"w{pad}", "eos_token": f"w{eos}", "unk_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)


def save_gpt2(
    letters: str, folder: Path, *, layers: int, width: int, heads: int, context: int, spread: float, seed: int = 0
) -> None:
    """Write a GPT-2 with random weights and its letter tokenizer, as a folder for ``model.base``.

    spread  standard deviation of the weights; GPT-2's is 0.02. A large spread makes a model with preferences
    """
    tokenizer = save_letter_tokenizer(letters, folder)
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=context,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            initializer_range=spread,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
