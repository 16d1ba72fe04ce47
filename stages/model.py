"""The base model, fetched, read or made once: a plain folder of safetensors with its tokenizer.

In: for a model from scratch, demonstrations.  Out: a folder that ``from_pretrained`` loads.
"""

from pathlib import Path

from rlhf.attempt.context import Context
from rlhf.config.stages import ModelSettings
from rlhf.models import base_models
from rlhf.models.layout import licence_of


def run(context: Context[ModelSettings]) -> dict[str, float]:
    """Put the model into the output folder; the final metric is ``parameters``."""
    settings = context.settings
    match settings.base:
        case "smollm2-135m":
            context.progress("fetching and converting SmolLM2-135M")
            origin = base_models.fetch_smollm2(settings.downloads, context.cache, context.attempt, context.output)
        case "scratch":
            context.progress("training a tokenizer")
            texts = base_models.texts_of(context.inputs["demonstrations"] / "train.jsonl")
            base_models.make_from_scratch(settings.scratch, texts, settings.seed, context.output)
            origin = {"source": "scratch"}
        case name if settings.is_hub:
            context.progress(f"downloading {name}")
            licence = base_models.fetch_from_hub(name, settings.revision, context.output)
            origin = {"source": name, "revision": settings.revision, "license": licence}
        case folder:
            base_models.copy_local(folder, context.output)
            origin = {"source": folder, "license": licence_of(Path(folder).expanduser())}
    context.origin({"model": origin})
    base_models.write_template_date(context.output, settings.template_date)
    return {"parameters": base_models.check(context.output)}
