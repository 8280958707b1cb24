import json
import random

import pytest

from nscmerge.errors import ConfigError
from tasks.continual.orders import PUBLISHED, task_orders

CONTENT = json.loads(PUBLISHED.read_text())
KEYS = [task["key"] for task in CONTENT["tasks"]]


@pytest.mark.parametrize("n", [8, 14, 20])
def test_the_seeded_rule_gives_the_printed_orders(n):
    printed = task_orders(KEYS[:n], f"clip_{n}")
    assert task_orders(KEYS[:n], 10) == printed
    assert printed[0] == CONTENT["groups"][f"clip_{n}"]["orders"][0]["keys"]
    assert len(printed) == 10


def test_orders_are_seeded_and_leave_the_tasks_alone():
    tasks = ["a", "b", "c", "d"]
    expected = list(tasks)
    random.Random(44).shuffle(expected)
    assert task_orders(tasks, 3)[2] == expected
    assert task_orders(tasks, 5)[:3] == task_orders(tasks, 3)
    assert tasks == ["a", "b", "c", "d"]
    assert task_orders(["b", "a"], "alphabetical") == [["a", "b"]]
    assert task_orders(["b", "a"], [["b", "a"], ["a", "b"]]) == [["b", "a"], ["a", "b"]]


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        (0, "orders is 0; expected a number from 1 on"),
        ([], r"orders is \[\]; expected"),
        ("clip_9", "no group of task orders 'clip_9'; did you mean 'clip_8'"),
        ("clip_8", r"order 1 is \['eurosat'.*expected every task once: \['a', 'b'\]"),
        ([["a", "a"]], r"order 1 is \['a', 'a'\]; expected every task once"),
    ],
)
def test_says_which_order_does_not_fit(orders, message):
    with pytest.raises(ConfigError, match=message):
        task_orders(["b", "a"], orders)
