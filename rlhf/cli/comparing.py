"""The command compare: policies side by side on the same prompts and seeds, judged by rewards, a judge or a person."""

import os
import sys
import tempfile
import termios
import tty
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.text import Text

from rlhf.cli.run import Request
from rlhf.cli.talking import (
    pipeline_rewards,
    policy_folder,
    prompts_of,
    sampling_of,
    scoring_stage,
)
from rlhf.config.collect import CompareSettings
from rlhf.config.stages import EvaluateSettings
from rlhf.data.records import ComparisonSet, ResponseSet
from rlhf.errors import RequestError
from rlhf.pipeline.plan import result_of
from rlhf.terminal import plain_table, printable, printable_lines

if TYPE_CHECKING:
    from rlhf.collect.comparison_file import ComparisonFile
    from rlhf.models.text import Prompt
    from rlhf.rollout.speaker import Speaker

BY = ("person", "reward", "judge")
AT_ONCE = {"person": 4, "reward": 32, "judge": 32}
"""Prompts that are answered at a time: a person should not wait for the answers to all."""
NARROWEST = 36
"""Columns of the terminal that an answer needs beside others; with fewer they stand below each other."""


class Verdict(NamedTuple):
    """Which of a set's responses are better."""

    winners: list[list[float]]
    """As in :class:`ComparisonSet`; empty if nobody decided."""
    scores: list[float] | None = None
    """Of the responses, where the verdict follows from scores."""


class Judged(NamedTuple):
    """A prompt with the policies' answers, and the verdict on them."""

    responses: ResponseSet
    verdict: Verdict


class _Quit(Exception):  # noqa: N818 - no error
    """The person has seen enough."""


Decide = Callable[[Sequence[ResponseSet]], Iterator[Verdict]]
"""Yields one verdict a set; raises :class:`_Quit` to end early."""


def compare(request: Request) -> None:
    """Put policies side by side on the same prompts and seeds: rlhf compare A B [C …]."""
    names, by, longest = request.names, _checked(request), sampling_of(request).max_new_tokens
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        scratch = Path(folder)
        folders = [policy_folder(request, name, scratch) for name in names]
        prompts = prompts_of(request) or _heldout_prompts(request, scratch)
        decide = stack.enter_context(_decider(request, by, scratch))
        from rlhf.collect.comparison_file import ComparisonFile
        from rlhf.rollout.speaker import Speaker

        save = request.arguments.save
        file = None if save is None else stack.enter_context(ComparisonFile(Path(save)))
        speakers = [Speaker(folder) for folder in folders]
        _check_tokens(names, speakers, prompts, longest)
        rows: list[Judged] = []
        try:
            for start in range(0, len(prompts), AT_ONCE[by]):
                sets = _answered(request, speakers, prompts[start : start + AT_ONCE[by]], start)
                for row in _judged(sets, decide, file):
                    rows.append(row)
        except (_Quit, KeyboardInterrupt):
            print()
    _report(request, by, len(prompts), rows)


def _answered(
    request: Request, speakers: "Sequence[Speaker]", prompts: "Sequence[Prompt]", first: int
) -> list[ResponseSet]:
    """Return the policies' answers to prompts, of which the first has the number ``first``."""
    columns = [speaker.answers(prompts, *sampling_of(request), first=first) for speaker in speakers]
    return [
        ResponseSet.model_validate({"prompt": prompt, "responses": list(responses), "models": request.names})
        for prompt, *responses in zip(prompts, *columns, strict=True)
    ]


def _judged(sets: Sequence[ResponseSet], decide: Decide, file: "ComparisonFile | None") -> Iterator[Judged]:
    """Yield sets with their verdicts: first those that the file has already, then the others as they are decided."""
    saved = [file.saved(responses) if file else None for responses in sets]
    pairs = list(zip(sets, saved, strict=True))
    yield from (Judged(responses, Verdict(found.winners or [])) for responses, found in pairs if found is not None)
    left = [responses for responses, found in pairs if found is None]
    for responses, verdict in zip(left, decide(left), strict=True):
        if file is not None and verdict.winners:
            file.append(ComparisonSet(**dict(responses), winners=verdict.winners))
        yield Judged(responses, verdict)


