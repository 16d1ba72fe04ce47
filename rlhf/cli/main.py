"""The program ``rlhf``: read the command line, call a command, turn errors into messages and an exit status.

Imports neither torch nor Ray, so that ``--help`` and ``plan`` answer in well under a second.
"""

import errno
import io
import json
import os
import platform
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf.cli.comparing import compare
from rlhf.cli.dashboard import dashboard
from rlhf.cli.demo import demo
from rlhf.cli.history import report, samples, watch
from rlhf.cli.human_data import annotate, data
from rlhf.cli.init import DEFAULTS, MACHINES, init
from rlhf.cli.manual import SUMMARY, manual
from rlhf.cli.results import diff, explain, export, gc, import_, leaderboard, lineage, plan_, status, verify
from rlhf.cli.run import (
    DEFAULT_CONFIG,
    DEMO,
    QUICKSTART,
    Parser,
    Request,
    command_line,
    default_config,
    run,
    single_name,
)
from rlhf.cli.setup import config, doctor
from rlhf.cli.talking import chat, generate
from rlhf.config.base import suggestion
from rlhf.errors import DiskFullError, InterruptedRunError, RequestError, RlhfError, is_no_room
from rlhf.store import GRACE_SECONDS
from rlhf.terminal import print_error


def completion(request: Request) -> None:
    """Print the completion of the command line for a shell: rlhf completion bash|zsh|fish."""
    import shtab

    shell = single_name(request, f"shell of {', '.join(SHELLS)}")
    if shell not in SHELLS:
        raise RequestError(f"there is no completion for {shell!r}", "command line", f"rlhf completion {SHELLS[0]}")
    whole = Parser(prog="rlhf")
    whole.add_argument("--version", **_flag("print the version"))
    whole.add_argument("--man", **_flag("print the manual page"))
    commands = whole.add_subparsers()
    for name, command in COMMANDS.items():
        parser = complete_parser(commands.add_parser(name, help=(command.__doc__ or "").splitlines()[0]), name)
        for action in parser._actions:  # pyright: ignore[reportPrivateUsage] - shtab reads them too
            if action.dest == "words":
                action.choices = SHELLS if name == "completion" else list(request.known)
            if action.dest == "for_":
                action.choices = MACHINES
            if action.dest in ("config", "out", "save", "file", "data"):
                action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue] - the place that shtab reads
    print(shtab.complete(whole, shell))


COMMANDS: dict[str, Callable[[Request], int | None]] = {
    command.__name__.rstrip("_"): command
    for command in (
        *(demo, init, run, watch, samples, report, dashboard, plan_, status, explain, lineage, diff),
        *(leaderboard, verify, gc, import_, export, chat, generate, compare, config, doctor, data, annotate),
        completion,
    )
}
WITH_JSON = (
    *("plan", "status", "samples", "explain", "lineage", "diff", "leaderboard", "verify", "gc", "doctor", "compare"),
)


WORDS = {
    "demo": "settings as section.field=value",
    "init": "the file to write (default: rlhf.yaml)",
    "completion": "bash, zsh or fish",
}
"""What the words of a command are, where they are neither stages nor settings."""
SHELLS = ("bash", "zsh", "fish")


def _flag(explanation: str) -> dict[str, Any]:
    return {"action": "store_true", "help": explanation}


def _value(explanation: str, default: str | float | None = None, **settings: str) -> dict[str, Any]:
    return {"help": explanation, "default": default, "type": str if default is None else type(default), **settings}


def _sampling(longest: int) -> dict[str, dict[str, Any]]:
    return {
        "--temperature": _value("0 is greedy (default: 0.8)", 0.8),
        "--max-new-tokens": _value(f"longest answer, in tokens (default: {longest})", longest),
        "--seed": _value("seed of the sampling (default: 0)", 0),
    }


def _prompts(default: str) -> dict[str, dict[str, Any]]:
    return {
        "--prompt": {"action": "append", "help": f"a prompt; may be repeated (default: {default})"},
        "--file": _value("prompts: lines of a text, or records where the name ends in .jsonl, .json or .parquet"),
    }


OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "init": {
        "--data": _value(
            f"a folder with demonstrations.jsonl, comparisons.jsonl, prompts.jsonl (default: {DEFAULTS['data']})",
            metavar="DIR",
        ),
        "--model": _value(
            f"a model's folder, NAME@COMMIT of the hub, smollm2-135m or scratch (default: {DEFAULTS['model']})"
        ),
        "--for": _value(f"cpu, gpu or cluster (default: {DEFAULTS['for']})", metavar="MACHINE", dest="for_"),
        "--yes": _flag("take the defaults of what is not given, without asking"),
        "--force": _flag("replace a file that is there"),
    },
    "report": {
        "--out": _value("the page's file (default: reports/<pipeline>.html in the store)", metavar="FILE"),
    },
    "samples": {
        "--iteration": {"type": int, "help": "of this iteration of ppo, grpo or rloo (default: the last)"},
        "--worst": _flag("the lowest scores of all iterations, or of the one given"),
        "--best": _flag("the highest scores of all iterations, or of the one given"),
        "--prompt": _value("of prompts that contain a text, through all iterations", metavar="TEXT"),
    },
    "verify": {"--repair": _flag("move damaged files to quarantine")},
    "gc": {
        "--dry-run": _flag("print what would be removed, and remove nothing"),
        "--grace": _value(
            "keep what was needed or written in the last hours (default: 336, two weeks)",
            GRACE_SECONDS / 3600,
            metavar="HOURS",
        ),
    },
    "import": {
        "--as": _value("the stage whose result the model is (default: sft)", "sft", metavar="STAGE", dest="as_"),
        "--forget": _flag("undo the import of a stage"),
    },
    "export": {
        "--merge": _flag("fold an adapter into the weights, in fp32; else it stays beside its base"),
        "--gguf": _flag("write model.gguf too, by llama.cpp's convert_hf_to_gguf.py"),
    },
    "chat": {"--score": _flag("show each answer's score by the pipeline's rewards"), **_sampling(256)},
    "generate": {**_prompts("the lines of standard input"), **_sampling(48)},
    "compare": {
        **_prompts("the held-out prompts of the pipeline"),
        **_sampling(48),
        "--by": _value("person, reward or judge (default: person on a terminal, else reward)"),
        "--blind": _flag("hide the policies' names from the person, and shuffle their answers"),
        "--save": _value("append the answers with the verdicts, as data.comparisons reads them", metavar="FILE.jsonl"),
    },
    "doctor": {"--cluster": _flag("check every node of the Ray cluster, and what is between them, instead")},
    "config": {
        "--fields": _flag("explain every setting instead"),
        "--markdown": _flag("with --fields: as tables in Markdown"),
        "--schema": _flag("print the JSON schema of pipeline files, for editors, instead"),
    },
    "data": {
        "--kind": _value(
            "demonstrations, comparisons, prompts or judge (default: the kind that has the fields of the first row)"
        ),
        "--from": _value(
            "the tool or data set that the file comes from: argilla, label-studio, helpsteer, shp, oasst, "
            "ultrafeedback or ultrafeedback-binarized (default: recognised by the first record)",
            metavar="TOOL",
            dest="from_",
        ),
        "--prompt": _value("the field with the prompt (default: recognised by its name)", metavar="FIELD"),
        "--responses": _value(
            "the fields with the responses (default: recognised by their names)", metavar="FIELD,FIELD"
        ),
        "--question": _value("take only answers to these questions (default: all that compare)", metavar="NAME,NAME"),
        "--groups": _value("the order of groups that responses were put in", metavar="BEST,WORSE"),
    },
    "annotate": {
        "--annotator": _value("whose page to open (default: the page asks)", metavar="NAME"),
        "--port": _value("0 takes a free port (default: 8000)", 8000),
        "--host": _value(
            "an address that others reach makes the page's address secret (default: 127.0.0.1)", "127.0.0.1"
        ),
        "--export-only": _flag("write OUT from the answers that are there"),
    },
}


def parser_of(command: str) -> Parser:
    """Return the parser of a command."""
    return complete_parser(Parser(prog=f"rlhf {command}", description=COMMANDS[command].__doc__), command)


def complete_parser(parser: Parser, command: str) -> Parser:
    """Give a parser the arguments of a command; return it."""
    words = "stages or folders, and settings as section.field=value"
    parser.add_argument("words", nargs="*", metavar="WORD", help=WORDS.get(command, words))
    if command == "demo":
        parser.set_defaults(config=DEMO)
    else:
        default = f"the pipeline file (default: {DEFAULT_CONFIG}, or else {QUICKSTART})"
        meant = DEFAULT_CONFIG if command == "init" else default_config()
        parser.add_argument("--config", type=Path, default=meant, metavar="FILE", help=default)
    parser.add_argument("--debug", **_flag("show the traceback of an error"))
    if command in WITH_JSON:
        parser.add_argument("--json", **_flag("print one JSON document on standard output"))
    for name, settings in OPTIONS.get(command, {}).items():
        parser.add_argument(name, **settings)
    parser.set_defaults(command=command, json=False)
    return parser


