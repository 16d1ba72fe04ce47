"""From a record to token ids: the one reading of prompts and responses that all stages share.

A response is what a policy would emit after its prompt: the ids of its text, then EOS, which everywhere means the token
that closes a turn (:mod:`rlhf.models.templates`). A text never becomes a control token: ``</s>`` in a text is read as
its letters. ``place`` is the file and row of a record, for errors.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from rlhf.errors import PreflightError
from rlhf.models import safe_loading, templates
from rlhf.models.templates import Tokenizer

Prompt = str | Sequence[Mapping[str, Any]]


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a decoder's folder, ready for reading records.

    EOS is the token with which the chat template closes a turn, whatever EOS token the folder names; the pad token is
    another token; and the date that the template prints is fixed.

    Raises:
        PreflightError: there is no EOS token, or no token to pad with; or as :func:`rlhf.models.templates.prepare`.
    """
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, **safe_loading.TOKENIZER)
    if tokenizer.chat_template is not None:
        templates.prepare(tokenizer, str(folder))
    file, eos = str(folder / "tokenizer_config.json"), tokenizer.eos_token_id
    if eos is None:
        raise PreflightError(
            "the tokenizer has no EOS token, so no response could ever end",
            file,
            "set eos_token in tokenizer_config.json",
        )
    if tokenizer.pad_token_id in (None, eos):
        # Padding equal to EOS would hide the EOS that ends a response, which is what a reward model scores.
        tokens = (*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values()))
        spare = [token for token in tokens if tokenizer.convert_tokens_to_ids(token) not in (eos, None)]
        spare = [token for token in spare if token != tokenizer.bos_token]
        if not spare:
            raise PreflightError(
                "the tokenizer has no pad token that differs from EOS, and no spare special token to use as one",
                file,
                "add a pad_token to tokenizer_config.json",
            )
        tokenizer.pad_token = spare[0]
    return tokenizer


def load_encoder_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of an encoder's folder, which needs no EOS token: nothing is generated.

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
    # No text becomes a control token.
    tokenizer.backend_tokenizer.encode_special_tokens = True
    # Texts are cut and padded here, whatever tokenizer.json says of lengths.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def check_same_tokens(reward: Path, policy: Path, stage: str) -> None:
    """Refuse, by a PreflightError, to make a value model of a reward model whose vocabulary is not the policy's."""
    tokenizers = [AutoTokenizer.from_pretrained(folder, **safe_loading.TOKENIZER) for folder in (reward, policy)]
    if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise PreflightError(
            "the reward model and the policy have different tokenizers, "
            "so the value model cannot start from the reward model",
            f"{stage}.value_init",
            f"{stage}.value_init=policy",
        )


def as_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Return a prompt as a list of chat messages; a string is one message of the user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]


def plain_text(prompt: Prompt) -> str:
    """Return a prompt or completion as text, for tokenizers without a chat template."""
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt, place: str = "the prompt") -> list[int]:
    """Return the ids that a response to the prompt follows: through the chat template where there is one.

    Raises:
        RecordError: as :func:`rlhf.models.templates.conversation_ids`.
    """
    if tokenizer.chat_template is None:
        return [*text_start(tokenizer), *_text_ids(tokenizer, plain_text(prompt))]
    return templates.conversation_ids(tokenizer, as_messages(prompt), place)


def response_ids(tokenizer: Tokenizer, response: str) -> list[int]:
    """Return the ids that a policy emits for the response, the EOS at its end included."""
    return [*_text_ids(tokenizer, response, response_prefix(tokenizer)), tokenizer.eos_token_id]


