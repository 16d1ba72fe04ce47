"""The manual page, which `man` reads."""

import os
import shutil
import subprocess

import pytest

from rlhf.cli.main import COMMANDS, OPTIONS, main


def test_the_manual_page_has_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    """By the same parsers as --help; groff, with every warning on, has nothing to say and shows the same words."""
    assert main(["--man"]) == 0
    page = capsys.readouterr().out
    groff = shutil.which("groff")
    if groff is None:
        why = "groff is not here (Debian: groff-base)"
        assert os.environ.get("CI") != "true", why
        pytest.skip(why)
    command = [groff, "-ww", "-k", "-man", "-Tutf8", "-P-cbou", "-rHY=0"]
    shown = subprocess.run(command, input=page, capture_output=True, text=True, check=True)
    assert shown.stderr == ""
    words = set(shown.stdout.split())
    for name in COMMANDS:
        assert f"   rlhf {name}\n" in shown.stdout
        assert {option.replace("-", "‐") for option in OPTIONS.get(name, {})} <= {
            word.rstrip(",").replace("-", "‐") for word in words
        }
