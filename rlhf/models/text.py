"""From prompts and responses to token ids: chat templates, padding, EOS."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from rlhf.errors import PreflightError
from rlhf.models import lengths, trust
from rlhf.models.adapter_folders import config_of

Prompt = str | Sequence[Mapping[str, Any]]

# transformers types a token's id as any of five things; of a tokenizer that `load_tokenizer` returned it is an int.
Tokenizer = Any


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a decoder's folder, with an EOS token and a pad token distinct from it.

    Raises:
        PreflightError: there is no EOS token, or no special token that could serve as padding.
    """
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, **trust.TOKENIZER)
    if tokenizer.eos_token_id is None:
        raise PreflightError(
            "the tokenizer has no EOS token, so no response could ever end",
            str(folder / "tokenizer_config.json"),
            "set eos_token in tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _spare_special_token(tokenizer, folder)
    return tokenizer


def load_encoder_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of an encoder's folder, which need not have an EOS token: nothing is generated.

    Raises:
        PreflightError: there is no pad token, or the tokenizer is not one of the ``tokenizers`` package.
    """
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, **trust.TOKENIZER)
    if tokenizer.pad_token_id is None:
        raise PreflightError(
            "the tokenizer has no pad token",
            str(folder / "tokenizer_config.json"),
            "set pad_token in tokenizer_config.json",
        )
    if not tokenizer.is_fast:
        raise PreflightError(
            f"the tokenizer, a {type(tokenizer).__name__}, has no tokenizer.json, by which texts are cut",
            str(folder),
            "save it as a fast tokenizer",
        )
    # What tokenizer.json says of lengths is not asked for: texts are cut and padded here.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def check_same_tokens(reward: Path, policy: Path, stage: str) -> None:
    """Refuse to make a value model of a reward model that has another vocabulary than the policy.

    Raises:
        PreflightError: they have different tokenizers.
    """
    one, other = (AutoTokenizer.from_pretrained(folder, **trust.TOKENIZER).get_vocab() for folder in (reward, policy))
    if one != other:
        raise PreflightError(
            "the reward model and the policy have different tokenizers, "
            "so the value model cannot start from the reward model",
            f"{stage}.value_init",
            f"{stage}.value_init=policy",
        )


def _spare_special_token(tokenizer: Tokenizer, folder: Path) -> str:
    # Padding equal to EOS would hide the EOS that ends a response, which is what a reward model scores.
    for token in (*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())):
        if (
            tokenizer.convert_tokens_to_ids(token) not in (tokenizer.eos_token_id, None)
            and token != tokenizer.bos_token
        ):
            return token
    raise PreflightError(
        "the tokenizer has no pad token that differs from EOS, and no spare special token to use as one",
        str(folder / "tokenizer_config.json"),
        "add a pad_token to tokenizer_config.json",
    )


def as_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """A prompt as a list of chat messages; a plain string is one message of the user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The ids that a response to the prompt follows: through the chat template where there is one."""
    if tokenizer.chat_template is None:
        return list(tokenizer(plain_text(prompt))["input_ids"])
    return list(
        tokenizer.apply_chat_template(as_messages(prompt), add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
    )


def plain_text(prompt: Prompt) -> str:
    """A prompt as text, for tokenizers without a chat template."""
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)


def demonstration_ids(tokenizer: Tokenizer, prompt: Prompt, completion: Prompt) -> tuple[list[int], list[int]]:
    """The ids of a demonstration's prompt, and of its completion, EOS included."""
    before = prompt_ids(tokenizer, prompt)
    if isinstance(completion, str) or tokenizer.chat_template is None:
        ids = list(tokenizer(plain_text(completion), add_special_tokens=False)["input_ids"])
    else:
        whole = tokenizer.apply_chat_template(
            [*as_messages(prompt), *as_messages(completion)], tokenize=True, return_dict=True
        )["input_ids"]
        ids = list(whole[len(before) :])
    if tokenizer.eos_token_id in ids:
        return before, ids[: ids.index(tokenizer.eos_token_id) + 1]
    return before, [*ids, tokenizer.eos_token_id]


def scored_ids(tokenizer: Tokenizer, prompt: Prompt | None, response: str, max_length: int) -> list[int]:
    """What a reward model reads: the response, after its prompt unless that is None, and EOS; cut at the start."""
    before = [] if prompt is None else prompt_ids(tokenizer, prompt)
    ids = [*before, *tokenizer(response, add_special_tokens=prompt is None)["input_ids"]]
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return ids[-max_length:]


def encoded(tokenizer: Tokenizer, prompt: Prompt | None, response: str, max_length: int) -> tuple[list[int], list[int]]:
    """What an encoder reads, in the form that its tokenizer gives to one text or to two: ids and token types.

    prompt  None for the response alone; messages are read as plain text, since encoders have no roles

    Special tokens stay. What is too long is cut at its start, the prompt before the response.
    """
    backend = tokenizer.backend_tokenizer
    after = backend.encode(response, add_special_tokens=False)
    room = max(0, max_length - backend.num_special_tokens_to_add(prompt is not None))
    after.truncate(room, direction="left")
    if prompt is None:
        whole = backend.post_process(after)
    else:
        before = backend.encode(plain_text(prompt), add_special_tokens=False)
        before.truncate(room - len(after.ids), direction="left")
        whole = backend.post_process(before, after)
    return list(whole.ids), list(whole.type_ids)


def pad(rows: Sequence[Sequence[int]], value: int, side: str) -> tuple[Tensor, Tensor]:
    """Rows of ids as ``[batch, time]`` with their attention mask, padded on the ``left`` or ``right``."""
    width = max(1, *(len(row) for row in rows))
    ids = torch.full((len(rows), width), value)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, where] = torch.tensor(row, dtype=torch.long)
        mask[index, where] = 1
    return ids, mask


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids counted over real tokens, so that left padding moves nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def context_length(folder: Path) -> int:
    """The longest sequence that a model's folder says it takes, in tokens."""
    return lengths.context_length(config_of(folder))


def check_scored_length(folder: Path) -> None:
    """Refuse a reward model that would be given longer texts than it takes.

    Raises:
        PreflightError: its ``score_max_length`` is beyond its context.
    """
    wanted, limit = config_of(folder).get("score_max_length", 0), context_length(folder)
    if wanted > limit:
        raise PreflightError(
            f"the reward model's score_max_length is {wanted}, and its context is {limit} tokens",
            str(folder / "config.json"),
            f'set "score_max_length": {limit} there',
        )
