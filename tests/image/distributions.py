"""Whether drawn numbers follow a distribution: what the tests of the augmentations share."""

import math

import numpy as np


def assert_same_distribution(sample, reference) -> None:
    """Kolmogorov and Smirnov's two-sample test at a level of 1e-4, or less for discrete samples."""
    sample, reference = np.sort(np.ravel(sample)), np.sort(np.ravel(reference))
    values = np.union1d(sample, reference)
    below = np.searchsorted(sample, values, "right") / len(sample)
    expected = np.searchsorted(reference, values, "right") / len(reference)
    bound = math.sqrt(-math.log(1e-4 / 2) / 2 * (1 / len(sample) + 1 / len(reference)))
    distance = np.abs(below - expected).max()
    assert distance < bound, f"distance {distance:.4f} of {len(sample)}, at most {bound:.4f}"


def assert_share(events, probability: float) -> None:
    """The share of the true values is within 4 standard deviations of the probability."""
    events = np.ravel(events)
    deviation = math.sqrt(probability * (1 - probability) / len(events))
    assert abs(events.mean() - probability) <= 4 * deviation, (events.mean(), probability)
