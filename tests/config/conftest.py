from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.config.pipeline import PipelineConfig, load_pipeline
from rlhf.errors import SettingsError

Load = Callable[..., PipelineConfig]
Refuse = Callable[..., str]


@pytest.fixture
def load(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load the text of a pipeline file of the test module's stages, named ``p.yaml`` so that errors are short."""
    monkeypatch.chdir(tmp_path)

    def load_text(text: str, *overrides: str) -> PipelineConfig:
        Path("p.yaml").write_text(text, encoding="utf-8")
        return load_pipeline(Path("p.yaml"), overrides, request.module.STAGES)

    return load_text


@pytest.fixture
def refuse(load: Load) -> Refuse:
    """Return the text of the error that a pipeline file is refused with."""

    def refuse_text(text: str, *overrides: str) -> str:
        with pytest.raises(SettingsError) as caught:
            load(text, *overrides)
        return str(caught.value)

    return refuse_text
