"""From a record to token ids: the one reading of prompts and responses that all stages share.

A response is what a policy would emit after its prompt: the ids of its text, then the token that closes a turn. What a
text says never becomes a control token: ``</s>`` in a text is read as its letters.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from rlhf.errors import PreflightError, RecordError
from rlhf.models import layout, safe_loading, templates
from rlhf.models.layout import config_of
from rlhf.models.templates import Tokenizer

Prompt = str | Sequence[Mapping[str, Any]]


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a decoder's folder, ready for reading records.

    Its EOS token is the token that the chat template closes a turn with, which need not be the EOS token that the
    folder names; its pad token is another; and a date that its template prints stands still.

    Raises:
        PreflightError: no token could end a response, none could serve as padding, or the chat template would have the
            model read something else than records say.
    """
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, **safe_loading.TOKENIZER)
    if tokenizer.chat_template is not None:
        _prepare_template(tokenizer, str(folder))
    if tokenizer.eos_token_id is None:
        raise PreflightError(
            "the tokenizer has no EOS token, so no response could ever end",
            str(folder / "tokenizer_config.json"),
            "set eos_token in tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _spare_special_token(tokenizer, folder)
    return tokenizer


def _prepare_template(tokenizer: Tokenizer, place: str) -> None:
    # A folder may hold several templates, by name; the default is the one that conversations are rendered with.
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        raise PreflightError(
            f"the tokenizer has several chat templates, {', '.join(map(repr, sorted(named)))}, and none is the default",
            place,
            "name the template of conversations 'default'",
        )
    template = tokenizer.get_chat_template()
    day = tokenizer.init_kwargs.get(templates.DATE_FIELD, templates.DATE)
    tokenizer.chat_template = templates.with_fixed_date(template, day, place)
    end = templates.end_of_turn(tokenizer, place)
    if end is not None and end != tokenizer.eos_token:
        templates.check_unchanged(tokenizer, end, place)
        tokenizer.eos_token = end
    templates.name_control_tokens(tokenizer)


def load_encoder_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of an encoder's folder, which need not have an EOS token: nothing is generated.

    Raises:
        PreflightError: there is no pad token, or the tokenizer is not one of the ``tokenizers`` package.
    """
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, **safe_loading.TOKENIZER)
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
    # What a text says never becomes a control token.
    tokenizer.backend_tokenizer.encode_special_tokens = True
    # What tokenizer.json says of lengths is not asked for: texts are cut and padded here.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def check_same_tokens(reward: Path, policy: Path, stage: str) -> None:
    """Refuse to make a value model of a reward model that has another vocabulary than the policy.

    Raises:
        PreflightError: they have different tokenizers.
    """
    one, other = (
        AutoTokenizer.from_pretrained(folder, **safe_loading.TOKENIZER).get_vocab() for folder in (reward, policy)
    )
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
    """Return a prompt as a list of chat messages; a plain string is one message of the user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]


def plain_text(prompt: Prompt) -> str:
    """Return a prompt or completion as text, for tokenizers without a chat template."""
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt, place: str = "the prompt") -> list[int]:
    """Return the ids that a response to the prompt follows: through the chat template where there is one.

    place  where the prompt stands, for errors

    Raises:
        RecordError: the chat template refuses a message, leaves it out or changes it; or the text of a message would
            become a control token.
    """
    if tokenizer.chat_template is None:
        return [*text_start(tokenizer), *_text_ids(tokenizer, plain_text(prompt))]
    messages = as_messages(prompt)
    templates.check_rendered(tokenizer, messages, place)
    try:
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, sanitize_control_tokens=True
        )
    except ValueError as error:  # transformers': the tokenizer's own model has the token as a word
        raise RecordError(
            f"a message spells a control token, which the tokenizer would make of it: {error}",
            place,
            "remove the token from the text",
        ) from error
    templates.check_control_tokens(tokenizer, messages, rendered["input_ids"], place)
    return list(rendered["input_ids"])


def response_ids(tokenizer: Tokenizer, response: str) -> list[int]:
    """Return the ids that a policy emits to say the response, and the EOS with which it ends."""
    return [*_text_ids(tokenizer, response, opening(tokenizer)), tokenizer.eos_token_id]