def _checked(request: Request) -> str:
    """Return who compares; raise a RequestError for a command line that cannot be done."""
    options, names = request.arguments, request.names
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not options.json
    by = options.by or ("person" if on_terminal else "reward")
    problem = next_step = ""
    if len(names) < 2 or len(set(names)) < len(names):
        problem, next_step = "compare takes two or more different policies", "rlhf compare sft ppo"
    elif by not in BY:
        problem, next_step = f"nobody is called {by!r} who could compare", f"--by {' or '.join(BY)}"
    elif by != "person" and options.blind:
        problem, next_step = f"--blind hides names from a person, and the {by} compares", "--by person"
    elif by == "person" and options.json:
        problem, next_step = "a person is shown answers in the place of --json", "--by reward or --by judge"
    elif by == "person" and len(names) > len(LETTERS):
        problem, next_step = f"a person compares at most {len(LETTERS)} policies", "name fewer, or --by reward"
    if problem:
        raise RequestError(problem, "command line", next_step)
    return by


def _heldout_prompts(request: Request, scratch: Path) -> "list[Prompt]":
    """Return the held-out prompts of the stage that evaluates, or the first of the stage data."""
    from rlhf.rollout.prompts import read_prompts

    stage = scoring_stage(request)
    count = stage.settings.prompts if stage and isinstance(stage.settings, EvaluateSettings) else 256
    source, _, part = (stage.inputs if stage else {}).get("prompts", "data/prompts").partition("/")
    record = result_of(request.planned_stage(source))
    return read_prompts(request.store().checkout(record.artifact, scratch / "prompts", part) / "heldout.jsonl")[:count]


def _check_tokens(
    names: Sequence[str], speakers: "Sequence[Speaker]", prompts: "Sequence[Prompt]", longest: int
) -> None:
    """Refuse prompts that one of the policies cannot answer, and say so where they read different tokens."""
    for name, speaker in zip(names, speakers, strict=True):
        for number, prompt in enumerate(prompts, start=1):
            speaker.prompt_ids(prompt, longest, f"prompt {number}, {name}")
    vocabularies = [speaker.tokenizer.get_vocab() for speaker in speakers]
    other = [name for name, words in zip(names, vocabularies, strict=True) if words != vocabularies[0]]
    if other:
        what = f"{names[0]} and {', '.join(other)} have different tokenizers: equal seeds give them different luck"
        print(printable_lines(f"notice: {what}"), file=sys.stderr)


@contextmanager
def _decider(request: Request, by: str, scratch: Path) -> Generator[Decide]:
    if by == "person":
        yield _Person(request.out, blind=request.arguments.blind, seed=request.arguments.seed)
    elif by == "judge":
        yield _judge(request, scratch)
    else:
        with pipeline_rewards(request, scratch) as rewards:

            def decide(sets: Sequence[ResponseSet]) -> Iterator[Verdict]:
                asked = [(one.model_dump()["prompt"], text) for one in sets for text in one.responses]
                scores = rewards.score([prompt for prompt, _ in asked], [text for _, text in asked]).tolist()
                yield from _by_scores(sets, scores)

            yield decide


def _by_scores(sets: Sequence[ResponseSet], scores: Sequence[float]) -> Iterator[Verdict]:
    """Yield verdicts from the scores of all responses; equal texts are a tie, however their batches rounded."""
    rest = iter(scores)
    for answered in sets:
        own = [next(rest) for _ in answered.responses]
        yield Verdict(_winners(answered.responses, own), own)


def _winners(responses: Sequence[str], scores: Sequence[float]) -> list[list[float]]:
    return [
        [i, j, 0.5 if responses[i] == responses[j] or scores[i] == scores[j] else float(scores[i] > scores[j])]
        for i, j in combinations(range(len(responses)), 2)
    ]


