"""Rows in the forms of public data sets, read as records where their meaning is certain.

A form is certain where prompt and answer follow from the row alone: in a conversation whose last message is the
assistant's, that message is the answer and all before it the prompt; of two conversations that differ in their last
message, that is what was compared. Whatever is not certain is refused with its field.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from rlhf.config.base import suggestion
from rlhf.data.records import (
    ComparisonSet,
    Demonstration,
    JudgeRating,
    Message,
    PreferencePair,
    Prompt,
    R,
    Reason,
    parse_record,
    without_nulls,
)

Fields = dict[str, Any]
Messages = list[dict[str, Any]]

CONVERSATIONS = ("messages", "conversations", "conversation")
INSTRUCTIONS = ("instruction", "question", "prompt")
ADDITIONS = ("input", "context")
"""What an instruction is about; of a question nobody can say where it belongs."""
ANSWERS = ("output", "response", "answer")
SYSTEMS = ("system", "system_prompt", "system_message")

_OF_THE_PROMPT = re.compile(
    r"(audio|document|image|video|choice|option|function)s?|context|history|input|passage|system(_prompt|_message)?"
)
"""Fields on which an answer may rest: where a form does not say where they belong, rows that fill them are refused."""
_PRAISE = re.compile(r"(is_)?(accepted|approved|correct|harmless|safe)|labels?|mask|train|weight")
_BLAME = re.compile(r"(is_)?(deleted|harmful|rejected|toxic|unsafe)")
"""Fields that may say that an answer is not to be imitated, the first where they are false, the others where true."""

_WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*(["'])(role|content|from|value)\1\s*:""")
"""How messages begin that were written into a text, by JSON or by Python."""

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
}

_BOOKKEEPING = re.compile(
    r"(.*[_-])?(id|ids|idx|index|score|scores|source|url|license|timestamp)|dataset|category|categories|task|tags?|topic|"
    r"lang|language|split|created|created_at|updated_at|date|meta|metadata|(score|rating)[_-].*|__index_level_\d+__"
)
"""Columns beside a record that public data sets carry, and that say nothing that is trained on."""

MISSPELT = 0.82
"""How alike, as difflib measures it, an unknown field and ours are where one is meant: ``promt`` and ``prompt``, while
``prompt_id`` is 0.80."""


class _RefusedError(Exception):
    """A row's meaning is not certain."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.reason = Reason(field, problem)


class _Form(NamedTuple):
    """A row in the fields of our records."""

    row: Fields
    rest: Fields
    """Fields that are not part of the form."""
    name: str
    """As what the row was read; empty for our own form."""


class FormReader:
    """Records out of rows of any form, and the line that says as what they were read."""

    def __init__(self) -> None:
        self._forms = Counter[str]()
        self._unread: dict[str, None] = {}

    def parse(self, value: Any, model: type[R]) -> R | list[Reason]:
        """Make a record of a row's value, or give the reasons why it is none."""
        if not isinstance(value, Mapping):
            return parse_record(value, model)
        try:
            form = _form_of(without_nulls(value), model)
        except _RefusedError as error:
            return [error.reason]
        own = _own_fields(form.row, model)
        if form.name and (name := _first_meant(form.rest, model)):
            return [Reason(name, "is not part of the form, and what is asked or learned may rest on it")]
        unread = [name for name in form.rest if _is_beside(name, own, is_foreign=bool(form.name))]
        kept = {name: content for name, content in form.rest.items() if name not in unread}
        record = parse_record(form.row | kept, model)
        if not isinstance(record, list):
            self._forms[form.name] += 1
            self._unread.update(dict.fromkeys(unread))
        return record

    def line(self) -> str:
        """Say as what rows were read that are not in our own form, and which of their fields were not."""
        parts = [f"{count} rows read as {name}" for name, count in self._forms.items() if name]
        if self._unread:
            parts.append(f"fields not read: {', '.join(self._unread)}")
        return "; ".join(parts)