def usage() -> str:
    """Return the text of ``rlhf --help``."""
    width = max(map(len, COMMANDS))
    commands = [f"  {name:<{width}}  {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return (
        "usage: rlhf COMMAND [STAGE ...] [section.field=value ...] [--config FILE]\n       rlhf --version | --man\n\n"
        f"{SUMMARY.capitalize()}.\n\n"
        + "\n".join(commands)
        + "\n\nrlhf COMMAND --help explains a command; rlhf config --fields every setting."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    _prepare_output()
    try:
        status = _dispatch(words)
        sys.stdout.flush()
    except RlhfError as error:
        return _report(error, words)
    except KeyboardInterrupt:
        return _report(InterruptedRunError("interrupted"), words)
    except BrokenPipeError:
        # The reader, `head` perhaps, has ended. Python would flush once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:  # noqa: BLE001 - the traceback is one option away
        if (known := _of_the_environment(error)) is not None:
            return _report(known, words)
        what = f"unforeseen {type(error).__name__}: {error}"
        return _report(RlhfError(what, "rlhf itself", shlex.join(["rlhf", *words, "--debug"])), words)
    return status


def _prepare_output() -> None:
    """Make printing safe when streams are closed or lack characters, and when COLUMNS or LINES are no valid sizes."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Takes the lowest free number: the next file to be opened would else be taken for the stream.
            os.open(os.devnull, os.O_RDWR)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - open until the end
        elif isinstance(stream, io.TextIOWrapper) and mode == "w":
            stream.reconfigure(errors="replace")
    for name, least in (("COLUMNS", 20), ("LINES", 2)):  # below, no table is readable: the terminal is asked instead
        value = os.environ.get(name, "")
        if not (value.isdecimal() and int(value) >= least):
            os.environ.pop(name, None)


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(f"rlhf-pipeline {version('rlhf-pipeline')}, Python {platform.python_version()}")
        return 0
    if words[0] == "--man":
        parsers = {name: parser_of(name) for name in COMMANDS}
        print(manual(parsers, version("rlhf-pipeline")), end="")
        return 0
    if words[0] not in COMMANDS:
        raise RequestError(
            f"there is no command {words[0]!r}", "command line", suggestion(words[0], COMMANDS) or "rlhf --help"
        )
    request = Request(parser_of(words[0]).parse_intermixed_args(words[1:]))
    try:
        return COMMANDS[words[0]](request) or 0
    except RlhfError as error:
        if (following := error.next_command) is None:
            raise
        # The library names the next command; stages, settings and pipeline file of this call are known here alone.
        repeated = following.command == words[0] and not following.names
        again = command_line(request, following.command, *(request.names if repeated else following.names))
        then = f", {following.then}" if following.then else ""
        raise type(error)(error.what, error.where, again + then) from error
    finally:
        request.print_notices()


def _of_the_environment(error: Exception) -> RlhfError | None:
    """Return an error for the user where a Python error is due to the environment, else None."""
    if isinstance(error, OSError) and is_no_room(error):
        return DiskFullError(
            "there is no room left to write", str(error.filename or "standard output"), "free some space"
        )
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib's, for a path that begins with ~
        return RequestError(
            "a path begins with ~, and there is no such home folder",
            f"HOME={os.environ.get('HOME', '')}",
            "set HOME, or write paths without ~",
        )
    if isinstance(error, FileNotFoundError):
        try:
            Path.cwd().stat()
        except FileNotFoundError:
            return RequestError("the working folder was deleted", "this process", "change to a folder that exists")
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        what = f"a file or folder cannot be used: {error.strerror}"
        return RequestError(what, os.fsdecode(error.filename), "check the path and its permissions, or name another")
    if isinstance(error, RuntimeError) and getattr(error.__context__, "errno", None) == errno.ELOOP:  # pathlib's
        assert isinstance(error.__context__, OSError)
        return _of_the_environment(error.__context__)
    return None


def _report(error: RlhfError, words: Sequence[str]) -> int:
    if "--debug" in words:
        traceback.print_exc()
    document = {"error": {"what": error.what, "where": error.where, "next": error.next_step}}
    with suppress(OSError):  # without any writable stream, the exit status alone reports the error
        if "--json" in words:
            with suppress(OSError):
                print(json.dumps(document), flush=True)
                return error.exit_status
        print_error(Console(stderr=True, highlight=False), error)
    return error.exit_status
