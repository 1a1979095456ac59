"""Gains too good to be believed."""

import pytest

from autoresearch.night.doubts import too_good


@pytest.mark.parametrize(
    "kept, places",
    [
        ([1.0], []),
        ([1.0, 0.99, 0.985, 0.98], []),
        ([1.0, 0.99, 0.985, 0.5], [3]),  # a leak
        ([1.0, 0.4], [1]),
        ([1.0, 0.8], []),  # a first gain may be large
        ([1.0, 0.99999, 0.99998, 0.99], []),  # and one after tiny ones
        ([10.0, 11.0, 11.5, 30.0, 31.0], [3]),  # higher is better
    ],
)
def test_a_gain_beyond_all_before_by_far_is_marked(kept, places):
    assert too_good(kept) == places
