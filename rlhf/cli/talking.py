"""Commands that talk to policies, chat and generate, and what compare shares with them: policies, prompts, rewards."""

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from rlhf.cli.run import Request, single_name
from rlhf.config.base import FILE_SUFFIXES
from rlhf.config.pipeline import StageInstance
from rlhf.config.policy_gradient import PolicyGradientSettings
from rlhf.config.rewards import RewardSettings, reward_inputs
from rlhf.config.stages import EvaluateSettings
from rlhf.errors import RecordError, RequestError
from rlhf.pipeline import documents
from rlhf.pipeline.plan import result_of
from rlhf.pipeline.transfer import check_model
from rlhf.terminal import print_error, printable

if TYPE_CHECKING:
    from rlhf.models.text import Prompt
    from rlhf.rewards import Rewards
    from rlhf.rollout.speaker import Answer, Speaker


class Sampling(NamedTuple):
    """How answers are sampled."""

    temperature: float
    max_new_tokens: int
    seed: int


def sampling_of(request: Request) -> Sampling:
    """Return the sampling that the options name; raise a RequestError for a number that means nothing."""
    options = request.arguments
    sampling = Sampling(options.temperature, options.max_new_tokens, options.seed)
    for (name, value), least in zip(sampling._asdict().items(), (0, 1, 0), strict=True):
        if not least <= value < float("inf"):
            option = "--" + name.replace("_", "-")
            raise RequestError(
                f"{option} is {value}, and must be a number from {least} on", "command line", f"{option} 1"
            )
    return sampling


def policy_folder(request: Request, name: str, scratch: Path) -> Path:
    """Return the folder of a policy.

    name     a stage; else a folder with a model; else ``pipeline/stage``, a key or an artifact
    scratch  results of the store are checked out in it

    Raises:
        RequestError: there is no such policy, or it is something that answers nothing.
    """
    is_stage = request.arguments.config.exists() and name in request.config.instances
    path = Path(name).expanduser()
    if not is_stage and path.is_dir():
        check_model(path)
        _refuse_scoring(path)
        return path
    if not is_stage and (name.startswith((".", "/", "~")) or path.exists()):
        raise RequestError(f"there is no folder {name}", "command line", "name a stage, or a folder with a model")
    if is_stage:
        planned = request.planned_stage(name)
        _refuse_kind(name, planned.stage.kind)
        record = result_of(planned)
    else:
        record = documents.find_record(name, request.planned([]), request.store())
        _refuse_kind(name, request.store().manifest(record.artifact).kind)
    return request.store().checkout(record.artifact, scratch / record.artifact)


def _refuse_kind(name: str, kind: str) -> None:
    if kind not in ("policy", "model"):
        raise RequestError(f"{name} makes a {kind}, which answers nothing", "command line", "name sft or ppo")


def _refuse_scoring(folder: Path) -> None:
    """Refuse a model with a head that scores: a language model made of it would have a head of random numbers."""
    from rlhf.models.layout import config_of

    config = config_of(folder)
    if "score_mean" in config or any("Classification" in str(name) for name in config.get("architectures") or []):
        raise RequestError(
            "the folder holds a reward model or classifier, which answers nothing", str(folder), "name a language model"
        )


def prompts_of(request: Request) -> "list[Prompt]":
    """Return the prompts of ``--prompt`` or ``--file``, none without both.

    Raises:
        RequestError: both are given, a prompt is blank or not UTF-8, or the file cannot be read.
    """
    given, file = request.arguments.prompt, request.arguments.file
    if given and file:
        raise RequestError("prompts come from --prompt or --file, and both are given", "command line", "name one")
    if file is None:
        return [checked(prompt, f"--prompt, number {number}") for number, prompt in enumerate(given or [], start=1)]
    if Path(file).is_dir() or file.casefold().endswith(FILE_SUFFIXES):
        return _recorded(file)
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise RequestError(f"the file cannot be read: {error.strerror}", file, "name a file with prompts") from error
    return _lines(lines, file)


