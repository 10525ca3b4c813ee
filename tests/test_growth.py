"""The study of growth: slopes of power laws, and contenders that stop."""

import pytest
from benchmarks import growth


def points(power: float) -> list:
    return [growth.Point("n", "jacops", size, size**power, 8.0 * size**power) for size in (10, 100, 1000, 10_000)]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_its_power(power: float) -> None:
    assert growth.exponent(points(power), "seconds") == pytest.approx(power)
    assert growth.exponent(points(power), "mib") == pytest.approx(power)


def test_a_constant_cost_at_small_sizes_does_not_flatten_the_slope() -> None:
    found = points(1.0)
    found[0].seconds = found[1].seconds = 500.0
    assert growth.exponent(found, "seconds") == pytest.approx(1.0)


def test_peaks_of_a_few_pages_have_no_slope() -> None:
    assert growth.exponent([growth.Point("n", "jacops", size, 1.0, 0.5) for size in (1, 10, 100)], "mib") is None


def test_a_contender_that_failed_is_not_run_at_larger_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "REPEATS", 0)
    sizes: list[int] = []

    def make(size: int) -> dict:
        def fail() -> None:
            sizes.append(size)
            raise MemoryError("too large")

        return {"jacops": lambda: size, "rival": fail}

    series = growth.Series("n", "a question", "samples", (1, 2, 3), make)
    found = list(growth.run(series, limit=1.0, most=None))
    assert sizes == [1]
    assert [p.size for p in found if p.contender == "jacops"] == [1, 2, 3]
