"""Small boundary and strength maps, and a worker that dies."""

import os

import numpy as np
from scipy.ndimage import gaussian_filter


def outline(size=100, low=20, high=70):
    """A square of one-pixel lines, away from the border; without its corners, as thinning leaves it."""
    edges = np.zeros((size, size), bool)
    edges[low, low : high + 1] = edges[high, low : high + 1] = True
    edges[low : high + 1, low] = edges[low : high + 1, high] = True
    edges[[low, low, high, high], [low, high, low, high]] = False
    return edges


def ridges(rng, shape=(24, 31)):
    """A smooth random map with ridges, in 8 bit steps."""
    field = gaussian_filter(rng.normal(size=shape), 2)
    return np.floor(255 * np.exp(-((field / field.std()) ** 2) * 4)) / 255


def die(*_):
    """End the process that counts, as the system does when memory is short."""
    os._exit(1)
