import subprocess
import sys

import pytest

HEAVY = ("torch", "ray", "transformers", "datasets", "pyarrow", "scipy", "sklearn", "numpy")


@pytest.mark.parametrize(
    "modules",
    ["rlhf.config.pipeline, rlhf.config.base, rlhf.config.stages, rlhf.config.data", "rlhf.collect.server"],
    ids=["settings", "annotate"],
)
def test_what_answers_a_user_imports_nothing_heavy(modules: str) -> None:
    """``rlhf plan`` answers in under a second, and ``rlhf annotate`` serves in one, because this stays true."""
    program = f"import sys, {modules}\nprint([name for name in {HEAVY} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"
