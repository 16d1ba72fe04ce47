"""Chat templates: what a tokenizer's template writes around the messages of a conversation.

ChatML's template renders a question and its answer as five parts (``⏎`` is a line break):

    <|im_start|>user⏎ Why? <|im_end|>⏎    the user's turn
    <|im_start|>assistant⏎                the generation prompt: it opens the answer's turn, and a response follows it
    So.                                   the answer
    <|im_end|>                            the token that closes a turn; :func:`prepare` makes it the tokenizer's EOS
    ⏎                                     no part of the response: a policy has stopped before it

Control tokens are the tokenizer's special tokens, EOS, and added tokens with which the template marks turns, here
``<|im_start|>``. The template alone writes them: no text of a message may become one. Marks of reasoning, ``<think>``
and its ``</think>``, are not control tokens unless the tokenizer calls them special, also where the template writes
them: a response may hold them.

A template is a program, and may drop a message, rewrite it, refuse its role or print today's date. A template or a
conversation is refused if the model would read another text than the record's. ``place`` is the tokenizer's folder, or
the conversation's file and row, for errors.
"""

import datetime
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, wraps
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError

from rlhf.errors import PreflightError, RecordError

# transformers types a token's id as any of five things; of a tokenizer that `load_tokenizer` returned it is an int.
Tokenizer = Any
Message = Mapping[str, Any]

REFUSALS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
"""How a template fails that cannot render a conversation: by an exception of its own, or in an operation on a value."""

DATE_FIELD = "template_date"
"""The field of ``tokenizer_config.json`` that holds the date which templates print as today's."""

_F = TypeVar("_F", bound=Callable[..., Any])

_CLOCK = re.compile(r"""\bstrftime_now\s*\(\s*(["'])((?:(?!\1).)*)\1\s*\)""")
# A template that only asks whether there is a clock prints nothing.
_USES_CLOCK = re.compile(r"\bstrftime_now\b(?!\s+is\b)")


def cached(function: _F) -> _F:
    """Cache a function of a tokenizer by the tokenizer, its chat template, and the further arguments."""
    call: Any = lru_cache(maxsize=256)(lambda _template, *arguments: function(*arguments))
    keyed: Any = wraps(function)(lambda tokenizer, *rest: call(str(tokenizer.chat_template), tokenizer, *rest))
    return keyed


def prepare(tokenizer: Tokenizer, place: str) -> None:
    """Fix the date of a tokenizer's chat template, and make the token that closes a turn the EOS token.

    Raises:
        PreflightError: the tokenizer has several templates and no default; or as :func:`with_fixed_date` and
            :func:`end_of_turn`.
    """
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        raise PreflightError(
            f"the tokenizer has several chat templates, {', '.join(map(repr, sorted(named)))}, and none is the default",
            place,
            "name the template of conversations 'default'",
        )
    # Llama 3.1's template has this date for places without a clock.
    day = tokenizer.init_kwargs.get(DATE_FIELD, "2024-07-26")
    tokenizer.chat_template = template = with_fixed_date(tokenizer.get_chat_template(), day, place)
    end = end_of_turn(tokenizer, place)
    if end not in (None, tokenizer.eos_token):
        tokenizer.eos_token = end
    # transformers keeps special tokens out of messages, and added tokens that the template's source holds whole. Those
    # which the source puts together, as `'<|' + role + '|>'` does, it must be given.
    control, special, added = _control_tokens(tokenizer), _special_tokens(tokenizer), _added_tokens(tokenizer)
    if any(token not in special and token not in template for token in control):
        tokenizer.chat_control_tokens = [token for token in added if token in control or token in template]


