"""Commands that bring models in, take them out, and let them answer."""

import math
import sys
import tempfile
from pathlib import Path

from rlhf.cli.request import Request, command_line, single_name
from rlhf.errors import RequestError
from rlhf.pipeline.plan import instance_of, result_of
from rlhf.terminal import (
    printable_lines,
)


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
    record = import_folder(Path(single_name(request, "DIR")), request.config, instance, stage, store)
    undo = command_line(request, "import", "--forget", "--as", instance)
    request.out.print(f"{instance} is artifact {record.artifact[:12]} until: {undo}", soft_wrap=True, markup=False)


def export(request: Request) -> None:
    """Write a stage's result to a folder."""
    from rlhf.pipeline.transfer import export_artifact

    if len(request.names) != 2:
        raise RequestError("export takes a stage and a folder", "command line", "rlhf export STAGE DIR")
    planned, target = request.planned_stage(request.names[0]), Path(request.names[1])
    request.out.print(f"wrote {export_artifact(planned, target, request.store(), adapter=request.arguments.adapter)}")


def generate(request: Request) -> None:
    """Let a policy answer prompts."""
    planned = request.planned_stage(single_name(request, "STAGE"))
    if planned.stage.kind != "policy":
        raise RequestError(
            f"{planned.name} makes a {planned.stage.kind}, which answers nothing", "command line", "name sft or ppo"
        )
    record = result_of(planned)
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