def _judge(request: Request, scratch: Path) -> Decide:
    """Return the pipeline's judge: that of its stage compare, else the one that evaluate fits to people's ratings.

    Raises:
        RequestError: the pipeline has neither, or the ratings are not there.
    """
    instances = request.config.instances.values()
    for instance in instances:
        settings = instance.settings
        if isinstance(settings, CompareSettings) and settings.file is None:
            return _StageJudge(instance.name, settings, scratch)
    stage = next((one for one in instances if isinstance(one.settings, EvaluateSettings) and one.settings.judge), None)
    if stage is None:
        raise RequestError(
            "the pipeline has no judge: no stage compare with a function or chat, and no evaluate with judge: true",
            str(request.config.path),
            "--by reward, or add one",
        )
    source, _, part = stage.inputs.get("judge", "data/judge").partition("/")
    record = result_of(request.planned_stage(source))
    from rlhf.models.evaluation import load_judge

    judge = load_judge(request.store().checkout(record.artifact, scratch / "judge", part))
    return lambda sets: _by_scores(sets, judge.rate([text for one in sets for text in one.responses]).tolist())


class _StageJudge:
    """The function or language model of a stage compare."""

    def __init__(self, name: str, settings: CompareSettings, scratch: Path) -> None:
        from rlhf.attempt.context import Context
        from rlhf.collect.judges import judge_of

        self._judge = judge_of(settings)
        attempt = scratch / "verdicts"
        attempt.mkdir()
        self._context = Context(name, "", settings, {}, attempt, attempt, scratch, (attempt,))

    def __call__(self, sets: Sequence[ResponseSet]) -> Iterator[Verdict]:
        from rlhf.collect.collection import name_of

        unique = list({name_of(one): one for one in sets}.values())
        compared = {name_of(one): one for one in self._judge.compare(unique, self._context)}
        for answered in sets:
            verdict = compared.get(name_of(answered))
            if verdict is not None and verdict.ratings is not None:
                scores = [float(row[0] or 0) for row in verdict.ratings]
                yield Verdict(_winners(answered.responses, scores), scores)
            else:
                yield Verdict(verdict.winners or [] if verdict else [])


LETTERS = "abcdefgh"
_KEYS = "t ties them, s skips, q quits: "


class _Person:
    """A person at the keyboard, who presses the letter of the best answer."""

    def __init__(self, out: Console, *, blind: bool, seed: int) -> None:
        self._out, self._blind, self._seed, self._shown = out, blind, seed, 0

    def __call__(self, sets: Sequence[ResponseSet]) -> Iterator[Verdict]:
        from rlhf.collect.annotation import shown_order
        from rlhf.collect.collection import name_of

        for answered in sets:
            self._shown += 1
            places = range(len(answered.responses))
            order = shown_order(str(self._seed), name_of(answered), len(places)) if self._blind else list(places)
            labels = [
                LETTERS[place] if self._blind else f"{LETTERS[place]}: {(answered.models or [])[place]}"
                for place in places
            ]
            self._out.print()
            self._out.print(Text(f"{self._shown}  {_as_text(answered)}", "bold"))
            self._out.print(side_by_side(labels, [answered.responses[index] for index in order], self._out.width))
            key = self._ask(LETTERS[: len(order)])
            if key == "s":
                yield Verdict([])
            elif key == "t":
                yield Verdict([[i, j, 0.5] for i, j in combinations(places, 2)])
            else:
                best = order[LETTERS.index(key)]
                yield Verdict([[best, other, 1] for other in places if other != best])

    def _ask(self, letters: str) -> str:
        """Return the key that was pressed."""
        while True:
            print(f"{'/'.join(letters)} is the best, {_KEYS}", end="", flush=True)
            key = _pressed()
            print(key)
            if key == "q":
                raise _Quit
            if key and key in letters + "ts":
                return key