def with_fixed_date(template: str, day: str, place: str) -> str:
    """Return the template with today's date fixed to ``day``: else prompts change by the day, and no key with them.

    Raises:
        PreflightError: the template computes the format in which it prints the date.
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
    """Return the token that the template writes behind an answer, or None where it writes no token there.

    Raises:
        PreflightError: the template leaves out answers; it opens them with special tokens or words that its generation
            prompt lacks, so that a policy would have to write these itself; or it closes the last answer with another
            token than earlier turns.
    """
    question, answer, _ = conversation = _placeholders("user", "assistant", "user")
    try:
        asked = as_text(tokenizer, [question], generation=True)
        answered = as_text(tokenizer, [question, answer], generation=False)
        history = as_text(tokenizer, conversation, generation=False)
    except REFUSALS as error:
        raise PreflightError(
            f"the chat template refuses a question and its answer: {error}", place, "use a model with a chat template"
        ) from error
    before_answer, separator, after_last = answered.partition(answer["content"])
    if not separator or question["content"] not in before_answer:
        raise PreflightError(
            "the chat template leaves out a user's question or the assistant's answer",
            place,
            "use a template that renders messages of the roles 'user' and 'assistant' whose content is a text",
        )
    missing = before_answer.removeprefix(asked) if before_answer.startswith(asked) else ""
    words = re.sub(_any_of(_added_tokens(tokenizer)), "", missing)
    if words.strip() or any(token in missing and token in history for token in _special_tokens(tokenizer)):
        raise PreflightError(
            f"the chat template opens an answer with {missing!r}, and its generation prompt does not: the policy would "
            "have to write that itself",
            place,
            "use a template whose generation prompt ends where the answer's text begins",
        )
    before_question, _, rest = history.partition(question["content"])
    after_question, _, after_earlier = rest.partition(answer["content"])
    last, earlier = _first_token(tokenizer, after_last), _first_token(tokenizer, after_earlier)
    # Where nothing closes the earlier answer, the token behind it opens the next turn, and precedes the first question
    # too. A token that closes every turn may also precede that question: a system's turn is closed before it.
    closing = (tokenizer.eos_token, _first_token(tokenizer, after_question))
    if earlier and earlier not in closing and earlier in before_question:
        earlier = None
    end = last or earlier  # some templates close the last answer only when another turn follows
    # `end` becomes the EOS token, and must not change what a template that writes `eos_token` renders.
    if last and earlier and last != earlier:
        other = earlier
    elif end and as_text(tokenizer, conversation, generation=True, eos_token=end) != as_text(
        tokenizer, conversation, generation=True
    ):
        other = tokenizer.eos_token
    else:
        return end
    raise PreflightError(
        f"the chat template closes the last answer with {end} and earlier turns with {other}",
        place,
        "use a template that closes all of the assistant's turns alike",
    )


def _first_token(tokenizer: Tokenizer, text: str) -> str | None:
    """Return the added token that a text begins with, white space aside."""
    match = re.match(rf"\s*({_any_of(_added_tokens(tokenizer))})", text)
    return match[1] if match else None


def conversation_ids(tokenizer: Tokenizer, messages: Sequence[Message], place: str) -> list[int]:
    """Return the ids of a conversation that a response follows, generation prompt included.

    Raises:
        RecordError: the last message is the assistant's; the template refuses a message's role, leaves a message out
            or changes its text; or the text of a message would become a control token.
    """
    _check_rendered(tokenizer, messages, place)
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
    ids = list(rendered["input_ids"])
    # A text may become a control token without spelling it: a normaliser may make ``</s>`` of full-width letters.
    control = control_ids(tokenizer)
    turns = tuple((str(message["role"]), bool(message["content"].strip())) for message in messages)
    written = _written_control_ids(tokenizer, turns)
    surplus = Counter(number for number in ids if number in control) - Counter(written)
    if surplus:
        names = ", ".join(tokenizer.convert_ids_to_tokens(list(surplus)))
        raise RecordError(
            f"the tokenizer makes the control token {names} of the text of a message", place, "change the text there"
        )
    return ids


def _check_rendered(tokenizer: Tokenizer, messages: Sequence[Message], place: str) -> None:
    """Refuse a conversation that the template does not render whole, message by message."""
    if messages[-1]["role"] == "assistant":
        raise RecordError(
            "the prompt ends with a message of the assistant's, so there is nothing to answer",
            place,
            "end the prompt with the user's message",
        )
    try:
        text = as_text(tokenizer, messages, generation=True)
    except REFUSALS as error:
        number = 0  # of the message with which the template begins to refuse
        with suppress(*REFUSALS):
            while number < len(messages) - 1:
                as_text(tokenizer, messages[: number + 1], generation=True)
                number += 1
        raise RecordError(
            f"the chat template refuses message {number + 1}, of the role {messages[number]['role']!r}: {error}",
            place,
            "give it a role that the template takes there, or put its text into another message",
        ) from error
    roles = tuple(str(message["role"]) for message in messages)
    order = _rendered_order(tokenizer, roles)
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
        # The search begins behind the message before: a later message may quote a dropped part of an earlier one.
        start = text.find(content, end)
        end = start + len(content)
        if start < 0:
            # An earlier message may be the changed one, and this message may contain its text.
            changed, others = 0, _placeholders(*roles)
            while changed < number and messages[changed]["content"].strip() in as_text(
                tokenizer, [*others[:changed], messages[changed], *others[changed + 1 :]], generation=True
            ):
                changed += 1
            raise RecordError(
                f"the chat template changes the text of message {changed + 1}, of the role {roles[changed]!r}, "
                "or leaves a part of it out",
                place,
                "remove what the template drops (reasoning of earlier turns, for instance), or use another template",
            )


@cached
def _rendered_order(tokenizer: Tokenizer, roles: tuple[str, ...]) -> list[int]:
    """Return the numbers of the messages that appear in the rendering, whatever their text, in their order there.

    Mistral's templates write the system's message into the last turn of the user's.
    """
    messages = _placeholders(*roles)
    text = as_text(tokenizer, messages, generation=True)
    starts = {number: text.find(message["content"]) for number, message in enumerate(messages)}
    return sorted((number for number, start in starts.items() if start >= 0), key=starts.__getitem__)


@cached
def control_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids of the control tokens, which no text may become."""
    return frozenset(tokenizer.convert_tokens_to_ids(_control_tokens(tokenizer)))


