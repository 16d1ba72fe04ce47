"""Strengths against those of another library, choix (Maystre), with the same prior."""

import numpy as np
import pytest

from rlhf.ranking.bradley_terry import ELO_SCALE, fit, prior_precision
from tests.ranking.drawn import drawn, random_pairs

choix = pytest.importorskip("choix", reason="choix is of the dev extra: pip install -e '.[dev]'")


@pytest.mark.parametrize("prior_elo", [50.0, 200.0, 1000.0])
def test_bradley_terry_strengths_are_choix_s(prior_elo: float) -> None:
    """Its penalty is alpha Σ θ², ours λ Σ θ² / 2; both in nats."""
    rng = np.random.default_rng(0)
    said = drawn(rng, rng.normal(0, 200, 20), *random_pairs(rng, 20, 400))
    winners = np.where(said.wins == 1, said.first, said.second)
    losers = np.where(said.wins == 1, said.second, said.first)
    pairs = [(int(winner), int(loser)) for winner, loser in zip(winners, losers, strict=True)]
    expected = choix.opt_pairwise(20, pairs, alpha=prior_precision(prior_elo) / 2, method="Newton-CG", tol=1e-12)
    np.testing.assert_allclose(fit(20, said, prior_elo).elo * ELO_SCALE, expected - expected.mean(), atol=1e-6)
