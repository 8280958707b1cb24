"""In which order the tasks arrive."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from nscmerge.errors import ConfigError
from nscmerge.naming import unknown

#: The thirty printed orders of the NUFILT paper, with where they come from.
PUBLISHED = Path(__file__).with_name("orders.json")
#: Order k = 1, 2, ... is drawn with seed 41 + k.
FIRST_SEED = 42

#: How many seeded shuffles; ``alphabetical`` or a published group (``clip_8``); or the orders themselves.
Orders = int | str | list[list[str]]


def task_orders(tasks: Sequence[str], orders: Orders) -> list[list[str]]:
    """Return the orders in which a protocol runs through its tasks.

    Args:
        tasks: Their names; a shuffle starts from them as they stand.
        orders: A number n: shuffles with the seeds 42, 43, ..., 41 + n, the rule that reproduces all printed orders of
            the NUFILT paper where the tasks stand in its order of ids. ``alphabetical``: one. ``clip_8``, ``clip_14``,
            ``clip_20``: the printed ones. Or lists of names.

    Raises:
        ConfigError: No order, an unknown group, or an order that does not hold every task once.

    Source: NUFILT, Table 6 and section B.1.
    """
    if isinstance(orders, bool) or (isinstance(orders, int) and orders < 1) or orders == []:
        raise ConfigError(f"orders is {orders!r}; expected a number from 1 on, a name, or lists of task names.")
    if isinstance(orders, int):
        found = []
        for seed in range(FIRST_SEED, FIRST_SEED + orders):
            order = list(tasks)
            random.Random(seed).shuffle(order)
            found.append(order)
        return found
    if orders == "alphabetical":
        return [sorted(tasks)]
    if isinstance(orders, str):
        groups = json.loads(PUBLISHED.read_text(encoding="utf-8"))["groups"]
        if orders not in groups:
            raise ConfigError(unknown("group of task orders", orders, ["alphabetical", *groups]))
        orders = [order["keys"] for order in groups[orders]["orders"]]
    for number, order in enumerate(orders, start=1):
        if sorted(order) != sorted(tasks):
            raise ConfigError(
                f"order {number} is {order}; expected every task once: {sorted(tasks)}. Give the tasks of the group, "
                "or a number of seeded shuffles."
            )
    return [list(order) for order in orders]
