"""The program ``rlhf``: it reads the command line, calls a command, and turns errors into messages and exit status.

Nothing heavy is imported here: ``--help`` and ``plan`` answer in well under a second.
"""

import io
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from rlhf.cli.human_data import annotate, data
from rlhf.cli.results import diff, explain, export, gc, generate, import_, leaderboard, lineage, plan_, status, verify
from rlhf.cli.run import DEFAULT_CONFIG, Parser, Request, command_line, run
from rlhf.cli.setup import config, doctor
from rlhf.config.base import suggestion
from rlhf.errors import DiskFullError, InterruptedRunError, RequestError, RlhfError, is_no_room
from rlhf.store import GRACE_SECONDS
from rlhf.terminal import (
    print_error,
)

_LEAST_COLUMNS = 20
"""Of a narrower COLUMNS the terminal is asked instead: no table can be read there."""


COMMANDS: dict[str, Callable[[Request], int | None]] = {
    "run": run,
    "plan": plan_,
    "status": status,
    "explain": explain,
    "lineage": lineage,
    "diff": diff,
    "leaderboard": leaderboard,
    "verify": verify,
    "gc": gc,
    "import": import_,
    "export": export,
    "generate": generate,
    "config": config,
    "doctor": doctor,
    "data": data,
    "annotate": annotate,
}


WITH_JSON = ("plan", "status", "explain", "lineage", "diff", "leaderboard", "verify", "gc", "doctor")


def parser_of(command: str) -> Parser:
    """The parser of one command."""
    parser = Parser(prog=f"rlhf {command}", description=COMMANDS[command].__doc__)
    words = "stages or folders, and settings as section.field=value"
    parser.add_argument("words", nargs="*", metavar="WORD", help=words)
    parser.add_argument(
        "--config", type=Path, default=DEFAULT_CONFIG, help=f"the pipeline file (default: {DEFAULT_CONFIG})"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if command in WITH_JSON:
        parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    match command:
        case "verify":
            parser.add_argument("--repair", action="store_true", help="move what is damaged to quarantine")
        case "gc":
            parser.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
            parser.add_argument(
                "--grace",
                type=float,
                default=GRACE_SECONDS / 3600,
                metavar="HOURS",
                help="keep what was needed or written in the last hours (default: 336, two weeks)",
            )
        case "import":
            parser.add_argument("--as", dest="as_", metavar="STAGE", default="sft", help="the stage whose result it is")
            parser.add_argument("--forget", action="store_true", help="undo the import of a stage")
        case "export":
            parser.add_argument("--adapter", action="store_true", help="keep an adapter beside its base, not folded in")
        case "generate":
            parser.add_argument(
                "--prompt", action="append", help="a prompt; may be given again; else lines of standard input"
            )
            parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
            parser.add_argument("--max-new-tokens", type=int, default=48, help="longest answer (default: 48)")
            parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
        case "config":
            parser.add_argument("--fields", action="store_true", help="explain every setting instead")
        case "data":
            kinds = "demonstrations, comparisons, prompts or judge"
            parser.add_argument("--kind", help=f"what the rows are: {kinds} (default: told by the first row's fields)")
            tools = "argilla, label-studio, helpsteer, shp, oasst, ultrafeedback or ultrafeedback-binarized"
            parser.add_argument(
                "--from",
                dest="from_",
                metavar="TOOL",
                help=f"whose the file to convert is: {tools} (default: told by the first record)",
            )
            parser.add_argument("--prompt", metavar="FIELD", help="the field with the prompt (default: told by names)")
            parser.add_argument(
                "--responses", metavar="FIELD,FIELD", help="the fields with the responses (default: told by names)"
            )
            parser.add_argument(
                "--question", metavar="NAME,NAME", help="take these questions' answers only (default: all that compare)"
            )
            parser.add_argument("--groups", metavar="BEST,WORSE", help="the order of groups that responses were put in")
        case "annotate":
            parser.add_argument("--annotator", metavar="NAME", help="whose page to open (default: it asks)")
            parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
            parser.add_argument(
                "--host",
                default="127.0.0.1",
                help="an address that others reach makes a secret one (default: 127.0.0.1)",
            )
            parser.add_argument("--export-only", action="store_true", help="write OUT from the answers that are there")
        case _:
            pass
    parser.set_defaults(command=command, json=False)
    return parser


def usage() -> str:
    """What ``rlhf --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rlhf COMMAND [STAGE ...] [section.field=value ...] [--config FILE]",
            "",
            "From a language model, demonstrations and human rankings to an aligned model.",
            "",
            *lines,
            "",
            "rlhf COMMAND --help explains a command; rlhf config --fields every setting.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit status."""
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
        # The reader, `head` perhaps, has what it wanted. Python would try once more to flush at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:  # noqa: BLE001 - the traceback is one option away
        if (known := _of_the_environment(error)) is not None:
            return _report(known, words)
        what = f"unforeseen {type(error).__name__}: {error}"
        return _report(RlhfError(what, "rlhf itself", shlex.join(["rlhf", *words, "--debug"])), words)
    return status


def _prepare_output() -> None:
    """Make printing safe where streams are closed or lack characters, and where COLUMNS or LINES are no sizes."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(
                os.devnull, os.O_RDWR
            )  # the lowest free number, or the next file opened would be taken for the stream
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - for good
        elif isinstance(stream, io.TextIOWrapper) and mode == "w":
            stream.reconfigure(errors="replace")
    for name, least in (("COLUMNS", _LEAST_COLUMNS), ("LINES", 2)):
        given = os.environ.get(name, "")
        if not (given.isdecimal() and int(given) >= least):
            os.environ.pop(name, None)


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
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
        # The library knows what to run next, and only this program for which stages of which pipeline.
        repeated = following.command == words[0] and not following.names
        again = command_line(request, following.command, *(request.names if repeated else following.names))
        then = f", {following.then}" if following.then else ""
        raise type(error)(error.what, error.where, again + then) from error
    finally:
        request.tell_notices()


def _of_the_environment(error: Exception) -> RlhfError | None:
    """Say what is wrong around the program, where an error of Python's tells that and not of a mistake of ours."""
    if isinstance(error, OSError) and is_no_room(error):
        return DiskFullError(
            "there is no room left to write", str(error.filename or "standard output"), "free some space"
        )
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # of pathlib, for a path that begins with ~
        return RequestError(
            "a path begins with ~, and there is no such home folder",
            f"HOME={os.environ.get('HOME', '')}",
            "set HOME, or write paths without ~",
        )
    if isinstance(error, FileNotFoundError) and not _working_folder_exists():
        return RequestError("the working folder was deleted", "this process", "change to a folder that exists")
    return None


def _working_folder_exists() -> bool:
    try:
        return bool(os.stat(os.getcwd()))  # noqa: PTH109, PTH116
    except FileNotFoundError:
        return False


def _report(error: RlhfError, words: Sequence[str]) -> int:
    if "--debug" in words:
        traceback.print_exc()
    with suppress(OSError):  # where nothing can be written, the status alone can tell
        if "--json" in words:
            with suppress(OSError):
                print(
                    json.dumps({"error": {"what": error.what, "where": error.where, "next": error.next_step}}),
                    flush=True,
                )
                return error.exit_status
        print_error(Console(stderr=True, highlight=False), error)
    return error.exit_status
