"""Read rows of public data sets as records, where their meaning is certain.

The meaning is certain where prompt and answer follow from the row alone: in a conversation whose last message is the
assistant's, that message is the answer and all messages before it are the prompt; two conversations that differ in
their last message are compared by that message. Every other row is refused, with the field that is uncertain.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from rlhf.config.base import suggestion
from rlhf.data.records import (
    ComparisonSet,
    Demonstration,
    JudgeRating,
    MalformedError,
    Message,
    PreferencePair,
    Prompt,
    R,
    Reason,
    parse_record,
    record_type,
    without_nulls,
)

Fields = dict[str, Any]
Messages = list[dict[str, Any]]

CONVERSATIONS = ("messages", "conversations", "conversation")
INSTRUCTIONS = ("instruction", "question", "prompt")
ADDITIONS = ("input", "context")
"""Fields appended to an instruction; beside a question their place in the prompt is not certain."""
ANSWERS = ("output", "response", "answer")
SYSTEMS = ("system", "system_prompt", "system_message")

_OF_THE_PROMPT = re.compile(
    r"(audio|document|image|video|choice|option|function)s?|context|history|input|passage|system(_prompt|_message)?"
)
"""Fields on which an answer may depend: a row that fills one is refused, unless its form says where it belongs."""
_PRAISE = re.compile(r"(is_)?(accepted|approved|correct|harmless|safe)|labels?|mask|train|weight")
_BLAME = re.compile(r"(is_)?(deleted|harmful|rejected|toxic|unsafe)")
"""Fields that may say that an answer must not be imitated: of ``_PRAISE`` where false, of ``_BLAME`` where true."""

_WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*(["'])(role|content|from|value)\1\s*:""")
"""The beginning of a list of messages that JSON or Python wrote into a text."""

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "assistant"), "assistant"),
}

_BOOKKEEPING = re.compile(
    r"(.*[_-])?(id|ids|idx|index|score|scores|source|url|license|timestamp)|dataset|category|categories|task|tags?|topic|"
    r"lang|language|split|created|created_at|updated_at|date|meta|metadata|(score|rating)[_-].*|__index_level_\d+__"
)
"""Columns that public data sets carry beside a record, and that hold nothing to train on."""

MISSPELT = 0.82
"""Similarity, as difflib measures it, from which an unknown field is taken as a misspelt field of ours: it is above for
``promt`` and ``prompt``, and 0.80 for ``prompt_id``."""


class _Form(NamedTuple):
    """A row in the fields of our records."""

    row: Fields
    rest: Fields
    """Fields that are not part of the form."""
    name: str
    """The name of the form in messages; empty for our own form."""


@dataclass
class FormReader:
    """Parse records from rows of any form, and count the rows of each form."""

    _forms: Counter[str] = field(default_factory=Counter[str], init=False)
    _unread: dict[str, None] = field(default_factory=dict[str, None], init=False)

    def parse(self, value: Any, model: type[R]) -> R | list[Reason]:
        """Return a row's value as a record, or the reasons why it is none."""
        if not isinstance(value, Mapping):
            return parse_record(value, model)
        try:
            form = _form_of(without_nulls(value), model)
        except MalformedError as error:
            return [error.reason]
        known = record_type(form.row, model).model_fields
        unread = [
            name
            for name in form.rest
            if _BOOKKEEPING.fullmatch(plain := name.casefold())
            or (form.name and all(SequenceMatcher(None, plain, field).ratio() < MISSPELT for field in known))
        ]
        record = parse_record(form.row | _without(form.rest, unread), model)
        if not isinstance(record, list):
            self._forms[form.name] += 1
            self._unread.update(dict.fromkeys(unread))
        return record

    def line(self) -> str:
        """Count the rows of each form other than our own, and name the fields that were not read."""
        parts = [f"{count} rows read as {name}" for name, count in self._forms.items() if name]
        if self._unread:
            parts.append(f"fields not read: {', '.join(self._unread)}")
        return "; ".join(parts)


