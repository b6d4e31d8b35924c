import threading

from objdrive.sampling.histogram import Histogram


def test_counts_values_up_to_each_bound():
    histogram = Histogram([1, 2, 4])
    for value in (0.5, 1, 1.5, 4, 9):
        histogram.observe(value)
    seen = histogram.snapshot()
    assert (seen.count, seen.total) == (5, 16)
    assert seen.bounds == (1, 2, 4)
    assert seen.at_most == (2, 3, 4)


def test_loses_nothing_under_threads():
    histogram = Histogram()
    threads = [threading.Thread(target=lambda: [histogram.observe(0.5) for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert histogram.snapshot().count == 4000
    assert histogram.snapshot().total == 2000
