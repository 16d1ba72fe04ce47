import subprocess
import sys

HEAVY = ("torch", "ray", "transformers", "datasets", "pyarrow", "scipy", "sklearn", "numpy")


def test_reading_settings_imports_nothing_heavy() -> None:
    """``rlhf plan`` answers in under a second because this stays true."""
    program = (
        "import sys, rlhf.config.pipeline, rlhf.config.base, rlhf.config.stages, rlhf.config.data\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"