def model_of(value: Any) -> type[Demonstration] | type[ComparisonSet] | type[Prompt] | type[JudgeRating]:
    """Return the kind of record that a row's fields tell of; a prompt where they tell of none."""
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
    if row.get("tools"):
        raise _RefusedError("tools", "offers tools, and calls of tools are not trained on yet")
    for name in ("prompt", "completion", "chosen", "rejected"):
        if isinstance(text := row.get(name), str) and _WRITTEN_MESSAGES.match(text):
            raise _RefusedError(name, "holds messages written as a text: write them as a list of objects")
    if issubclass(model, ComparisonSet):
        return _comparison(row)
    if issubclass(model, Demonstration):
        return _demonstration(row)
    return _prompt(row) if issubclass(model, Prompt) else _own(row, model)


def _own_fields(row: Fields, model: type[Any]) -> Iterable[str]:
    return (PreferencePair if issubclass(model, ComparisonSet) and "chosen" in row else model).model_fields


def _is_beside(name: str, own: Iterable[str], *, is_foreign: bool) -> bool:
    """Tell whether a field stands beside a record, rather than being one of ours that is misspelt."""
    plain = name.casefold()
    if _BOOKKEEPING.fullmatch(plain):
        return True
    return is_foreign and all(SequenceMatcher(None, plain, ours).ratio() < MISSPELT for ours in own)


def _first_meant(rest: Fields, model: type[Any]) -> str | None:
    """Return the first field that cannot be left unread; None where all can."""
    for name, content in rest.items():
        plain = name.casefold()
        # Beside an instruction, which was read or is told again by a conversation, an input belongs to it.
        if _OF_THE_PROMPT.fullmatch(plain) and content and not (plain == "input" and "instruction" in rest):
            return name
        if issubclass(model, Demonstration) and (_PRAISE.fullmatch(plain) or (_BLAME.fullmatch(plain) and content)):
            return name
    return None


def _own(row: Fields, model: type[Any]) -> _Form:
    own = {name: value for name, value in row.items() if name in _own_fields(row, model)}
    in_parts = False
    for name in ("prompt", "completion", "chosen", "rejected"):
        if _is_conversation(own.get(name)):
            own[name], some = _messages(own[name], name)
            in_parts |= some
    if isinstance(own.get("responses"), list):
        for number, response in enumerate(own["responses"]):
            if _is_conversation(response):
                messages, some = _messages(response, f"responses[{number}]")
                own["responses"] = [*own["responses"][:number], messages, *own["responses"][number + 1 :]]
                in_parts |= some
    return _Form(own, _without(row, own), "messages with their content in parts" if in_parts else "")


def _demonstration(row: Fields) -> _Form:
    if isinstance(row.get("label"), bool):
        raise _RefusedError("label", "says whether the completion is good, and all demonstrations are imitated alike")
    for key in ("completion", *CONVERSATIONS):
        last = row[key][-1] if _is_conversation(row.get(key)) else {}
        if name := next((name for name in last if _PRAISE.fullmatch(name) and not last[name]), None):
            place = f"{key}[{len(row[key]) - 1}].{name}"
            raise _RefusedError(place, "says that the answer is not to be learned, and it would be")
    if "completion" in row:
        form = _own(row, Demonstration)
        return _several_turns(form) if _is_conversation(form.row["completion"]) else form
    if key := _conversation_field(row):
        messages = _whole_conversation(row, key)
        if (role := messages[-1]["role"]) != "assistant":
            raise _RefusedError(key, f"ends with a message of the role {role!r}, and is to end with 'assistant'")
        _check_prompt(row, messages[:-1], key)
        name = f"conversations in {key!r}: the last message is the completion, all before it the prompt"
        return _Form(
            {"prompt": messages[:-1], "completion": messages[-1]["content"]},
            _without(row, (key, *SYSTEMS, "prompt")),
            name,
        )
    answers = [name for name in ANSWERS if name in row]
    if len(answers) == 1 and (found := _instruction(row)):
        prompt, used = found
        shown = ", ".join(map(repr, (*used, answers[0])))
        name = f"instructions with answers, in {shown}"
        return _Form({"prompt": prompt, "completion": row[answers[0]]}, _without(row, (*used, answers[0])), name)
    return _own(row, Demonstration)


