"""Chat templates: the text that a tokenizer's template makes of a conversation, and the token that closes a turn.

A template is a program, and may drop a message, rewrite it, refuse its role or print today's date. Whatever would make
the model read something else than the record says is refused here.
"""

import datetime
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError

from rlhf.errors import PreflightError, RecordError

# transformers types a token's id as any of five things; of a tokenizer that `load_tokenizer` returned it is an int.
Tokenizer = Any
Message = Mapping[str, Any]

REFUSALS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
"""How a template fails that cannot render a conversation: by an exception of its own, or in an operation on a value."""

DATE_FIELD = "template_date"
"""The field of ``tokenizer_config.json`` that holds the date which templates print as today's."""
DATE = "2024-07-26"
"""That date where the field is missing: Llama 3.1's template has it for places without a clock."""

_CLOCK = re.compile(r"""\bstrftime_now\s*\(\s*(["'])((?:(?!\1).)*)\1\s*\)""")
# Asking whether there is a clock prints nothing; whatever else names it may.
_USES_CLOCK = re.compile(r"\bstrftime_now\b(?!\s+is\b)")


def check_rendered(tokenizer: Tokenizer, messages: Sequence[Message], place: str) -> None:
    """Refuse a conversation that the template does not render whole, message by message.

    place  where the conversation stands, for errors

    Raises:
        RecordError: the template refuses a message's role, leaves a message out, or changes its text; or the last
            message is the assistant's, so that there is nothing to answer.
    """
    if messages[-1]["role"] == "assistant":
        raise RecordError(
            "the prompt ends with a message of the assistant's, so there is nothing to answer",
            place,
            "end the prompt with the user's message",
        )
    try:
        text = as_text(tokenizer, messages, generation=True)
    except REFUSALS as error:
        number = _first_refused(tokenizer, messages)
        raise RecordError(
            f"the chat template refuses message {number + 1}, of the role {messages[number]['role']!r}: {error}",
            place,
            "give it a role that the template takes there, or put its text into another message",
        ) from error
    roles = tuple(str(message["role"]) for message in messages)
    order = _rendered_order(tokenizer, str(tokenizer.chat_template), roles)
    if left_out := sorted(set(range(len(messages))) - set(order)):
        number = left_out[0]
        raise RecordError(
            f"the chat template leaves out message {number + 1}, of the role {roles[number]!r}",
            place,
            "name its role as the template does: 'system', 'user' and 'assistant' are usual",
        )
    end = 0
    for number in order:
        content = messages[number]["content"].strip()
        # Each behind the one before it: a later message may quote what was dropped of an earlier one.
        start = text.find(content, end)
        end = start + len(content)
        if start < 0:
            changed = _first_changed(tokenizer, messages, number)
            raise RecordError(
                f"the chat template changes the text of message {changed + 1}, of the role {roles[changed]!r}, "
                "or leaves a part of it out",
                place,
                "remove what the template drops (reasoning of earlier turns, for instance), or use another template",
            )


def as_text(tokenizer: Tokenizer, messages: Sequence[Message], *, generation: bool, **variables: str) -> str:
    """Return what the template makes of the messages; with ``generation`` the assistant's turn is opened at the end.

    variables  of the template, in place of the tokenizer's own

    Raises:
        jinja2.exceptions.TemplateError: the template refuses them.
    """
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation, **variables)


def with_fixed_date(template: str, day: str, place: str) -> str:
    """Return the template with the clock stopped: otherwise prompts would change by the day, and no key with them.

    day    the date that it prints as today's, as ``2024-07-26``
    place  the tokenizer's folder, for errors

    Raises:
        PreflightError: the format in which it prints the date is computed, so that the date cannot be put in its place.
    """
    date = datetime.date.fromisoformat(day)
    fixed = _CLOCK.sub(lambda call: repr(date.strftime(call[2])), template)
    if prints_the_date(fixed):
        raise PreflightError(
            "the chat template prints today's date in a format that it computes, so that its prompts change by the day",
            place,
            "write the date into the template",
        )
    return fixed


def prints_the_date(template: object) -> bool:
    """Return whether a chat template, where there is one, asks for today's date."""
    return isinstance(template, str) and _USES_CLOCK.search(template) is not None


