"""Rooms rendered by ray casting, with every map of the dense tasks, written in the layouts of the real data sets.

``scene`` draws a room, ``render`` casts rays; ``cues``, ``segments`` and ``labels`` compute maps from a frame;
``nyud``, ``pascal`` and ``taskonomy`` write trees; ``rendering`` does so once, in a pool of workers.
"""

#: Part of every cache path: must grow whenever any written byte changes.
GENERATOR_VERSION = 1