def _several_turns(form: _Form) -> _Form:
    """Let the prompt end before the last message of a completion, which alone is learned."""
    *before, last = form.row["completion"]
    prompt = form.row.get("prompt")
    if not before or last["role"] != "assistant" or not isinstance(prompt, (str, list)):
        return form
    turns = _as_messages(prompt) + before
    name = "completions of several turns: the last message is the completion, all before it belongs to the prompt"
    return form._replace(row=form.row | {"prompt": turns, "completion": [last]}, name=name)


def _prompt(row: Fields) -> _Form:
    if "prompt" in row and not row.keys() & {*SYSTEMS, "history"}:
        form = _own(row, Prompt)
        known = (*CONVERSATIONS, *Demonstration.model_fields, *PreferencePair.model_fields, *ComparisonSet.model_fields)
        others = form.rest.keys() & {*known}
        return form._replace(name="prompts of rows that hold more") if others else form
    if key := _conversation_field(row):
        messages = _whole_conversation(row, key)
        if messages[-1]["role"] == "assistant":
            name = f"prompts of conversations in {key!r}: all before the last message, which is an answer"
            messages = messages[:-1]
        else:
            name = f"prompts in {key!r}"
        return _Form({"prompt": messages}, _without(row, (key, *SYSTEMS)), name)
    if {"chosen", "rejected"} <= row.keys():
        form = _comparison(row)
        return _Form(
            {name: value for name, value in form.row.items() if name == "prompt"},
            form.rest,
            f"prompts of {form.name}",
        )
    if found := _instruction(row):
        prompt, used = found
        return _Form({"prompt": prompt}, _without(row, used), f"prompts in {', '.join(map(repr, used))}")
    return _own(row, Prompt)


def _comparison(row: Fields) -> _Form:
    if not {"chosen", "rejected"} <= row.keys():
        return _own(row, ComparisonSet)
    sides = [row["chosen"], row["rejected"]]
    transcripts = [_transcript(side) for side in sides]
    if all(transcripts):
        found = [turns for turns in transcripts if turns]
        return _compared(row, found, "transcripts of Human and Assistant")
    if all(map(_is_conversation, sides)) and max(map(len, sides)) > 1:
        found = [_messages(row[name], name)[0] for name in ("chosen", "rejected")]
        return _compared(row, found, "pairs of conversations")
    if (found := _instruction(row)) and found[1] != ("prompt",):
        prompt, used = found
        form = _own(row, ComparisonSet)
        name = f"pairs with the prompt in {', '.join(map(repr, used))}"
        return _Form(form.row | {"prompt": prompt}, _without(form.rest, used), name)
    return _own(row, ComparisonSet)