def end_of_turn(tokenizer: Tokenizer, place: str) -> str | None:
    """Return the token that the template closes the assistant's turn with, or None where it writes none.

    place  the tokenizer's folder, for errors

    Raises:
        PreflightError: the template leaves out the assistant's answers, or opens them with special tokens or words
            that its generation prompt lacks, so that a policy would have to write these itself; or it closes the last
            answer with another token than those before it.
    """
    question, answer, _ = conversation = _conversation("user", "assistant", "user")
    try:
        opened = as_text(tokenizer, [question], generation=True)
        answered = as_text(tokenizer, [question, answer], generation=False)
        history = as_text(tokenizer, conversation, generation=False)
    except REFUSALS as error:
        raise PreflightError(
            f"the chat template refuses a question and its answer: {error}", place, "use a model with a chat template"
        ) from error
    before, found, after = answered.partition(answer["content"])
    if not found or question["content"] not in before:
        raise PreflightError(
            "the chat template leaves out a user's question or the assistant's answer",
            place,
            "use a template that renders messages of the roles 'user' and 'assistant' whose content is a text",
        )
    opening = before.removeprefix(opened) if before.startswith(opened) else ""
    markers = [token for token in _special_tokens(tokenizer) if token in history]
    words = re.sub("|".join(map(re.escape, _added_tokens(tokenizer))) or "$^", "", opening)
    if words.strip() or any(marker in opening for marker in markers):
        raise PreflightError(
            f"the chat template opens an answer with {opening!r}, and its generation prompt does not: the policy would "
            "have to write that itself",
            place,
            "use a template whose generation prompt ends where the answer's text begins",
        )
    last, earlier = _first_token(tokenizer, after), _end_of_earlier_turn(tokenizer, history, conversation)
    if last and earlier and last != earlier:
        raise _closed_in_two_ways(last, earlier, place)
    # Some templates close the last answer only where another turn is opened behind it.
    return last or earlier


def _end_of_earlier_turn(tokenizer: Tokenizer, history: str, conversation: Sequence[Message]) -> str | None:
    """Return the token that closes an answer with another question behind it; None where none does."""
    start, _, answer = history.partition(conversation[0]["content"])
    after_question, _, after_answer = answer.partition(conversation[1]["content"])
    token = _first_token(tokenizer, after_answer)
    # Or it opens the user's turn, as that of the first question; a system's turn before it is closed as the user's is.
    closes = token in (tokenizer.eos_token, _first_token(tokenizer, after_question)) or str(token) not in start
    return token if closes else None


def _first_token(tokenizer: Tokenizer, text: str) -> str | None:
    tokens = "|".join(map(re.escape, _added_tokens(tokenizer)))
    found = re.match(rf"\s*({tokens})", text) if tokens else None
    return found[1] if found else None


def _closed_in_two_ways(last: str, earlier: str, place: str) -> PreflightError:
    return PreflightError(
        f"the chat template closes the last answer with {last} and earlier turns with {earlier}",
        place,
        "use a template that closes all of the assistant's turns alike",
    )


def control_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids of the tokens that no text may become: special ones, and those with which turns are marked."""
    return frozenset(tokenizer.convert_tokens_to_ids(_control_tokens(tokenizer, str(tokenizer.chat_template))))


def name_control_tokens(tokenizer: Tokenizer) -> None:
    """Have transformers, too, keep the control tokens out of messages that the template puts together from parts.

    It knows special tokens and those that stand whole in the template's source, which ``'<|' + role + '|>'`` hides.
    """
    template = str(tokenizer.chat_template)
    control, special = _control_tokens(tokenizer, template), _special_tokens(tokenizer)
    if any(token not in special and token not in template for token in control):
        tokenizer.chat_control_tokens = [
            token for token in _added_tokens(tokenizer) if token in control or token in template
        ]


def without_control_tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the text in pieces, so cut that no piece spells a control token.

    Tokenizers take a special token in a text apart when they are asked to, but not DeepSeek's ``<｜User｜>``, for
    instance, which is added without being special, nor any that is a word of their own model, as ``</s>`` is in
    SentencePiece's unigram models.
    """
    markers = _control_tokens(tokenizer, str(tokenizer.chat_template))
    cuts = [match.start() + 1 for match in re.finditer("|".join(map(re.escape, markers)), text)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def check_unchanged(tokenizer: Tokenizer, other_eos: str, place: str) -> None:
    """Refuse a template that writes ``eos_token`` inside conversations while it closes turns with another token.

    Raises:
        PreflightError: a conversation reads differently with the tokenizer's EOS token and with ``other_eos``.
    """
    messages = _conversation("user", "assistant", "user")
    if as_text(tokenizer, messages, generation=True) != as_text(
        tokenizer, messages, generation=True, eos_token=other_eos
    ):
        raise _closed_in_two_ways(other_eos, tokenizer.eos_token, place)


def _conversation(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"\ue000message {number}\ue000"} for number, role in enumerate(roles)]


