"""Against the Berkeley benchmark's own matcher, as pyEdgeEval carries it."""

import numpy as np
import pytest

from benchmarks.edge_matching import original_matcher, scene
from tasks.edge_matching.counting import count_image
from tasks.edge_matching.curve import best_row, scores
from tasks.edge_matching.protocol import Protocol
from tasks.edge_matching.suppression import suppress
from tasks.edge_matching.thinning import thin


@pytest.mark.slow
@pytest.mark.parametrize("max_dist", [0.0075, 0.011])
def test_the_score_agrees_with_the_original_matcher(max_dist):
    matched = original_matcher()
    if matched is None:
        pytest.skip("pyEdgeEval is not installed: pip install pyEdgeEval==0.2.8 (it needs a C++ compiler)")
    levels, boundary = scene(128, 160, seed=0)
    protocol = Protocol.of(max_dist, 99)
    ours = count_image(levels, boundary, protocol)
    strength, theirs = suppress(levels / 255), ours.copy()
    for row, threshold in enumerate(protocol.thresholds):
        found = thin(strength > threshold)
        assert theirs[row, 2] == np.count_nonzero(found)
        theirs[row, 0] = matched(found, boundary, max_dist)
    assert (theirs[:, 0] <= ours[:, 0]).all()  # a largest matching cannot be beaten
    values = [scores(counts, best_row(counts), protocol.thresholds).ods_f for counts in (ours, theirs)]
    print(f"odsF at max_dist {max_dist}: {values[0]:.4f} by maximum flow, {values[1]:.4f} by the original matcher")
    assert values[0] == pytest.approx(values[1], abs=0.005)
    assert 0.3 < values[0] < 1
