"""The examples for schedulers: what they call exists, and what they name is what this package has."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.cli.main import COMMANDS, parser_of
from rlhf.errors import InterruptedRunError, TryAgainError

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").iterdir())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
AGAIN = [TryAgainError.exit_status, InterruptedRunError.exit_status]


def example(name: str) -> str:
    return (ROOT / "examples" / name).read_text()


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all(example(name)))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_an_example_explains_what_its_user_must_decide(file: Path) -> None:
    """Where the store and the token are, and what preemption does; an image has neither. The page links to it."""
    text = file.read_text()
    topics = ("Store,",) if file.name == "Dockerfile" else ("Store ", "Token ", "Preemption ")
    assert all(f"# {topic}" in text or f" {topic}" in text for topic in topics)
    assert f"](../examples/{file.name})" in (ROOT / "docs" / "schedulers.md").read_text()


def commands(text: str) -> list[list[str]]:
    """Return the calls of ``rlhf`` in a script, without what follows them on their lines."""
    calls = re.findall(r"(?:^|[ /\"-])rlhf\"? ((?:run|watch) [^&|;\n]*)", text, re.MULTILINE)
    return [shlex.split(call) for call in calls]


def test_every_command_is_one_of_this_program() -> None:
    """With options that it has."""
    found = {file.name: commands(file.read_text()) for file in EXAMPLES}
    assert ["run", "--config", "/pipeline/rlhf.yaml"] in found["kuberay.yaml"]
    assert ["run", "--config", "rlhf.yaml"] in found["skypilot.yaml"]
    assert ["run", "$@"] in found["ray-job.sh"]
    calls = re.findall(r"slurm\.sbatch (.*)", example("slurm.sbatch"))
    for name, *words in [*map(shlex.split, calls), *(call for each in found.values() for call in each)]:
        assert name in COMMANDS
        parser_of(name).parse_intermixed_args(words)


def test_the_scripts_can_be_read_by_their_shells() -> None:
    """Those inside of other files too."""
    sky = documents("skypilot.yaml")[0]
    (node,) = re.findall(r"^NODE='\n(.*?)^'$", example("slurm.sbatch"), re.MULTILINE | re.DOTALL)
    scripts = [("bash", text) for text in (example("slurm.sbatch"), node, sky["setup"], sky["run"])]
    for shell, text in [*scripts, ("sh", example("ray-job.sh"))]:
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_a_scheduler_starts_again_what_should_be_and_nothing_else() -> None:
    """By the exit statuses of this program."""
    assert documents("skypilot.yaml")[0]["resources"]["job_recovery"]["recover_on_exit_codes"] == AGAIN
    assert f'[ "$status" = {TryAgainError.exit_status} ]' in example("slurm.sbatch")


def test_the_pods_have_what_they_mount_and_the_ray_of_this_package() -> None:
    """Each mount is of a volume of its pod; the driver's pod may take longer to end than the driver does."""
    claim, job = documents("kuberay.yaml")
    cluster = job["spec"]["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}" in PROJECT["dependencies"]
    assert cluster["authOptions"] == {"mode": "token"}
    head, *workers = (group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]))
    assert head["terminationGracePeriodSeconds"] > 30
    for pod in (head, *workers):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["store"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
            assert container["resources"]["limits"] == container["resources"]["requests"]
    (config,) = re.findall(r"--config (\S+)", job["spec"]["entrypoint"])
    assert config.startswith("/pipeline/")


def test_the_image_is_made_of_what_the_checkout_has() -> None:
    """What it copies is there or made by the command that it names; its Python and extras are those of the wheel."""
    text = example("Dockerfile").replace("\\\n", " ")
    instructions = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    copied = [source for name, rest in instructions if name == "COPY" for source in rest.split()[:-1]]
    assert copied == ["dist/*.whl", "constraints.txt"]
    assert (ROOT / "constraints.txt").exists()
    assert "dist/*.whl" in (ROOT / "Makefile").read_text()
    assert f"Programming Language :: Python :: {re.findall(r'python:([0-9.]+)-', text)[0]}" in PROJECT["classifiers"]
    for extra in re.findall(r"\.whl\)\[(\w+)\]", text):
        assert extra in PROJECT["optional-dependencies"]
    installs = re.findall(r"pip install ([^&]*)", text)
    assert all("--constraint" in install for install in installs)
    assert installs[0].split()[-1] == "torch"