def opening(tokenizer: Tokenizer) -> str:
    """Return the text behind which responses are read: a line break, or none.

    SentencePiece's tokenizers put a space before whatever begins a text, and a response to a generation prompt that
    ends with a line break begins none.
    """
    return _opening(tokenizer, tokenizer.chat_template)


@lru_cache(maxsize=16)
def _opening(tokenizer: Tokenizer, template: str | None) -> str:
    line_break = _split_ids(tokenizer, "\n")
    if template is None or _split_ids(tokenizer, "\na") == [*line_break, *_split_ids(tokenizer, "a")]:
        return ""
    opened = tokenizer.apply_chat_template(as_messages("a"), add_generation_prompt=True, return_dict=True)["input_ids"]
    # Phi 3's own tokenizer swallows the line break behind <|assistant|>.
    return "\n" if opened[-1] == line_break[-1] else ""


def _text_ids(tokenizer: Tokenizer, text: str, behind: str = "") -> list[int]:
    """Return a text's ids, none of which is a control token's."""
    control = templates.control_ids(tokenizer)
    ids = _ids_behind(tokenizer, text, behind)
    if control.isdisjoint(ids):
        return ids
    ids = _joined_ids(tokenizer, templates.without_control_tokens(tokenizer, text), behind)
    # Without their spelling, too: a normaliser may make such a token of full-width letters.
    return ids if control.isdisjoint(ids) else _joined_ids(tokenizer, list(text), behind)


def _joined_ids(tokenizer: Tokenizer, pieces: Sequence[str], behind: str) -> list[int]:
    first, *others = pieces
    ids = _ids_behind(tokenizer, first, behind)
    for piece in others:
        # Behind a line break: some tokenizers put a space before whatever begins a text.
        ids += _ids_behind(tokenizer, piece, "\n")
    return ids


def _ids_behind(tokenizer: Tokenizer, text: str, behind: str) -> list[int]:
    before, ids = _split_ids(tokenizer, behind), _split_ids(tokenizer, behind + text)
    return ids[len(before) :] if ids[: len(before)] == before else _split_ids(tokenizer, text)


def _split_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def response_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return what a response's ids say, without the EOS that ends it; other control tokens show as their names."""
    spoken = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    behind = opening(tokenizer)
    whole = [*_split_ids(tokenizer, behind), *spoken]
    said = tokenizer.decode(whole, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return said.removeprefix(behind)


def demonstration_ids(
    tokenizer: Tokenizer, prompt: Prompt, completion: Prompt, place: str = "the demonstration"
) -> tuple[list[int], list[int]]:
    """Return the ids of a demonstration's prompt, and of the completion that is to be learned, EOS included.

    completion  a text, or a list of one assistant's message
    place       where the demonstration stands, for errors

    Raises:
        RecordError: as :func:`prompt_ids`.
    """
    return prompt_ids(tokenizer, prompt, place), response_ids(tokenizer, plain_text(completion))


def scored_ids(
    tokenizer: Tokenizer, prompt: Prompt | None, response: str, max_length: int, place: str = "the prompt"
) -> list[int]:
    """Return what a reward model reads: prompt and response as the policy read and emitted them, cut at the start.

    prompt  None for the response alone, behind what the tokenizer begins every text with

    Raises:
        RecordError: as :func:`prompt_ids`.
    """
    before = text_start(tokenizer) if prompt is None else prompt_ids(tokenizer, prompt, place)
    return [*before, *response_ids(tokenizer, response)][-max_length:]


def text_start(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that the tokenizer begins every text with: a BOS token, or none."""
    # Not of an empty text: a lone token there may be what every text ends with.
    ids, text = list(tokenizer("a")["input_ids"]), _text_ids(tokenizer, "a")
    return ids[: next(start for start in range(len(ids)) if ids[start : start + len(text)] == text)]


def reads_messages(reward: Path) -> bool:
    """Return whether a reward model's folder reads prompts, and through a chat template, which may refuse them."""
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(reward, **safe_loading.TOKENIZER)
    return config_of(reward).get("sees") == "conversation" and tokenizer.chat_template is not None


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
    return layout.context_length(config_of(folder))


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
