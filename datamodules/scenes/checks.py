"""What can be asked for of a tree, checked before anything is rendered."""

from __future__ import annotations

from nscmerge.errors import ConfigError

#: Shortest side: the coarsest recipe needs a few pixels to smooth over.
SHORTEST = 16


def check_request(data_set: str, counts: dict[str, int], size: tuple[int, int] | None, seed: int) -> None:
    """Raise unless every split gets an image, images have a size, and the seed is one.

    Raises:
        ConfigError: Something is out of range; names the option.
    """
    for option, count in counts.items():
        if count < 1:
            raise ConfigError(f"{data_set}: {option} is {count}; every split needs at least 1.")
    if size is not None and (len(size) != 2 or min(size) < SHORTEST):
        raise ConfigError(f"{data_set}: image_size is {size}; expected height and width, at least {SHORTEST} each.")
    if seed < 0:
        raise ConfigError(f"{data_set}: scene_seed is {seed}; it must not be negative.")