def response_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return a response's text, without the EOS that ends it; other control tokens appear by their names."""
    text_ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    prefix = response_prefix(tokenizer)
    prefixed = [*_split_ids(tokenizer, prefix), *text_ids]
    text = tokenizer.decode(prefixed, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.removeprefix(prefix)


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return what each token adds to a response's text; nothing for EOS, and for all but the last of a character's."""
    added: list[str] = []
    # A token is decoded behind those of the piece before it, on which its spaces may depend.
    start = done = 0
    for end in range(1, len(ids) + 1):
        before, text = (response_text(tokenizer, ids[start:place]) for place in (done, end))
        # Bytes of a character that is not whole yet decode to replacement characters.
        whole = not text.endswith("\ufffd") or end == len(ids)
        added.append(text[len(before) :] if whole else "")
        if whole:
            start, done = done, end
    return added


@templates.cached
def response_prefix(tokenizer: Tokenizer) -> str:
    """Return the text that a response is tokenised behind: a line break, or none.

    SentencePiece's tokenizers put a space before a text. They put none behind a line break, with which some generation
    prompts end.
    """
    line_break = _split_ids(tokenizer, "\n")
    if tokenizer.chat_template is None or _split_ids(tokenizer, "\na") == [*line_break, *_split_ids(tokenizer, "a")]:
        return ""
    opened = tokenizer.apply_chat_template(as_messages("a"), add_generation_prompt=True, return_dict=True)["input_ids"]
    # Phi 3's own tokenizer swallows the line break behind <|assistant|>.
    return "\n" if opened[-1] == line_break[-1] else ""


def _text_ids(tokenizer: Tokenizer, text: str, prefix: str = "") -> list[int]:
    """Return a text's ids behind ``prefix``, none of which is a control token's."""
    control = templates.control_ids(tokenizer)
    ids = _joined_ids(tokenizer, [text], prefix)
    if not control.isdisjoint(ids):
        ids = _joined_ids(tokenizer, templates.without_control_tokens(tokenizer, text), prefix)
    if not control.isdisjoint(ids):  # a normaliser may make a control token of full-width letters
        ids = _joined_ids(tokenizer, list(text), prefix)
    return ids


def _joined_ids(tokenizer: Tokenizer, pieces: Sequence[str], prefix: str) -> list[int]:
    """Return the ids of a text's pieces, each tokenised by itself, the first behind ``prefix``."""
    ids: list[int] = []
    for piece in pieces:
        before = _split_ids(tokenizer, prefix) if prefix else []
        both = _split_ids(tokenizer, prefix + piece)
        ids += both[len(before) :] if both[: len(before)] == before else _split_ids(tokenizer, piece)
        prefix = "\n"  # behind which SentencePiece's tokenizers put no space
    return ids


def _split_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return a text's ids without BOS, where special tokens are split as any other letters are."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def scored_ids(
    tokenizer: Tokenizer, prompt: Prompt | None, response: str, max_length: int, place: str = "the prompt"
) -> list[int]:
    """Return what a reward model reads: prompt and response as the policy reads and emits them, cut at the start.

    prompt  None for the response alone, behind the ids that the tokenizer begins every text with
    """
    before = text_start(tokenizer) if prompt is None else prompt_ids(tokenizer, prompt, place)
    return [*before, *response_ids(tokenizer, response)][-max_length:]


@templates.cached
def text_start(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that the tokenizer begins every text with: a BOS token, or none."""
    # An empty text does not do: its only token may be the token that every text ends with. A tokenizer of few letters
    # may not know "a".
    known = next(known for known in ("a", *tokenizer.get_vocab()) if _text_ids(tokenizer, known))
    ids, text = list(tokenizer(known)["input_ids"]), _text_ids(tokenizer, known)
    return ids[: next(start for start in range(len(ids)) if ids[start : start + len(text)] == text)]


def encoded(tokenizer: Tokenizer, prompt: Prompt | None, response: str, max_length: int) -> tuple[list[int], list[int]]:
    """Return the ids and token types of a text or a pair of texts, in the form that an encoder's tokenizer gives them.

    prompt  None for the response alone; messages are read as plain text, since encoders have no roles

    Special tokens stay. A text that is too long is cut at its start, the prompt before the response.
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
    """Return rows of ids as ``[batch, time]`` with their attention mask, padded on the ``left`` or ``right``."""
    width = max(1, *(len(row) for row in rows))
    ids = torch.full((len(rows), width), value)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, columns] = torch.tensor(row, dtype=torch.long)
        mask[index, columns] = 1
    return ids, mask


def positions(attention_mask: Tensor) -> Tensor:
    """Return position ids counted over real tokens, so that left padding moves nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
