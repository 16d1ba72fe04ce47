"""Tokenizers with the chat templates and the habits of families of models that people have.

Templates are the families' own, as TRL brings them; the vocabularies are small, and their added tokens have the names
and the kinds (special or not) that the families give them.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ["what is the capital of france ? the capital of france is paris .", "use the tag </s> in html , not <s> ."] * 9

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
PLAIN = ("<unk>", "<s>", "</s>", "<pad>")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PHI3_LEGACY = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN15 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nHi.<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% if add_generation_prompt or not loop.last %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL3 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user, system and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SMOLLM3 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nToday Date: {{ strftime_now('%d %B %Y') }}<|im_end|>\n"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n' }}{% endif %}"
)
ENDS_ANSWERS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + '<|end|>' }}"
    "{% else %}{{ '\nQ: ' + m['content'] + '\nA: ' }}{% endif %}{% endfor %}"
)


class Family(NamedTuple):
    """How a family's tokenizer is made."""

    special: Sequence[str]
    eos: str
    ends: str
    """The token that closes a turn."""
    bos: str | None = None
    pad: str | None = None
    template: str | None = None
    """The name of TRL's file, or a template."""
    other: Sequence[str] = ()
    """Added tokens that are not special."""
    begins: bool = False
    """Whether every text begins with BOS."""
    closes: bool = False
    """Whether every text ends with EOS."""
    pieces: str = "bytes"
    """``bytes``; or, as SentencePiece has them behind a space before every text, ``bpe`` or ``unigram``, whose words
    include the special tokens."""