def model_of(value: Any) -> type[Demonstration] | type[ComparisonSet] | type[Prompt] | type[JudgeRating]:
    """Return the kind of record that a row's fields indicate; a prompt where they indicate none."""
    row = without_nulls(value) if isinstance(value, Mapping) else {}
    if row.keys() & {"responses", "ratings", "rankings", "winners", "chosen", "rejected"}:
        return ComparisonSet
    if row.keys() & {"completion", *ANSWERS}:
        return Demonstration
    if key := _conversation_field(row):
        last = row[key][-1]
        role = last.get("role", _SHAREGPT_ROLES.get(str(last.get("from"))))
        return Demonstration if role == "assistant" else Prompt
    return JudgeRating if row.keys() & {"text", "rating"} else Prompt


def _form_of(row: Fields, model: type[Any]) -> _Form:
    """Return a row in the fields of ``model``; raise MalformedError where its meaning is not certain."""
    if row.get("tools"):
        raise MalformedError("tools", "offers tools, and calls of tools are not trained on yet")
    for name in ("prompt", "completion", "chosen", "rejected"):
        if isinstance(text := row.get(name), str) and _WRITTEN_MESSAGES.match(text):
            raise MalformedError(name, "holds messages written as a text: write them as a list of objects")
    if issubclass(model, ComparisonSet):
        form = _comparison(row)
    elif issubclass(model, Demonstration):
        form = _demonstration(row)
    else:
        form = _prompt(row) if issubclass(model, Prompt) else _own(row, model)
    for name, content in form.rest.items() if form.name else ():
        plain = name.casefold()
        # An instruction in the rest was read, or a conversation repeats it; either holds for its input too.
        asks = _OF_THE_PROMPT.fullmatch(plain) and content and not (plain == "input" and "instruction" in form.rest)
        judges = _PRAISE.fullmatch(plain) or (_BLAME.fullmatch(plain) and content)
        if asks or (judges and issubclass(model, Demonstration)):
            raise MalformedError(name, "is not part of the form, and prompt or training may depend on it")
    return form


def _own(row: Fields, model: type[Any]) -> _Form:
    """Return a row that has the fields of our records, with the content of every message as one text."""
    known = record_type(row, model).model_fields
    own = {name: value for name, value in row.items() if name in known}
    texts: Fields = {name: own.get(name) for name in ("prompt", "completion", "chosen", "rejected")}
    responses = own.get("responses")
    if isinstance(responses, list):
        texts |= {f"responses[{number}]": response for number, response in enumerate(responses)}
    conversations = {place: turns for place, turns in texts.items() if _is_conversation(turns)}
    plain = {place: _messages(turns, place) for place, turns in conversations.items()}
    own |= {place: messages for place, messages in plain.items() if place in own}
    if isinstance(responses, list):
        own["responses"] = [plain.get(f"responses[{number}]", text) for number, text in enumerate(responses)]
    turns = itertools.chain(*conversations.values())
    in_parts = any(isinstance(turn.get("value" if "from" in turn else "content"), list) for turn in turns)
    return _Form(own, _without(row, own), "messages with their content in parts" if in_parts else "")


def _demonstration(row: Fields) -> _Form:
    if isinstance(row.get("label"), bool):
        raise MalformedError("label", "says whether the completion is good, and all demonstrations are imitated alike")
    for key in ("completion", *CONVERSATIONS):
        last = row[key][-1] if _is_conversation(row.get(key)) else {}
        if name := next((name for name in last if _PRAISE.fullmatch(name) and not last[name]), None):
            place = f"{key}[{len(row[key]) - 1}].{name}"
            raise MalformedError(place, "says that the answer must not be learned, but it would be")
    if "completion" in row:
        form = _own(row, Demonstration)
        prompt = form.row.get("prompt")
        *before, last = form.row["completion"] if _is_conversation(form.row["completion"]) else [{}]
        if not before or last["role"] != "assistant" or not isinstance(prompt, (str, list)):
            return form
        # Only the last message of a completion is learned, so the others belong to the prompt.
        name = "completions of several turns: the last message is the completion, all before it belongs to the prompt"
        asked: Messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        turns = {"prompt": asked + before, "completion": [last]}
        return form._replace(row=form.row | turns, name=name)
    if key := _conversation_field(row):
        messages = _whole_conversation(row, key)
        _check_ends_with_answer(messages, key)
        _check_prompt(row, messages[:-1], key)
        return _Form(
            {"prompt": messages[:-1], "completion": messages[-1]["content"]},
            _without(row, (key, *SYSTEMS, "prompt")),
            f"conversations in {key!r}: the last message is the completion, all before it the prompt",
        )
    answers = [name for name in ANSWERS if name in row]
    if len(answers) == 1 and (instruction := _instruction(row)):
        prompt, used = instruction
        used += (answers[0],)
        name = f"instructions with answers, in {', '.join(map(repr, used))}"
        return _Form({"prompt": prompt, "completion": row[answers[0]]}, _without(row, used), name)
    return _own(row, Demonstration)


