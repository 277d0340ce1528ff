import math

import pytest
from scipy import stats

from mmnas_lab.report.tables import markdown_table, mean_interval, paired_interval

OURS = [0.624, 0.631, 0.619, 0.640, 0.627]
THEIRS = [0.611, 0.633, 0.602, 0.625, 0.620]


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize("count", [2, 5])
def test_paired_interval_is_that_of_the_paired_t_test(confidence, count):
    ours, theirs = OURS[:count], THEIRS[:count]
    expected = stats.ttest_rel(ours, theirs).confidence_interval(confidence)
    mean, low, high = paired_interval(ours, theirs, confidence)
    assert mean == pytest.approx((low + high) / 2)
    assert (low, high) == pytest.approx((expected.low, expected.high))


def test_mean_interval_is_that_of_the_one_sample_t_test():
    expected = stats.ttest_1samp(OURS, 0.0).confidence_interval(0.95)
    assert mean_interval(OURS)[1:] == pytest.approx((expected.low, expected.high))


def test_one_run_has_a_mean_and_no_interval():
    interval = paired_interval([0.5], [0.3])
    assert interval.mean == pytest.approx(0.2)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_equal_differences_give_an_interval_of_one_point():
    assert paired_interval([3.0, 2.0], [2.0, 1.0]) == (1.0, 1.0, 1.0)


def test_refusals():
    with pytest.raises(ValueError, match="got 2 and 1 values"):
        paired_interval([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([])
    with pytest.raises(ValueError, match="confidence between 0 and 1, got 95"):
        mean_interval([1.0, 2.0], confidence=95)


def test_markdown_table_aligns_and_escapes():
    rows = [
        {"method": "found | network", "f1": 0.62461, "runs": 5},
        {"method": "text", "f1": None, "runs": 10},
    ]
    assert markdown_table(rows, ["method", "f1", "runs", "note"]).splitlines() == [
        "| method           |     f1 | runs | note |",
        "| ---------------- | -----: | ---: | ---- |",
        "| found \\| network | 0.6246 |    5 |      |",
        "| text             |        |   10 |      |",
    ]


def test_markdown_table_without_rows_keeps_its_header():
    assert markdown_table([], ["a", "method"]) == "| a   | method |\n| --- | ------ |"
