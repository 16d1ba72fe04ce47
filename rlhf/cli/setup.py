"""Commands that show the settings and whether this machine can run them."""

from rich.text import Text

from rlhf.cli.request import Request, print_exactly
from rlhf.config.base import Settings
from rlhf.config.fields import describe
from rlhf.config.nearest import suggestion
from rlhf.config.pipeline import (
    ClusterSettings,
    StoreSettings,
    TrackingSettings,
    resolved,
)
from rlhf.config.yaml_tree import to_yaml
from rlhf.errors import RequestError


def config(request: Request) -> None:
    """Print the settings with every default filled in, or what each of them means."""
    if not request.arguments.fields:
        values = resolved(request.config)
        print_exactly(to_yaml(values).rstrip("\n"), lambda: to_yaml(values, ascii_only=True).rstrip("\n"))
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
