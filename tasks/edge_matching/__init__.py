"""Boundary matching for ods-F, in NumPy and SciPy: no torch, so that worker processes start in a moment.

``protocol`` says what is counted, ``counting`` counts one image (``suppression``, ``thinning``, ``matching``),
``workers`` many, and ``curve`` turns counts into scores. ``tasks.metrics.ods_f`` is the way in.
"""