FAMILIES = {
    "qwen2.5 base": Family(CHATML, "<|endoftext|>", "<|im_end|>", pad="<|endoftext|>", template="qwen2_5"),
    "qwen2.5 instruct": Family(CHATML, "<|im_end|>", "<|im_end|>", pad="<|endoftext|>", template="qwen2_5"),
    "qwen3 base": Family(
        CHATML, "<|endoftext|>", "<|im_end|>", pad="<|endoftext|>", template="qwen3", other=("<think>", "</think>")
    ),
    "qwen3 instruct 2507": Family(CHATML, "<|im_end|>", "<|im_end|>", template="qwen3_instruct_2507"),
    "first llama 3": Family(
        LLAMA3, "<|end_of_text|>", "<|eot_id|>", bos="<|begin_of_text|>", template="llama3", begins=True
    ),
    "llama 3.1": Family(LLAMA3, "<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>", "<|pad|>", "llama3_1", begins=True),
    "llama 3.2": Family(LLAMA3, "<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>", "<|pad|>", "llama3_2", begins=True),
    "gemma": Family(GEMMA, "<eos>", "<end_of_turn>", "<bos>", "<pad>", "gemma", begins=True),
    "gemma 3": Family(GEMMA, "<eos>", "<end_of_turn>", "<bos>", "<pad>", "gemma3", begins=True),
    "deepseek r1 distill": Family(
        DEEPSEEK,
        DEEPSEEK[1],
        DEEPSEEK[1],
        *(DEEPSEEK[0], DEEPSEEK[2], "deepseek_r1_distill"),
        other=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        begins=True,
    ),
    "deepseek v3": Family(
        DEEPSEEK,
        DEEPSEEK[1],
        DEEPSEEK[1],
        *(DEEPSEEK[0], DEEPSEEK[2], "deepseekv3"),
        other=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        begins=True,
    ),
    "phi 3": Family(
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|endoftext|>",
        "<|end|>",
        pad="<|endoftext|>",
        template="phi3",
    ),
    "phi 3.5": Family(
        ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|endoftext|>",
        "<|end|>",
        bos="<s>",
        pad="<|endoftext|>",
        template="phi3_5",
    ),
    "cohere": Family(
        (
            *("<BOS_TOKEN>", "<PAD>", "<|EOS|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"),
            *("<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
        ),
        "<|EOS|>",
        "<|END_OF_TURN_TOKEN|>",
        *("<BOS_TOKEN>", "<PAD>", "cohere"),
        begins=True,
    ),
    "glm 4 moe": Family(
        ("<|endoftext|>", "<|pad|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        "<|endoftext|>",
        "<|endoftext|>",
        pad="<|pad|>",
        template="glm4moe",
        other=("<think>", "</think>"),
    ),
    "lfm 2": Family((*CHATML, "<|startoftext|>"), "<|im_end|>", "<|im_end|>", "<|startoftext|>", template="lfm2"),
    "mistral": Family(PLAIN, "</s>", "</s>", "<s>", "<pad>", MISTRAL, begins=True),
    "mistral 0.3": Family((*PLAIN, "[INST]", "[/INST]"), "</s>", "</s>", "<s>", template=MISTRAL3, begins=True),
    "zephyr": Family(PLAIN, "</s>", "</s>", "<s>", template=ZEPHYR, begins=True, pieces="bpe"),
    "smollm 3": Family(CHATML, "<|im_end|>", "<|im_end|>", template=SMOLLM3, other=("<think>", "</think>")),
    "qwen 1.5 base": Family(CHATML, "<|endoftext|>", "<|im_end|>", pad="<|endoftext|>", template=QWEN15),
    "first phi 3": Family(
        ("<s>", "<|endoftext|>"),
        "<|endoftext|>",
        "<|end|>",
        *("<s>", "<|endoftext|>", PHI3_LEGACY),
        other=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        pieces="bpe",
    ),
    "ends answers alone": Family(PLAIN, "</s>", "<|end|>", pad="<pad>", template=ENDS_ANSWERS, other=("<|end|>",)),
    "llama 1": Family(PLAIN, "</s>", "</s>", "<s>", "<pad>", begins=True, pieces="bpe"),
    "unigram": Family(PLAIN, "</s>", "</s>", "<s>", "<pad>", begins=True, pieces="unigram"),
    "no template": Family(PLAIN, "</s>", "</s>", "<s>", "<pad>", begins=True),
    "no template, no bos": Family(PLAIN, "</s>", "</s>", pad="<pad>"),
    "opt": Family(PLAIN, "</s>", "</s>", "</s>", "<pad>", begins=True),
    "closes texts": Family(PLAIN, "</s>", "</s>", "<s>", "<pad>", begins=True, closes=True),
}


def template_of(name: str) -> str:
    """A template by the name that TRL gives its file."""
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def _bytes(added: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue] - typed read-only
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue] - typed read-only
    trainer = trainers.BpeTrainer(
        vocab_size=400 + added, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _sentence_pieces(family: Family) -> Tokenizer:
    spoken = [f"<0x{number:02X}>" for number in range(256)] + ["▁", *sorted(set("".join(TEXTS)) - {" "})]
    if family.pieces == "bpe":
        words = {word: number for number, word in enumerate(["<unk>", *spoken])}
        tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    else:
        scores = [("<unk>", 0.0), *((token, 0.0) for token in family.special if token != "<unk>")]
        tokenizer = Tokenizer(models.Unigram(scores + [(word, -5.0) for word in spoken], 0, byte_fallback=True))
    space = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(space)  # pyright: ignore[reportAttributeAccessIssue] - typed read-only
    said = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(said)  # pyright: ignore[reportAttributeAccessIssue] - typed read-only
    return tokenizer


@cache
def make_tokenizer(family: Family) -> Any:
    """A family's tokenizer; not to be changed."""
    added = [*family.special, *family.other]
    tokenizer = _bytes(len(added)) if family.pieces == "bytes" else _sentence_pieces(family)
    tokenizer.add_special_tokens(list(family.special))
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.other])
    if family.begins or family.closes:
        ends = [token for token, is_used in ((family.bos, family.begins), (family.eos, family.closes)) if is_used]
        parts = [family.bos] * family.begins + ["$A"] + [family.eos] * family.closes
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue] - typed read-only
            single=" ".join(map(str, parts)),
            special_tokens=[(str(token), tokenizer.token_to_id(str(token))) for token in ends],
        )
    wrapped: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=family.eos,
        bos_token=family.bos,
        pad_token=family.pad,
        extra_special_tokens=list(family.special),
    )
    if family.template is not None:
        wrapped.chat_template = family.template if "{" in family.template else template_of(family.template)
    return wrapped


def write(family: Family, folder: Path) -> Path:
    """Write a family's tokenizer into a folder."""
    make_tokenizer(family).save_pretrained(folder)
    return folder