def _added_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return the tokenizer's added tokens, the longest first, without those that are white space."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return sorted((token for token in tokens if token.strip()), key=lambda token: (-len(token), token))


def _special_tokens(tokenizer: Tokenizer) -> set[str]:
    return {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}


def _first_refused(tokenizer: Tokenizer, messages: Sequence[Message]) -> int:
    for number in range(len(messages)):
        try:
            as_text(tokenizer, messages[: number + 1], generation=True)
        except REFUSALS:
            return number
    return len(messages) - 1


def _first_changed(tokenizer: Tokenizer, messages: Sequence[Message], last: int) -> int:
    """Return the number of the first message, up to ``last``, whose text is not there when others' texts differ."""
    others = _conversation(*(str(message["role"]) for message in messages))
    for number, message in enumerate(messages[:last]):
        alone = [*others[:number], message, *others[number + 1 :]]
        if message["content"].strip() not in as_text(tokenizer, alone, generation=True):
            return number
    return last


def _is_mark(tokenizer: Tokenizer, token: str, asked: str, opened: str) -> bool:
    """Return whether an opened answer has the token as a mark of its text, as ``<think>`` with its ``</think>`` is."""
    other = f"<{token[2:]}" if token.startswith("</") else f"</{token[1:]}"
    is_paired = token.startswith("<") and other in _added_tokens(tokenizer)
    return is_paired and token not in asked and not opened.removeprefix(asked).lstrip().startswith(token)


@lru_cache(maxsize=16)
def _control_tokens(tokenizer: Tokenizer, template: str) -> list[str]:  # noqa: ARG001 - a key
    # A text may well become the unknown token.
    control = (_special_tokens(tokenizer) | {tokenizer.eos_token}) - {tokenizer.unk_token}
    if tokenizer.chat_template is not None:
        conversation = _conversation("system", "user", "assistant", "user")
        try:
            history = as_text(tokenizer, conversation, generation=False)
        except REFUSALS:
            conversation = conversation[1:]
            history = as_text(tokenizer, conversation, generation=False)
        asked, opened = (as_text(tokenizer, conversation[:-2], generation=generation) for generation in (False, True))
        # Texts may have marks of reasoning, which templates write into earlier answers, and into the generation prompt.
        control |= {
            token
            for token in _added_tokens(tokenizer)
            if token in history and token in opened and not _is_mark(tokenizer, token, asked, opened)
        }
    return [token for token in _added_tokens(tokenizer) if token in control]


def check_control_tokens(tokenizer: Tokenizer, messages: Sequence[Message], ids: Sequence[int], place: str) -> None:
    """Refuse a conversation of which a text became a control token.

    Which needs no spelling of the token: a normaliser may make ``</s>`` of a text in full-width letters.

    ids    what the tokenizer made of the messages
    place  where the conversation stands, for errors

    Raises:
        RecordError: there are other control tokens in it than the template itself writes.
    """
    control = control_ids(tokenizer)
    turns = tuple((str(message["role"]), bool(message["content"].strip())) for message in messages)
    written = _written_control_ids(tokenizer, str(tokenizer.chat_template), turns)
    said = Counter(number for number in ids if number in control) - Counter(written)
    if said:
        names = ", ".join(tokenizer.convert_ids_to_tokens(list(said)))
        raise RecordError(
            f"the tokenizer makes the control token {names} of the text of a message", place, "change the text there"
        )


@lru_cache(maxsize=256)
def _written_control_ids(
    tokenizer: Tokenizer,
    template: str,  # noqa: ARG001 - a key
    turns: tuple[tuple[str, bool], ...],
) -> list[int]:
    """Return the control tokens that the template writes around messages of these roles, with and without a text."""
    messages = [{"role": role, "content": "a" if has_text else ""} for role, has_text in turns]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    control = control_ids(tokenizer)
    return [number for number in rendered["input_ids"] if number in control]


@lru_cache(maxsize=256)
def _rendered_order(tokenizer: Tokenizer, template: str, roles: tuple[str, ...]) -> list[int]:  # noqa: ARG001 - a key
    """Return the numbers of the messages that appear, whatever their text, in the order in which they do.

    Mistral's templates write the system's message into the last turn of the user's.
    """
    messages = _conversation(*roles)
    text = as_text(tokenizer, messages, generation=True)
    starts = {number: text.find(message["content"]) for number, message in enumerate(messages)}
    return sorted((number for number, start in starts.items() if start >= 0), key=starts.__getitem__)
