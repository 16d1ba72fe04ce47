"""Settings of grpo and rloo that cannot be."""

from typing import Any

import pytest
from pydantic import ValidationError

from rlhf.config.grpo import GrpoSettings, RlooSettings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"responses_per_prompt": 1}, "greater than or equal to 2"),
        ({"responses_per_prompt": 6}, "rollouts 64 is not a multiple of responses_per_prompt 6"),
        ({"overlong_buffer": 64}, "overlong_buffer 64 is not less than max_new_tokens 64"),
        ({"policy_clip": None, "policy_clip_high": 0.3}, "policy_clip_high needs policy_clip"),
        ({"value_clip": 0.2}, "value_clip"),
        ({"placement": "apart"}, "placement apart leaves no rank that trains"),
    ],
)
@pytest.mark.parametrize("kind", [GrpoSettings, RlooSettings])
def test_groups_that_cannot_be_are_refused(kind: type[GrpoSettings], given: dict[str, Any], message: str) -> None:
    """A lone response has nothing to be compared with, and a group is whole or not at all."""
    with pytest.raises(ValidationError, match=message):
        kind.model_validate(given)
