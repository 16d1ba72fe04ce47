"""The manual page of the program, in the macros of man(7), from the parsers that read the command line."""

import argparse
import re
from collections.abc import Iterator, Mapping

SUMMARY = "from a language model, demonstrations and human rankings to an aligned model"

_EVERYWHERE = ("help", "config", "debug", "json", "words")
"""Arguments that are explained once, under OPTIONS."""

_EXIT_STATUS = {
    0: "Done.",
    1: "A stage failed, or the store is damaged.",
    2: "The request cannot be done as it is written.",
    75: "The request is right, and its environment is not ready: try again later.",
    130: "Interrupted.",
}


def manual(parsers: Mapping[str, argparse.ArgumentParser], version: str) -> str:
    """Return the page, in roff; ``parsers`` maps each command to its parser."""
    return "\n".join(_lines(parsers, version)) + "\n"


def _lines(parsers: Mapping[str, argparse.ArgumentParser], version: str) -> Iterator[str]:
    yield f'.TH RLHF 1 "" "rlhf-pipeline {version}"'
    yield from (".SH NAME", f"rlhf \\- {SUMMARY}")
    yield from (
        ".SH SYNOPSIS",
        "\\fBrlhf\\fR \\fICOMMAND\\fR [\\fIWORD\\fR ...] [\\fIsection.field=value\\fR ...] [options]",
    )
    yield from (".br", "\\fBrlhf\\fR \\fB\\-\\-version\\fR | \\fB\\-\\-man\\fR")
    yield ".SH COMMANDS"
    for name, parser in parsers.items():
        yield from (f".SS rlhf {name}", _escaped(parser.description or ""))
        for action in parser._actions:  # pyright: ignore[reportPrivateUsage] - argparse has no other list of them
            if action.dest not in _EVERYWHERE:
                yield from _item(action)
    yield ".SH OPTIONS"
    yield from (".TP", "\\fIWORD\\fR", "Stages or folders, where a command says nothing else.")
    yield from (".TP", "\\fIsection.field=value\\fR", "A setting in place of the pipeline file's.")
    shared = {action.dest: action for parser in parsers.values() for action in parser._actions}  # pyright: ignore[reportPrivateUsage]
    for dest in ("config", "debug", "json", "help"):
        yield from _item(shared[dest])
    takers = [name for name, parser in parsers.items() if any(action.dest == "json" for action in parser._actions)]  # pyright: ignore[reportPrivateUsage]
    yield from (".PP", f"\\fB\\-\\-json\\fR is for {', '.join(takers)}.")
    yield ".SH EXIT STATUS"
    for status, meaning in _EXIT_STATUS.items():
        yield from (".TP", f"\\fB{status}\\fR", meaning)


def _item(action: argparse.Action) -> Iterator[str]:
    """Yield an option, and its explanation indented below it."""
    value = "" if action.nargs == 0 else f" \\fI{_escaped(action.metavar or action.dest.rstrip('_').upper())}\\fR"
    yield ".TP"
    yield ", ".join(f"\\fB{_escaped(name)}\\fR" for name in action.option_strings) + value
    yield _escaped(action.help or "")


def _escaped(text: object) -> str:
    """Return a text as roff prints it: one line, with no macro or escape in it."""
    line = " ".join(str(text).split()).replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^(?=[.'])", r"\\&", line)