def without_control_tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the text cut into pieces of which none spells a control token.

    Tokenizers split a special token in a text when asked to, but not DeepSeek's ``<｜User｜>``, for instance, which is
    added without being special, nor any that is a word of their own model, as ``</s>`` is in SentencePiece's unigram
    models.
    """
    cuts = [match.start() + 1 for match in re.finditer(_any_of(_control_tokens(tokenizer)), text)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@cached
def _control_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return the control tokens, the longest first."""
    added = _added_tokens(tokenizer)
    control = (_special_tokens(tokenizer) | {tokenizer.eos_token}) - {tokenizer.unk_token}  # texts may become <unk>
    if tokenizer.chat_template is not None:
        conversation = _placeholders("system", "user", "assistant", "user")
        try:
            history = as_text(tokenizer, conversation, generation=False)
        except REFUSALS:
            conversation = conversation[1:]
            history = as_text(tokenizer, conversation, generation=False)
        asked, opened = (as_text(tokenizer, conversation[:-2], generation=generation) for generation in (False, True))
        generation_prompt = opened.removeprefix(asked).lstrip()
        for token in added:
            # A pair such as <think> and </think> within the answer's turn alone marks the answer's text, not the turn.
            partner = f"<{token[2:]}" if token.startswith("</") else f"</{token[1:]}"
            is_pair = token.startswith("<") and partner in added
            marks_text = is_pair and token not in asked and not generation_prompt.startswith(token)
            if token in history and token in opened and not marks_text:
                control.add(token)
    return [token for token in added if token in control]


@cached
def _written_control_ids(tokenizer: Tokenizer, turns: tuple[tuple[str, bool], ...]) -> list[int]:
    """Return the control tokens that the template writes around messages of these roles, with and without a text."""
    messages = [{"role": role, "content": "a" if has_text else ""} for role, has_text in turns]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    control = control_ids(tokenizer)
    return [number for number in rendered["input_ids"] if number in control]


def as_text(tokenizer: Tokenizer, messages: Sequence[Message], *, generation: bool, **variables: str) -> str:
    """Return the template's rendering of the messages, with ``generation`` the generation prompt behind them.

    variables  of the template, in place of the tokenizer's own
    """
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation, **variables)


def _placeholders(*roles: str) -> list[dict[str, str]]:
    """Return messages of these roles with texts that no template writes of its own."""
    return [{"role": role, "content": f"\ue000message {number}\ue000"} for number, role in enumerate(roles)]


def _added_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return the tokenizer's added tokens, the longest first, without those that are white space."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return sorted((token for token in tokens if token.strip()), key=lambda token: (-len(token), token))


def _special_tokens(tokenizer: Tokenizer) -> set[str]:
    return {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}


def _any_of(tokens: Iterable[str]) -> str:
    """Return a regular expression that matches each of the tokens, and nothing where there are none."""
    return "|".join(map(re.escape, tokens)) or "(?!)"