def _prompt(row: Fields) -> _Form:
    if "prompt" in row and not row.keys() & {*SYSTEMS, "history"}:
        form = _own(row, Prompt)
        known = {*CONVERSATIONS, *Demonstration.model_fields, *PreferencePair.model_fields, *ComparisonSet.model_fields}
        return form._replace(name="prompts of rows that hold more") if form.rest.keys() & known else form
    if key := _conversation_field(row):
        messages = _whole_conversation(row, key)
        name = f"prompts in {key!r}"
        if messages[-1]["role"] == "assistant":
            name = f"prompts of conversations in {key!r}: all before the last message, which is an answer"
            messages = messages[:-1]
        return _Form({"prompt": messages}, _without(row, (key, *SYSTEMS)), name)
    if {"chosen", "rejected"} <= row.keys():
        form = _comparison(row)
        prompt = {name: value for name, value in form.row.items() if name == "prompt"}
        return _Form(prompt, form.rest, f"prompts of {form.name}")
    if instruction := _instruction(row):
        prompt, used = instruction
        return _Form({"prompt": prompt}, _without(row, used), f"prompts in {', '.join(map(repr, used))}")
    return _own(row, Prompt)


def _comparison(row: Fields) -> _Form:
    if not {"chosen", "rejected"} <= row.keys():
        return _own(row, ComparisonSet)
    sides = [row["chosen"], row["rejected"]]
    if all(transcripts := [_transcript(side) for side in sides]):
        return _compared(row, transcripts, "transcripts of Human and Assistant")
    if all(map(_is_conversation, sides)) and max(map(len, sides)) > 1:
        conversations = [_messages(row[name], name) for name in ("chosen", "rejected")]
        return _compared(row, conversations, "pairs of conversations")
    instruction, form = _instruction(row), _own(row, ComparisonSet)
    if instruction and instruction[1] != ("prompt",):
        prompt, used = instruction
        name = f"pairs with the prompt in {', '.join(map(repr, used))}"
        return _Form(form.row | {"prompt": prompt}, _without(form.rest, used), name)
    return form


