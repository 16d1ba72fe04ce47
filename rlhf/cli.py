"""The program ``rlhf``: it reads the command line, calls the library, and turns errors into messages and exit status.

Nothing heavy is imported here: ``--help`` and ``plan`` answer in well under a second.
"""

import _thread
import argparse
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.text import Text

from rlhf.config.base import Settings
from rlhf.config.fields import describe
from rlhf.config.loading import load_pipeline
from rlhf.config.nearest import suggestion
from rlhf.config.pipeline import (
    NAME_PATTERN,
    ClusterSettings,
    PipelineConfig,
    StoreSettings,
    TrackingSettings,
    resolved,
)
from rlhf.config.yaml_tree import to_yaml
from rlhf.errors import DiskFullError, InterruptedRunError, RequestError, RlhfError, is_no_room
from rlhf.narration import diff_view, explain_view, lineage_view
from rlhf.pipeline import documents
from rlhf.pipeline.plan import Planned, instance_of, plan, result_of
from rlhf.pipeline.stage import stages
from rlhf.pipeline.stop import Stop
from rlhf.store import GRACE_SECONDS, Store
from rlhf.terminal import (
    Display,
    gc_table,
    key_values,
    leaderboard_table,
    plan_table,
    print_error,
    printable,
    printable_lines,
    samples_table,
    usage_line,
)

DEFAULT_CONFIG = Path("configs/quickstart.yaml")
_LEAST_COLUMNS = 20
"""Of a narrower COLUMNS the terminal is asked instead: no table can be read there."""
SECONDS_TO_SAVE = 25.0
"""How long after SIGTERM the ranks may take to save; whoever preempts a machine waits 30 s as a rule."""
SECONDS_TO_STOP = 30.0
"""How long after a signal a run may take to end."""


class Parser(argparse.ArgumentParser):
    """argparse with our errors and exit status."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise RequestError(message, "command line", f"{self.prog} --help")


class Request:
    """A parsed command line with its pipeline and store, loaded when first asked for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out = Console(highlight=False)
        words: Sequence[str] = getattr(arguments, "words", ())
        self.overrides = [word for word in words if "=" in word]
        self.names = [word for word in words if "=" not in word]
        self.known = stages()
        self._config: PipelineConfig | None = None
        self._store: Store | None = None

    @property
    def config(self) -> PipelineConfig:
        """The pipeline file with its overrides."""
        if self._config is None:
            types = {name: stage.settings for name, stage in self.known.items()}
            self._config = load_pipeline(self.arguments.config, self.overrides, types)
        return self._config

    def store(self, *, create: bool = False) -> Store:
        """The pipeline's store."""
        if self._store is None or create:
            notices = self._store.notices if self._store else []
            settings = self.config.store
            self._store = Store.open(settings.uri, create=create, scratch=settings.scratch)
            self._store.notices.extend(notices)
        return self._store

    def tell_notices(self) -> None:
        """Say on standard error what the store found damaged."""
        if self._store is not None:
            for notice in self._store.notices:
                print(printable_lines(notice), file=sys.stderr)

    def planned(self, targets: Sequence[str]) -> dict[str, Planned]:
        """Plan the targets, or where there are none the whole pipeline."""
        return plan(self.config, self.known, self.store(), targets)

    def one(self, name: str) -> Planned:
        """Plan a stage and what it needs, and return the stage."""
        return self.planned([name])[name]

    def answer(self, document: Any, show: Callable[[], None]) -> None:
        """Print one JSON document under ``--json``, or what ``show`` prints."""
        if self.arguments.json:
            _print_exactly(json.dumps(document, indent=2, ensure_ascii=False), lambda: json.dumps(document, indent=2))
        else:
            show()


def _print_exactly(text: str, in_ascii: Callable[[], str]) -> None:
    """Print a document for a program to read, in ASCII where standard output has not all of its characters."""
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = in_ascii()
    print(text)


def run(request: Request) -> None:
    """Bring stages up to date."""
    from rlhf.cluster.session import Session
    from rlhf.pipeline.runner import Runner

    targets = request.names
    names = list(request.planned(targets))
    store = request.store(create=True)
    stop = Stop()

    def interrupted(what: str) -> InterruptedRunError:
        return InterruptedRunError(
            f"{what}; what was committed and the checkpoints stay",
            store.address,
            command_line(request, "run", *targets),
        )

    try:
        with (
            _ended_by_signals(interrupted("interrupted"), stop),
            Session(request.config.cluster) as session,
            Display(request.out, names) as display,
        ):
            planned = Runner(request.config, request.known, store, session, display, stop).run(targets)
    except KeyboardInterrupt as error:
        raise interrupted("interrupted") from error
    except InterruptedRunError as error:
        raise interrupted(error.what) from error
    _summary(request, planned, store)


