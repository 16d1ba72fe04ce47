"""Secrets come from the environment and stay there: nothing that a run writes or prints holds one of them."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.helpers import REPOSITORY
from tests.rewards.server import Answer, lengths, serving

PIPELINE = """
pipeline: planted
store: {{uri: {store}}}
cluster: {{cpus: 2, gpus: 0, max_failures: 0}}
tracking: {{wandb: offline}}
data: {{demonstrations: {rows}, comparisons: {sets}, prompts: {prompts}, judge: null}}
model: {{base: scratch, scratch: {{vocabulary: 300, hidden_size: 16, layers: 1, heads: 2, context: 64}}}}
ppo:
  inputs: {{policy: model}}
  iterations: 3
  rollouts: 4
  minibatches: 1
  epochs: 1
  sampling: {{max_new_tokens: 4}}
  max_prompt_length: 32
  value_init: policy
  rewards: [{{endpoint: {{url: "{url}", token_variable: SCORES_TOKEN, retries: 0}}}}]
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: Ray's sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="rlhf-"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_no_secret_of_the_environment_is_written_or_printed(folder: Path):
    """A real run, W&B offline, that ends in an error with a traceback: all that it left is searched, Ray's logs too."""
    planted = {
        "WANDB_API_KEY": secrets.token_hex(20),
        "HF_TOKEN": f"hf_{secrets.token_hex(17)}",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
        "SCORES_TOKEN": secrets.token_hex(20),
    }
    home = folder / "home"
    home.mkdir()
    rows = [{"prompt": f"say {number}", "completion": f"well , {number}"} for number in range(12)]
    sets = [{"prompt": f"say {number}", "responses": ["a", "b"], "rankings": [[0, 1]]} for number in range(12)]
    prompts = [{"prompt": f"say {number}"} for number in range(12)]
    files = {"rows": rows, "sets": sets, "prompts": prompts}
    for name, written in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, written)))
    config = folder / "planted.yaml"
    waiting = [lengths, lengths]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_"))}

    def refusing(_: Any) -> Answer:
        # W&B starts beside the training, which would be over before it: its files are to be searched too.
        end = time.monotonic() + 25
        while time.monotonic() < end and not any(folder.rglob("*.wandb")):
            time.sleep(0.1)
        return Answer(status=401)

    with serving(lambda document: (waiting.pop() if waiting else refusing)(document)) as service:
        paths = {name: folder / f"{name}.jsonl" for name in files}
        config.write_text(PIPELINE.format(store=folder / "store", url=service.url, **paths))
        answer = subprocess.run(
            [sys.executable, "-m", "rlhf", "run", "ppo", "--config", str(config), "--debug"],
            cwd=REPOSITORY,
            env=environment | planted | {"HOME": str(home), "TMPDIR": str(folder), "RAY_TMPDIR": str(folder)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert service.headers[0]["Authorization"] == f"Bearer {planted['SCORES_TOKEN']}"
    printed = answer.stdout + answer.stderr
    assert answer.returncode == 1, printed
    assert "refused the request with status 401" in printed
    assert "Traceback" in printed

    token = (home / ".ray" / "auth_token").read_text()
    found: list[tuple[str, str]] = []
    searched: list[Path] = []
    for path in folder.rglob("*"):
        if not path.is_file() or path.name == "auth_token":
            continue
        content = path.read_bytes()
        searched.append(path)
        found += [(name, str(path)) for name, value in planted.items() if value.encode() in content]
        found += [("Ray's token", str(path))] * (token.encode() in content)
    found += [(name, "the terminal") for name, value in planted.items() if value in printed]
    assert found == []
    # The search looked where it was meant to.
    names = [str(path.relative_to(folder)) for path in searched]
    for part in ("store/actions/", "store/blobs/", "log-0.txt", "metrics.jsonl", ".wandb", "session_", "failure"):
        assert any(part in name for name in names), part
