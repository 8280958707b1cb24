import pytest

from tasks.schedule import schedule_factor


def test_poly_numbers():
    factor = schedule_factor("poly", 40_000, warmup=0.0)
    assert factor(0) == 1
    assert factor(20_000) == pytest.approx(0.5**0.9)  # 0.535887
    assert factor(39_999) == pytest.approx((1 / 40_000) ** 0.9)
    assert factor(40_000) == 0


def test_poly_with_warmup_is_capped_by_the_rise():
    factor = schedule_factor("poly", 100, warmup=0.1)
    assert [factor(s) for s in (0, 4)] == pytest.approx([0.1, 0.5])
    assert factor(50) == pytest.approx(0.5**0.9)


def test_linear_is_what_text_experts_were_trained_with():
    factor = schedule_factor("linear", 10, warmup=0.2)
    assert [factor(s) for s in range(11)] == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0])
    assert [schedule_factor("linear", 4, warmup=0)(s) for s in range(5)] == pytest.approx([1, 1, 2 / 3, 1 / 3, 0])


def test_cosine_falls_from_the_end_of_the_warm_up_to_zero():
    factor = schedule_factor("cosine", 12, warmup=2 / 12)
    assert [factor(s) for s in (0, 1, 2, 7, 12)] == pytest.approx([0.5, 1, 1, 0.5, 0])
    assert factor(20) == pytest.approx(0)  # past the end it does not rise again