@contextmanager
def _ended_by_signals(told: RlhfError, stopping: Stop) -> Generator[None]:
    """Inside, SIGINT raises KeyboardInterrupt, and SIGTERM asks to stop, which after a while does the same.

    A second signal, or no end in time, ends the process at once.

    told      what is then printed
    stopping  asked to stop by SIGTERM; where nobody heeds it, the signal is like SIGINT

    Ray's shutdown may wait for ever, and an interrupt that arrives inside it may be lost. Ray's processes end with
    their driver, and whoever comes next takes over a dead one's lease.
    """

    def end(*_: object) -> NoReturn:
        print_error(Console(stderr=True, highlight=False), told)
        os._exit(told.exit_status)

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    # SIGINT itself means by then that somebody is impatient: the alarm is the signal for the end of the time to save.
    timers = (
        threading.Timer(SECONDS_TO_STOP, end),
        threading.Timer(SECONDS_TO_SAVE, _thread.interrupt_main, [signal.SIGALRM]),
    )
    for timer in timers:
        timer.daemon = True

    def stop(number: int, _: object) -> None:
        for signal_ in before:
            signal.signal(signal_, end)
        timers[0].start()
        if number == signal.SIGTERM and stopping.ask():
            timers[1].start()
        else:
            stopping.abort()  # where the exception is lost, as by compiled modules that are being imported: see `lost`
            raise KeyboardInterrupt

    def lost(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            at_lost(unraisable)

    before = {signal_: signal.signal(signal_, stop) for signal_ in (signal.SIGINT, signal.SIGTERM)}
    at_alarm = signal.signal(signal.SIGALRM, interrupt)
    at_lost, sys.unraisablehook = sys.unraisablehook, lost
    try:
        yield
    finally:
        sys.unraisablehook = at_lost
        for timer in timers:
            timer.cancel()
        for signal_, handler in (before | {signal.SIGALRM: at_alarm}).items():
            signal.signal(signal_, handler)


def _near(path: Path) -> Path:
    """The path as one would type it here."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def command_line(request: Request, *words: str) -> str:
    """A command to type next: this program, these words, and the pipeline and settings of this call."""
    program = Path(sys.argv[0]).absolute()
    shown = str(_near(program)) if program.name == "rlhf" and shutil.which("rlhf") is None else "rlhf"
    path: Path = request.arguments.config
    option = [] if path == DEFAULT_CONFIG else ["--config", str(path)]
    return shlex.join([shown, *words, *request.overrides, *option])


def _summary(request: Request, planned: dict[str, Planned], store: Store) -> None:
    """Show samples where there are some, and say where everything is."""
    made = [(one, one.record) for one in planned.values() if one.record is not None]
    for one, record in made:
        if one.stage.kind == "report":
            samples = _samples(store, record.artifact)
            request.out.print()
            request.out.print(samples_table(samples[:5]))
            request.out.print(key_values(record.metrics))
    attempts = {
        one.name: attempt
        for one, record in made
        if one.stage.runs == "workers" and (attempt := store.root / "work" / record.key / record.attempt).is_dir()
    }
    if attempts:
        request.out.print("metrics, logs and W&B files:")
    for name, attempt in attempts.items():
        # Not broken into lines, so that it can be copied whole.
        request.out.print(f"  {name}: {_near(attempt)}", soft_wrap=True, markup=False)
    policies = [one.name for one, _ in made if one.stage.kind == "policy"]
    if policies:
        generate_command = command_line(request, "generate", policies[-1])
        export_command = command_line(request, "export", policies[-1], "DIR")
        request.out.print(f"next: {generate_command} --prompt '…'", soft_wrap=True, markup=False)
        request.out.print(f"      {export_command}", soft_wrap=True, markup=False)


def _samples(store: Store, artifact: str) -> list[dict[str, Any]]:
    # Lines of bytes: as text, what a model wrote may hold line ends of other alphabets.
    return [json.loads(line) for line in store.read_file(artifact, "samples.jsonl").splitlines()]


def plan_(request: Request) -> None:
    """Show what would run, and why."""
    document = documents.plan_document(request.config, request.planned(request.names), request.store())
    request.answer(document, lambda: request.out.print(plan_table(document["stages"])))


def status(request: Request) -> None:
    """Show what is done, running and failed."""
    document = documents.status_document(request.config, request.planned(request.names), request.store())

    def show() -> None:
        request.out.print(plan_table(document["stages"], metrics=True))
        request.out.print(usage_line(document["usage"]))

    request.answer(document, show)


def explain(request: Request) -> None:
    """Say why a stage is cached or would run again, or did."""
    name = _single(request, "STAGE")
    planned = request.planned([name])
    document = documents.explain_document(planned[name], planned, request.store())

    def show() -> None:
        request.out.print(explain_view(document), soft_wrap=True)

    request.answer(document, show)


def lineage(request: Request) -> None:
    """Show everything a result came from, and what it cost."""
    if len(request.names) > 1:
        raise RequestError("lineage takes one stage or artifact", "command line", "rlhf diff A B compares two")
    target = request.names[0] if request.names else None
    record = documents.find_record(target, request.planned(_stages_among(request)), request.store())
    document = documents.lineage_document(record, request.store())
    request.answer(document, lambda: request.out.print(lineage_view(document)))


def _stages_among(request: Request) -> list[str]:
    """The names of the command line that are stages of the pipeline, and not keys or another pipeline's stages."""
    return [name for name in request.names if name in request.config.instances]


def diff(request: Request) -> None:
    """Compare two results: rlhf diff A B, each a stage, pipeline/stage, key or artifact."""
    if len(request.names) != 2:
        raise RequestError("diff takes two stages, keys or artifacts", "command line", "rlhf diff A B")
    planned, store = request.planned(_stages_among(request)), request.store()
    old, new = (documents.find_record(name, planned, store) for name in request.names)
    document = documents.diff_document(old, new, store)
    request.answer(document, lambda: request.out.print(diff_view(document)))


def leaderboard(request: Request) -> None:
    """Rank the models that wrote the responses, by what people said: rlhf leaderboard [STAGE]."""
    if len(request.names) > 1:
        raise RequestError("leaderboard takes one stage", "command line", "rlhf leaderboard rank")
    one = request.one(request.names[0] if request.names else "rank")
    record = result_of(one)
    held = {file.path for file in request.store().manifest(record.artifact).files}
    if "leaderboard.json" not in held:
        raise RequestError(
            f"{one.name} has no leaderboard: no training set names the models that wrote its responses",
            f"stage {one.name}",
            'write "models": [name, …] beside the responses of the comparison sets, or have stage collect write them',
        )
    rows = json.loads(request.store().read_file(record.artifact, "leaderboard.json"))
    request.answer({"models": rows}, lambda: request.out.print(leaderboard_table(rows)))


def verify(request: Request) -> int:
    """Check every file of the store against its digest."""
    report = request.store().verify(repair=request.arguments.repair)
    damaged = [{"artifact": one.artifact, "file": one.file, "why": one.why} for one in report.damaged]

    def show() -> None:
        for one in report.damaged:
            line = printable(f"{one.artifact[:12]} {one.file}: {one.why}")
            request.out.print(line, highlight=False, markup=False)
        request.out.print(f"{report.checked} files checked, {len(damaged)} damaged")
        if damaged and not request.arguments.repair:
            request.out.print("next: rlhf verify --repair moves them to quarantine; rlhf run makes them again")

    request.answer({"checked": report.checked, "damaged": damaged}, show)
    return 1 if damaged else 0


def gc(request: Request) -> None:
    """Remove results that no pipeline needs any more, and other old leftovers."""
    hours = request.arguments.grace
    if request.names:
        raise RequestError("gc takes no stage: it collects the whole store", "command line", "rlhf gc --dry-run")
    if not 0 <= hours < math.inf:
        raise RequestError(f"--grace is {hours}, and must be a number from 0 on", "command line", "--grace 24")
    dry_run: bool = request.arguments.dry_run
    report = request.store().collect_garbage(hours * 3600, dry_run=dry_run)
    document = documents.gc_document(report, hours, dry_run=dry_run)
    request.answer(document, lambda: request.out.print(gc_table(document)))


def import_(request: Request) -> None:
    """Make a model's folder the result of a stage."""
    from rlhf.pipeline.transfer import import_folder

    instance = request.arguments.as_
    stage = request.known[instance_of(request.config, instance).uses]
    store = request.store(create=True)
    if request.arguments.forget:
        ref = store.refs(request.config.name).get(instance)
        if ref is None or not ref.imported:
            raise RequestError(f"{instance} is not imported", f"stage {instance}", command_line(request, "status"))
        store.delete_ref(request.config.name, instance)
        request.out.print(f"{instance} is made by its stage again")
        return
    record = import_folder(Path(_single(request, "DIR")), request.config, instance, stage, store)
    undo = command_line(request, "import", "--forget", "--as", instance)
    request.out.print(f"{instance} is artifact {record.artifact[:12]} until: {undo}", soft_wrap=True, markup=False)


def export(request: Request) -> None:
    """Write a stage's result to a folder."""
    from rlhf.pipeline.transfer import export_artifact

    if len(request.names) != 2:
        raise RequestError("export takes a stage and a folder", "command line", "rlhf export STAGE DIR")
    one, target = request.one(request.names[0]), Path(request.names[1])
    request.out.print(f"wrote {export_artifact(one, target, request.store(), adapter=request.arguments.adapter)}")


def generate(request: Request) -> None:
    """Let a policy answer prompts."""
    one = request.one(_single(request, "STAGE"))
    if one.stage.kind != "policy":
        raise RequestError(
            f"{one.name} makes a {one.stage.kind}, which answers nothing", "command line", "name sft or ppo"
        )
    record = result_of(one)
    given = request.arguments
    for option, value, least in (
        ("--temperature", given.temperature, 0),
        ("--max-new-tokens", given.max_new_tokens, 1),
        ("--seed", given.seed, 0),
    ):
        if not least <= value < math.inf:
            raise RequestError(
                f"{option} is {value}, and must be a number from {least} on", "command line", f"{option} 1"
            )
    prompts = request.arguments.prompt or [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not prompts:
        raise RequestError("there is no prompt", "command line and standard input", "--prompt 'Write …'")
    from rlhf.rollout.generate import answers

    with tempfile.TemporaryDirectory() as scratch:
        folder = request.store().checkout(record.artifact, Path(scratch) / "policy")
        for answer in answers(folder, prompts, given.temperature, given.max_new_tokens, given.seed):
            # A pipe is given what the model wrote; on a terminal, it could repaint the screen or worse.
            print(printable_lines(answer) if sys.stdout.isatty() else answer)


def config(request: Request) -> None:
    """Print the settings with every default filled in, or what each of them means."""
    if not request.arguments.fields:
        values = resolved(request.config)
        _print_exactly(to_yaml(values).rstrip("\n"), lambda: to_yaml(values, ascii_only=True).rstrip("\n"))
        return
    sections: dict[str, type[Settings]] = {
        "store": StoreSettings,
        "cluster": ClusterSettings,
        "tracking": TrackingSettings,
    }
    sections |= {name: stage.settings for name, stage in request.known.items()}
    for name in request.names:
        if name not in sections:
            raise RequestError(f"no section is named {name!r}", "command line", suggestion(name, sections))
    for name in request.names or sections:
        for field in describe(sections[name]):
            request.out.print(f"{name}.{field.path}: {field.type}; default {field.default}; {field.role}", markup=False)
            request.out.print(f"    {field.help}", markup=False)


def doctor(request: Request) -> int:
    """Say whether this machine can run the pipeline."""
    from rlhf.cluster.doctor import diagnose
    from rlhf.cluster.session import Session

    entries = diagnose(request.store().root, Session(request.config.cluster).address)

    def show() -> None:
        for entry in entries:
            mark = Text("ok ", "green") if entry["ok"] else Text("bad", "red")
            request.out.print(mark.append(f" {entry['name']}: {entry['found']}  {entry['next']}", "default"))

    request.answer({"checks": entries}, show)
    return 0 if all(entry["ok"] for entry in entries) else 1


def data(request: Request) -> None:
    """Check records, or make them of an export: rlhf data validate FILE, rlhf data convert FILE OUT.jsonl."""
    match request.names:
        case ["validate", source]:
            _validate(source, request.arguments.kind)
        case ["convert", source, target]:
            _convert(request, source, Path(target))
        case _:
            raise RequestError(
                "data takes the word validate and one file, or convert and two",
                "command line",
                "rlhf data validate FILE, or rlhf data convert FILE OUT.jsonl",
            )


def _validate(source: str, kind: str | None) -> None:
    from rlhf.data.validation import KINDS, validate_file

    if kind is not None and kind not in KINDS:
        raise RequestError(f"there is no kind of record {kind!r}", "--kind", suggestion(kind, KINDS))
    found = validate_file(source, kind)
    print(f"{source}: {found.rows} rows of {found.kind}, all well")
    if found.forms:
        print(found.forms)


def _convert(request: Request, source: str, target: Path) -> None:
    from rlhf.data.imports.convert import ORIGINS, convert_file
    from rlhf.data.imports.layout import Wanted

    given = request.arguments
    if given.from_ is not None and given.from_ not in ORIGINS:
        raise RequestError(f"there is no tool or data set {given.from_!r}", "--from", suggestion(given.from_, ORIGINS))
    responses, questions, groups = (
        tuple(name.strip() for name in (listed or "").split(",") if name.strip())
        for listed in (given.responses, given.question, given.groups)
    )
    found = convert_file(source, target, given.from_, Wanted(given.prompt, responses, questions, groups))
    left_out = ", ".join(f"{count} {what}" for what, count in sorted(found.left_out.items())) or "nothing"
    status = f"; status unknown, taken as submitted: {found.unknown_status} responses" if found.unknown_status else ""
    by = f" by {found.annotators} annotators" if found.annotators else ""
    rated = f", rated by {found.rated}," if found.rated else ""
    print(
        f"{source}: {found.records} records read, {found.sets} comparison sets{by}{rated} written to {target}; "
        f"left out: {left_out}{status}"
    )


def annotate(request: Request) -> None:
    """Have people rank responses on a local web page: rlhf annotate SETS.jsonl OUT.jsonl, or STAGE OUT.jsonl."""
    if len(request.names) != 2:
        raise RequestError(
            "annotate takes a file of responses, or a stage that collects them, and a file to write",
            "command line",
            "rlhf annotate SETS.jsonl OUT.jsonl",
        )
    source, out = request.names
    if not re.fullmatch(NAME_PATTERN, source) or Path(source).exists():
        _annotate(request, source, Path(out))
        return
    one = request.one(source)
    if one.stage.kind != "responses":
        raise RequestError(f"{source} makes {one.stage.kind}, and no responses to rank", "command line", "name collect")
    record = result_of(one)
    with tempfile.TemporaryDirectory() as scratch:
        _annotate(request, str(request.store().checkout(record.artifact, Path(scratch) / source)), Path(out))


def _annotate(request: Request, source: str, out: Path) -> None:
    from rlhf.collect.collection import Collection

    given = request.arguments
    if not 0 <= given.port <= 65535:
        raise RequestError(f"there is no port {given.port}", "--port", "--port 8000")
    with Collection(source, out, create=not given.export_only) as collection:
        for notice in collection.notices:
            print(notice, file=sys.stderr)
        if not given.export_only:
            from rlhf.collect.server import serve

            def tell(address: str, for_others: bool) -> None:
                print(f"{len(collection.annotation.sets)} rows to rank; open {address}")
                if for_others:
                    print("whoever has that address can answer; it is not encrypted: stay in a network that you trust")
                print(f"answers are kept in {collection.journal.path}; Ctrl-C ends and writes {out}", flush=True)

            serve(collection, given.host, given.port, given.annotator, tell)
        exported = collection.export()
    counts = f"{exported.sets} ranked, rankings: {exported.rankings}, annotators: {exported.annotators}"
    print(f"wrote {out}; rows: {counts}")
    if exported.sets:
        print(f"next: set data.comparisons={out} in a pipeline; the same command goes on with what is left")


def _single(request: Request, what: str) -> str:
    if len(request.names) != 1:
        raise RequestError(f"exactly one {what} is needed", "command line", f"rlhf {request.arguments.command} --help")
    return request.names[0]


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
        match shlex.split(error.next_step) if error.next_step.startswith("rlhf ") else []:
            case [_, "run" | "status" | "annotate" as command, *names] if not any(
                "=" in name or name[0] == "-" for name in names
            ):
                # The library knows what to run next, and only this program for which stages of which pipeline.
                again = request.names if command == words[0] and not names else names
                raise type(error)(error.what, error.where, command_line(request, command, *again)) from error
            case _:
                raise
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
