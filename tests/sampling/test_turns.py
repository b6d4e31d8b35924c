from objdrive.sampling.turns import Turns

LARGE, SMALL = (1024, 1024), (512, 512)


def take(turns, sizes, pictures, steps):
    taken = []
    for _ in range(steps):
        taken.append(turns.next(sizes))
        turns.took(taken[-1], pictures)
    return taken


def test_a_size_alone_has_every_turn():
    assert take(Turns(), [SMALL], 3, 4) == [SMALL] * 4


def test_sizes_get_equal_work():
    taken = take(Turns(), [LARGE, SMALL], 1, 50)
    assert taken.count(LARGE) == 10
    assert taken.count(SMALL) == 40


def test_a_size_that_comes_later_waits_for_nobody_and_nobody_for_it():
    turns = Turns()
    take(turns, [SMALL], 1, 100)
    taken = take(turns, [SMALL, LARGE], 1, 10)
    assert LARGE in taken[:2]
    assert taken.count(LARGE) == 2


def test_a_size_that_went_and_comes_back_has_no_debt():
    turns = Turns()
    take(turns, [LARGE, SMALL], 1, 5)
    take(turns, [SMALL], 1, 100)
    assert LARGE in take(turns, [SMALL, LARGE], 1, 2)
