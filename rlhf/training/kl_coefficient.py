"""The KL coefficient through a run: fixed, or adapted to a target, and part of every checkpoint."""

import json
from pathlib import Path

from rlhf.config.ppo import KlSettings
from rlhf.rl.kl import adapted_coefficient
from rlhf.zero import group


class KlCoefficient:
    """β of the iteration at hand. Every rank has the same: it follows from numbers that all ranks share."""

    def __init__(self, settings: KlSettings) -> None:
        self._settings = settings
        self.value = settings.coef

    @property
    def in_reward(self) -> float:
        """β where the penalty is part of the reward, otherwise 0."""
        return self.value if self._settings.place == "reward" else 0.0

    @property
    def in_loss(self) -> float:
        """β where the penalty is a term of the policy's loss, otherwise 0."""
        return self.value if self._settings.place == "loss" else 0.0

    def adapt(self, kl: float, responses: int) -> None:
        """Follow the target, if there is one, after an iteration of ``responses`` with mean KL ``kl``, in nats."""
        if self._settings.target is not None:
            self.value = adapted_coefficient(self.value, kl, self._settings.target, self._settings.horizon, responses)

    def checkpoint_bytes(self) -> int:
        """About what :meth:`save` writes."""
        return 64

    def save(self, checkpoint: Path) -> None:
        """Write the coefficient."""
        if group.is_main():
            (checkpoint / "kl.json").write_text(json.dumps({"coef": self.value}))

    def load(self, checkpoint: Path) -> None:
        """Go on with what :meth:`save` wrote."""
        self.value = json.loads((checkpoint / "kl.json").read_text())["coef"]
