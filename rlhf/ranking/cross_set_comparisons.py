"""Comparisons across sets that share a prompt, by ratings alone."""

import numpy as np

from rlhf.randomness import stream
from rlhf.ranking.comparisons import NOBODY, Comparisons, FloatArray, IntArray


def bridges(ratings: list[FloatArray], set_of: IntArray, per_response: int, seed: int) -> Comparisons:
    """Compare responses of different sets by their ratings, as if any rater of one met any rater of the other.

    Ratings on one anchored scale say more than the order within a set: where a set holds only good or only bad
    responses, they alone tell it from another. A pair is shared out as pairs of its ratings are won, lost and tied: so
    a win and half a tie have the ratings' probability of superiority (Mann & Whitney 1947).

    Every round compares the same ratings again, so a pair counts as the lesser number of its raters divided by the
    number of rounds: all bridges together are about as many comparisons as there are ratings. More rounds then average
    over the draw of pairs and claim no more information.

    ratings       one array a response, of its raters' scores
    set_of        ``[N]``, each response's set; responses of one set are not bridged
    per_response  rounds, in each of which every response meets up to two others; one without ratings meets none
    """
    rng = stream("bridges", seed, len(ratings))
    rows: list[tuple[int, int, float, float, float]] = []
    for _ in range(per_response):
        circle = rng.permutation(len(ratings))
        for first, second in zip(circle, np.roll(circle, -1), strict=True):
            a, b = ratings[first][:, None], ratings[second]
            count = min(len(a), len(b))
            if set_of[first] == set_of[second] or count == 0:
                continue
            won, lost, tied = (count / per_response * float(share.mean()) for share in (a > b, a < b, a == b))
            rows.append((first, second, won, lost, tied))
    columns = np.array(rows, dtype=np.float64).reshape(-1, 5).T
    first, second = columns[:2].astype(np.int64)
    won, lost, tied = columns[2:]
    return Comparisons(first, second, won, lost, tied, np.full(len(rows), NOBODY))
