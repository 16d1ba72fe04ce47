"""Strengths of many responses: ``python -m benchmarks.ranking [--responses N] [--comparisons E]``.

Draws comparisons of random pairs from known strengths, fits them with standard errors under each model of ties, and
prints seconds, the process's peak memory, and the share of strengths within their own 95 % intervals.
"""

import argparse
import resource
import time

import numpy as np

from rlhf.ranking.bradley_terry import ELO_SCALE, TIE_MODELS, fit
from rlhf.ranking.comparisons import NOBODY, Comparisons, FloatArray

PRIOR_ELO = 200.0


def draw(responses: int, comparisons: int, seed: int) -> tuple[FloatArray, Comparisons]:
    """Draw strengths from the prior, and comparisons as Davidson's model with ν = 1 has them."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, PRIOR_ELO, responses)
    truth -= truth.mean()
    first = rng.integers(0, responses, comparisons)
    second = (first + rng.integers(1, responses, comparisons)) % responses
    half_gap = ELO_SCALE * (truth[first] - truth[second]) / 2
    # Gumbel noise on the logits of win, loss and tie draws an outcome.
    logits = np.stack([half_gap, -half_gap, np.zeros(comparisons)])
    outcome = np.argmax(logits + rng.gumbel(size=logits.shape), axis=0)
    won, lost, tied = (np.arange(3)[:, None] == outcome).astype(np.float64)
    return truth, Comparisons(first, second, won, lost, tied, np.full(comparisons, NOBODY))


def peak_megabytes() -> float:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print a line per model of ties."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--responses", type=int, default=100_000)
    parser.add_argument("--comparisons", type=int, default=1_000_000)
    sizes = parser.parse_args()
    truth, comparisons = draw(sizes.responses, sizes.comparisons, seed=0)
    print(f"{sizes.comparisons} comparisons of {sizes.responses} responses; {peak_megabytes():.0f} MB before any fit")
    for model in TIE_MODELS:
        start, started = time.perf_counter(), time.process_time()
        fitted = fit(sizes.responses, comparisons, PRIOR_ELO, model)
        seconds, of_processor = time.perf_counter() - start, time.process_time() - started
        inside = np.mean(np.abs(fitted.elo - truth) < 1.96 * fitted.standard_errors)
        print(
            f"{model:12} {seconds:5.2f} s ({of_processor:.2f} s of processor time)   peak {peak_megabytes():.0f} MB   "
            f"inside their intervals {inside:.4f}"
        )


if __name__ == "__main__":
    main()