def _pressed() -> str:
    """Return a key, or without a terminal the first letter of a line; ``q`` at the end of the input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip()[:1].lower() if line else "q"
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        key = os.read(descriptor, 1)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
    return "q" if key in (b"", b"\x04") else printable(key.decode(errors="replace")).lower()


def _as_text(responses: ResponseSet) -> str:
    prompt = responses.prompt
    if isinstance(prompt, str):
        return printable_lines(prompt)
    return "\n".join(f"{printable(message.role)}: {printable_lines(message.content)}" for message in prompt)


def side_by_side(labels: Sequence[str], texts: Sequence[str], width: int) -> RenderableType:
    """Return answers in columns, or below each other where a column would be too narrow."""
    cells = [Text(printable_lines(text)) for text in texts]
    heads = [Text(printable(label), "cyan") for label in labels]
    if width < NARROWEST * len(cells):
        return Group(*(part for pair in zip(heads, cells, strict=True) for part in pair))
    table = plain_table(header=False, expand=True)
    for label in labels:
        table.add_column(label, ratio=1, overflow="fold")
    table.add_row(*heads)
    table.add_row(*cells)
    return table


def _document(names: Sequence[str], by: str, prompts: int, rows: Sequence[Judged]) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    verdicts = [row.verdict for row in rows if row.verdict.winners]
    scores = [verdict.scores for verdict in verdicts if verdict.scores is not None]
    means = [sum(column) / len(scores) for column in zip(*scores, strict=True)]
    samples = [
        {**responses.model_dump(include={"prompt", "responses"}), **verdict._asdict()} for responses, verdict in rows
    ]
    return {
        "policies": list(names),
        "by": by,
        "prompts": prompts,
        "judged": len(verdicts),
        "scores": dict(zip(names, means, strict=False)),
        "pairs": pairs_of(names, [verdict.winners for verdict in verdicts]),
        "samples": samples,
    }


def pairs_of(names: Sequence[str], verdicts: Sequence[Sequence[Sequence[float]]]) -> list[dict[str, Any]]:
    """Return how often each policy's answers were better than each other's, a tie counted as half a win.

    verdicts  the winners of each prompt, as in :class:`ComparisonSet`, in the order of the names
    """
    from rlhf.textstats import win_rate

    outcomes: dict[tuple[int, int], list[float]] = {pair: [] for pair in combinations(range(len(names)), 2)}
    for winners in verdicts:
        for first, second, outcome in winners:
            i, j = int(first), int(second)
            outcomes[min(i, j), max(i, j)].append(outcome if i < j else 1 - outcome)
    return [
        {
            "first": names[i],
            "second": names[j],
            **{name: values.count(value) for name, value in (("won", 1), ("tied", 0.5), ("lost", 0))},
            "win_rate": rate.mean,
            "low": rate.low,
            "high": rate.high,
        }
        for (i, j), values in outcomes.items()
        if values
        for rate in [win_rate(values)]
    ]


_SAMPLES = 3
"""Prompts that are printed with their answers where no person has seen them."""


def _report(request: Request, by: str, prompts: int, rows: Sequence[Judged]) -> None:
    names, out = request.names, request.out
    document = _document(names, by, prompts, rows)
    if request.answer(document):
        return
    for responses, verdict in rows[:_SAMPLES] if by != "person" else []:
        scores = [f"  {score:+.2f}" for score in verdict.scores or []] or [""] * len(names)
        labels = [name + score for name, score in zip(names, scores, strict=True)]
        out.print(Text(_as_text(responses), "bold"))
        out.print(side_by_side(labels, responses.responses, out.width))
        out.print()
    for name, mean in document["scores"].items():
        out.print(Text(f"{printable(name)}: mean score {mean:+.3f}"))
    for pair in document["pairs"]:
        counts = f"{pair['won']} won, {pair['tied']} tied, {pair['lost']} lost"
        rate = f"{pair['win_rate']:.0%} ({pair['low']:.0%} to {pair['high']:.0%})"
        out.print(Text(f"{printable(pair['first'])} against {printable(pair['second'])}: {counts}; wins {rate}"))
    out.print(f"{document['judged']} of {prompts} prompts compared by {by}; 95 % intervals")
    if request.arguments.save:
        out.print(Text(f"saved to {printable(request.arguments.save)}: data.comparisons reads it"))
