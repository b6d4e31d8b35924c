from serve.results import Results

MIB = 2**20


def test_the_latest_64_mib_are_kept():
    results = Results()
    for number in range(5):
        results.keep(str(number), bytes([number]) * 20 * MIB)
    assert [results.get(str(number)) is not None for number in range(5)] == [False, False, True, True, True]
    assert results.get("4") == bytes([4]) * 20 * MIB


def test_a_picture_kept_twice_counts_once_and_is_the_latest():
    results = Results()
    for token in ("a", "b", "a", "a", "c"):
        results.keep(token, b"." * 30 * MIB)
    assert [results.get(token) is not None for token in ("a", "b", "c")] == [True, False, True]