def _lines(lines: Iterable[str], place: str) -> "list[Prompt]":
    return [checked(line, f"{place}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _recorded(source: str) -> "list[Prompt]":
    """Read prompts as the stage data does."""
    from rlhf.data.forms import FormReader
    from rlhf.data.readers import malformed, read_source
    from rlhf.data.records import Prompt, Reason

    forms, prompts, bad = FormReader(), list["Prompt"](), list[str]()
    for row in read_source(source):
        record = [Reason("", row.problem)] if row.problem else forms.parse(row.value, Prompt)
        if isinstance(record, list):
            bad.append(f"{row.place}: {'; '.join(map(str, record))}")
        else:
            prompts.append(record)
    if bad:
        raise malformed(bad, len(bad) + len(prompts), " as prompts", 'correct them: a row is {"prompt": …}')
    return [prompt.model_dump()["prompt"] for prompt in prompts]


def checked(prompt: str, place: str) -> str:
    """Return a prompt as it is; raise a RecordError where it is blank or holds bytes that are not UTF-8."""
    if not prompt.strip():
        raise RecordError("a prompt is empty", place, "write a text, or take it out")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise RecordError("a prompt holds bytes that are not UTF-8", place, "write it in UTF-8") from None
    return prompt


def scoring_stage(request: Request) -> StageInstance | None:
    """Return the pipeline's stage that evaluates policies, else one that trains them by rewards, else None."""
    instances = request.config.instances.values()
    scoring = [one for one in instances if isinstance(one.settings, EvaluateSettings | PolicyGradientSettings)]
    return min(scoring, key=lambda one: isinstance(one.settings, PolicyGradientSettings), default=None)


@contextmanager
def pipeline_rewards(request: Request, scratch: Path) -> "Generator[Rewards]":
    """Load the rewards of the :func:`scoring_stage`, or the model of stage rm; this process is a group meanwhile.

    Raises:
        RequestError: a reward model has no result yet.
    """
    stage = scoring_stage(request)
    settings = [RewardSettings()]
    if stage is not None:
        assert isinstance(stage.settings, EvaluateSettings | PolicyGradientSettings)
        settings = stage.settings.rewards
    makers = {role: (stage.inputs if stage else {}).get(role, name) for role, name in reward_inputs(settings).items()}
    records = {role: result_of(request.planned_stage(maker)) for role, maker in makers.items()}
    import torch

    # DeepSpeed, which is imported with them, else looks for GPUs, and its logger writes to the stream of that moment.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with redirect_stdout(sys.stderr):
        from rlhf import rewards
        from rlhf.zero import group

    folders = {role: request.store().checkout(record.artifact, scratch / role) for role, record in records.items()}
    with group.alone():
        yield rewards.load_whole(settings, folders)


def on_terminal(text: str) -> str:
    """Return a text whose control characters cannot change a terminal; line feeds stay."""
    return "\n".join(map(printable, text.split("\n")))


def speak(answer: "Answer", until: threading.Event | None = None) -> None:
    """Print an answer while it is written, until the event is set. A pipe gets it unchanged."""
    shown = on_terminal if sys.stdout.isatty() else str
    for piece in answer:
        print(shown(piece), end="", flush=True)
        if until is not None and until.is_set():
            break
    print(flush=True)


def generate(request: Request) -> None:
    """Let a policy answer prompts: rlhf generate STAGE|DIR."""
    name, sampling = single_name(request, "STAGE or DIR"), sampling_of(request)
    with tempfile.TemporaryDirectory() as scratch:
        folder = policy_folder(request, name, Path(scratch))
        prompts = prompts_of(request) or _lines(_stdin(), "standard input")
        if not prompts:
            raise RequestError("there is no prompt", "command line and standard input", "--prompt 'Write …'")
        from rlhf.rollout.speaker import Speaker

        speaker = Speaker(folder)
        if len(prompts) > 1 and not sys.stdout.isatty():
            for answer in speaker.answers(prompts, *sampling):
                print(answer)
            return
        rows = [
            speaker.prompt_ids(prompt, sampling.max_new_tokens, f"prompt {number}")
            for number, prompt in enumerate(prompts, start=1)
        ]
        for number, row in enumerate(rows):
            speak(speaker.answer(row, *sampling, sample=number))


def _stdin() -> Iterator[str]:
    """Yield the lines of standard input, bytes that are not UTF-8 as half surrogate pairs."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # pyright: ignore[reportAttributeAccessIssue] - looked for above
    for line in sys.stdin:
        yield line.rstrip("\r\n")


_HINT = "/reset begins anew; /exit or Ctrl-D ends; Ctrl-C stops an answer"


def chat(request: Request) -> None:
    """Talk to a policy, which reads the conversation so far: rlhf chat STAGE|DIR."""
    name, sampling = single_name(request, "STAGE or DIR"), sampling_of(request)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = policy_folder(request, name, Path(scratch))
        rewards = stack.enter_context(pipeline_rewards(request, Path(scratch))) if request.arguments.score else None
        from rlhf.rollout.speaker import Speaker

        conversation = _Conversation(Speaker(folder), sampling, rewards)
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            for number, line in enumerate(_stdin(), start=1):
                if conversation.read(line, f"standard input:{number}"):
                    return
            return
        print(_HINT)
        for line in _typed():
            try:
                if conversation.read(line, "this message"):
                    return
            except RequestError as error:  # the conversation goes on without the message
                print_error(Console(stderr=True, highlight=False), error)


def _typed() -> Iterator[str]:
    """Yield the lines that a person types, until Ctrl-D."""
    import readline  # noqa: F401 # pyright: ignore[reportUnusedImport] - `input` takes its editing of lines from there

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()


class _Conversation:
    def __init__(self, speaker: "Speaker", sampling: Sampling, rewards: "Rewards | None") -> None:
        self._speaker, self._sampling, self._rewards = speaker, sampling, rewards
        self._messages: list[dict[str, Any]] = []
        self._answers = 0

    def read(self, line: str, place: str) -> bool:
        """Answer a message, or obey a command; return whether the conversation ends."""
        match line.strip():
            case "":
                pass
            case "/exit":
                return True
            case "/reset":
                self._messages = []
            case _:
                self._answer([*self._messages, {"role": "user", "content": checked(line, place)}], place)
        return False

    def _answer(self, messages: list[dict[str, Any]], place: str) -> None:
        """Answer with as many tokens as the context has room for, and remember message and answer.

        Raises:
            RequestError: there is no room, or the chat template refuses the conversation.
        """
        temperature, length, seed = self._sampling
        ids = self._speaker.prompt_ids(messages, 1, f"{place}, after {len(messages) - 1} others (/reset begins anew)")
        room = self._speaker.context - len(ids)
        answer = self._speaker.answer(ids, temperature, min(length, room), seed, self._answers)
        with _interrupt_as_event() if sys.stdout.isatty() else nullcontext() as stopped:
            speak(answer, stopped)
        self._answers += 1
        self._messages = [*messages, {"role": "assistant", "content": answer.text}]
        if not answer.has_ended and not (stopped and stopped.is_set()):
            why = "the context is full: /reset begins anew" if room <= length else "--max-new-tokens allows more"
            print(f"(cut after {min(length, room)} tokens; {why})", file=sys.stderr)
        if self._rewards is not None:
            print(f"score {self._rewards.score([messages], [answer.text]).item():+.2f}", flush=True)


@contextmanager
def _interrupt_as_event() -> Generator[threading.Event]:
    """Set the event on Ctrl-C in place of an exception, which could hit the model in the middle of a step."""
    asked = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