def _compared(row: Fields, sides: Sequence[Messages], name: str) -> _Form:
    """Return a pair made of two conversations that differ at most in their last message."""
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        raise MalformedError("chosen", "and rejected differ before their last messages, so that no prompt is common")
    _check_ends_with_answer(chosen, "chosen")
    _check_ends_with_answer(rejected, "rejected")
    _check_prompt(row, chosen[:-1], "chosen")
    own = {"prompt": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
    own |= {field: row[field] for field in PreferencePair.model_fields if field in row and field not in own}
    return _Form(own, _without(row, own), f"{name}: their last messages are compared, all before those is the prompt")


def _check_ends_with_answer(messages: Messages, field: str) -> None:
    if (role := messages[-1]["role"]) != "assistant":
        raise MalformedError(field, f"ends with a message of the role {role!r}, and must end with 'assistant'")


def _check_prompt(row: Fields, before: Messages, field: str) -> None:
    """Refuse a row whose field ``prompt`` differs from the messages before the answer in ``field``."""
    prompt = row.get("prompt")
    if prompt is None:
        return
    if _is_conversation(prompt):
        same = _messages(prompt, "prompt") in (before, [turn for turn in before if turn["role"] != "system"])
    else:
        texts = [turn["content"].strip() for turn in before if turn["role"] == "user"]
        *turns, last = _transcript(prompt) or [{}]
        same = isinstance(prompt, str) and (prompt.strip() in texts or (turns == before and not last["content"]))
    if not same:
        raise MalformedError("prompt", f"differs from the beginning of {field!r}, so neither is certain")


def _instruction(row: Fields) -> tuple[str | Messages, tuple[str, ...]] | None:
    """Return the prompt of an instruction, and its fields; None where the row has none, or several."""
    names = [name for name in INSTRUCTIONS if isinstance(row.get(name), str)]
    if len(names) != 1:
        return None
    text, used = row[names[0]], (names[0],)
    for name in ADDITIONS if names[0] == "instruction" else ():
        if isinstance(row.get(name), str):
            used += (name,)
            text += f"\n\n{row[name]}" if row[name].strip() else ""
    earlier: Messages = []
    if name := next((name for name in SYSTEMS if isinstance(row.get(name), str)), None):
        used += (name,)
        earlier += [{"role": "system", "content": row[name]}] if row[name].strip() else []
    if isinstance(history := row.get("history"), list):
        used += ("history",)
        for number, turn in enumerate(history):
            if not isinstance(turn, (list, tuple)) or len(turn) != 2:
                raise MalformedError(f"history[{number}]", "must be two texts, the user's and the assistant's")
            earlier += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return ([*earlier, {"role": "user", "content": text}] if earlier else text), used


def _whole_conversation(row: Fields, key: str) -> Messages:
    """Return a row's conversation, which begins with the row's system prompt if there is one."""
    messages = _messages(row[key], key)
    for name in SYSTEMS:
        system = row.get(name)
        if not isinstance(system, str) or not system.strip():
            continue
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        elif messages[0]["content"].strip() != system.strip():
            raise MalformedError(name, f"differs from the beginning of {key!r}, so neither is certain")
    return messages


def _transcript(text: Any) -> Messages:
    """Return the turns of a text that begin with Human: and Assistant: (Bai et al. 2022); none for any other value."""
    if not isinstance(text, str) or not re.match(r"\s*Human:", text) or "\n\nAssistant:" not in text:
        return []
    _, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[role], "content": content.strip()} for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _messages(turns: Sequence[Mapping[str, Any]], field: str) -> Messages:
    """Return the turns as messages with a role and a text; refuse calls of tools, unknown fields and other content."""
    messages: Messages = []
    for number, turn in enumerate(turns):
        rest, place = dict(turn), f"{field}[{number}]"
        for name in ("tool_calls", "function_call"):
            if rest.pop(name, None):
                raise MalformedError(f"{place}.{name}", "calls a tool, and calls of tools are not trained on yet")
        key = "content"
        if "from" in rest:
            key, role = "value", rest.pop("from")
            if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
                raise MalformedError(f"{place}.from", f"is {role!r}; known: {', '.join(_SHAREGPT_ROLES)}")
            rest["role"] = _SHAREGPT_ROLES[role]
        content = rest.pop(key, None)
        if content is None:
            raise MalformedError(f"{place}.{key}", "is null" if key in turn else "is missing")
        if isinstance(content, list):
            for index, part in enumerate(content):
                match part:
                    case {"type": "text", "text": str()}:
                        continue
                    case {"type": kind}:
                        problem = f"is a part of the type {kind!r}, and only text is trained on"
                    case _:
                        problem = "must be a part with type and text"
                raise MalformedError(f"{place}.{key}[{index}]", problem)
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise MalformedError(f"{place}.{key}", "must be a text or a list of parts")
        for name in rest.keys() - {"role"}:
            if rest[name] and not _BOOKKEEPING.fullmatch(name.casefold()):
                raise MalformedError(f"{place}.{name}", f"is unknown; {suggestion(name, Message.model_fields)}")
        if "role" not in rest:
            raise MalformedError(f"{place}.role", "is missing")
        messages.append({"role": rest["role"], "content": content})
    return messages


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def _conversation_field(row: Mapping[str, Any]) -> str | None:
    return next((name for name in CONVERSATIONS if _is_conversation(row.get(name))), None)


def _without(row: Fields, names: Iterable[str]) -> Fields:
    left_out = set(names)
    return {name: value for name, value in row.items() if name not in left_out}