def _compared(row: Fields, sides: Sequence[Messages], name: str) -> _Form:
    """Make a pair of two conversations that differ in their last message at most."""
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        raise _RefusedError("chosen", "and rejected differ before their last messages, so that no prompt is common")
    for field, messages in (("chosen", chosen), ("rejected", rejected)):
        if (role := messages[-1]["role"]) != "assistant":
            raise _RefusedError(field, f"ends with a message of the role {role!r}, and is to end with 'assistant'")
    _check_prompt(row, chosen[:-1], "chosen")
    own = {"prompt": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
    own |= {field: row[field] for field in PreferencePair.model_fields if field in row and field not in own}
    return _Form(own, _without(row, own), f"{name}: their last messages are compared, all before those is the prompt")


def _check_prompt(row: Fields, before: Messages, field: str) -> None:
    """Refuse a row that names a prompt beside a conversation, and the conversation has another."""
    prompt = row.get("prompt")
    if prompt is None:
        return
    if _is_conversation(prompt):
        same = _messages(prompt, "prompt")[0] == [one for one in before if one["role"] != "system"] or (
            _messages(prompt, "prompt")[0] == before
        )
    else:
        texts = [one["content"].strip() for one in before if one["role"] == "user"]
        *turns, last = _transcript(prompt) or [{}]
        same = isinstance(prompt, str) and (prompt.strip() in texts or (turns == before and not last["content"]))
    if not same:
        raise _RefusedError("prompt", f"is not what {field!r} begins with, so which of them is meant is not certain")


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
                raise _RefusedError(f"history[{number}]", "must be two texts, the user's and the assistant's")
            earlier += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return (earlier + _as_messages(text) if earlier else text), used


def _whole_conversation(row: Fields, key: str) -> Messages:
    messages, _ = _messages(row[key], key)
    for name in SYSTEMS:
        system = row.get(name)
        if not isinstance(system, str) or not system.strip():
            continue
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        elif messages[0]["content"].strip() != system.strip():
            raise _RefusedError(name, f"is not what {key!r} begins with, so which of them is meant is not certain")
    return messages


def _transcript(text: Any) -> Messages | None:
    """Split a transcript whose turns begin with Human: and Assistant:; None where a text is none (Bai et al. 2022)."""
    if not isinstance(text, str) or not re.match(r"\s*Human:", text) or "\n\nAssistant:" not in text:
        return None
    _, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[role], "content": content.strip()} for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _messages(turns: Sequence[Mapping[str, Any]], field: str) -> tuple[Messages, bool]:
    """Return messages of role and content, and whether some had their content in parts.

    Raises:
        _RefusedError: a message calls a tool, has a field that is unknown or lacks one, or holds more than text.

    """
    found: Messages = []
    in_parts = False
    for number, turn in enumerate(turns):
        message, place = dict(turn), f"{field}[{number}]"
        for name in ("tool_calls", "function_call"):
            if message.pop(name, None):
                raise _RefusedError(f"{place}.{name}", "calls a tool, and calls of tools are not trained on yet")
        text = "content"
        if "from" in message:
            text, role = "value", message.pop("from")
            if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
                raise _RefusedError(f"{place}.from", f"is {role!r}; known: {', '.join(_SHAREGPT_ROLES)}")
            message["role"] = _SHAREGPT_ROLES[role]
        content = message.pop(text, "")
        if content is None or text not in turn:
            raise _RefusedError(f"{place}.{text}", "is null" if text in turn else "is missing")
        if isinstance(content, list):
            in_parts = True
            content = "".join(_text_of(part, f"{place}.{text}[{index}]") for index, part in enumerate(content))
        if not isinstance(content, str):
            raise _RefusedError(f"{place}.{text}", "must be a text or a list of parts")
        for name in message.keys() - {"role"}:
            if message[name] and not _BOOKKEEPING.fullmatch(name.casefold()):
                raise _RefusedError(f"{place}.{name}", f"is unknown; {suggestion(name, Message.model_fields)}")
        if "role" not in message:
            raise _RefusedError(f"{place}.role", "is missing")
        found.append({"role": message["role"], "content": content})
    return found, in_parts


def _text_of(part: Any, place: str) -> str:
    match part:
        case {"type": "text", "text": str() as text}:
            return text
        case {"type": kind}:
            raise _RefusedError(place, f"is a part of the type {kind!r}, and only text is trained on")
        case _:
            raise _RefusedError(place, "must be a part with type and text")


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def _conversation_field(row: Mapping[str, Any]) -> str | None:
    return next((name for name in CONVERSATIONS if _is_conversation(row.get(name))), None)


def _as_messages(prompt: str | Messages) -> Messages:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _without(row: Fields, names: Iterable[str]) -> Fields:
    left_out = set(names)
    return {name: value for name, value in row.items() if name not in left_out}
