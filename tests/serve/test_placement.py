from collections import Counter

from serve.placement import ranked


def idle(count):
    return {f"replica-{number}": 0 for number in range(count)}


def rank(key, queues, choices=2, spill_at=4, full_at=100):
    return ranked(key, queues, choices=choices, spill_at=spill_at, full_at=full_at)


def test_a_key_stays_at_its_first_home_while_it_is_calm():
    queues = idle(5)
    groups = rank("mug@1", queues)
    [first], *others, homes, everyone = groups
    assert homes == [first, *others[0]]
    assert sorted([[first], *others]) == sorted([replica] for replica in queues)
    assert set(everyone) == set(queues)
    assert rank("mug@1", queues | {first: 3}) == groups


def test_a_busy_home_spills_to_the_next_that_is_calm():
    queues = idle(5)
    (first,), (second,), (third,), *_ = rank("mug@1", queues)
    assert rank("mug@1", queues | {first: 4})[0] == [second]
    assert rank("mug@1", queues | {first: 4, second: 9})[0] == [third]


def test_while_all_are_busy_keys_stay_at_home():
    queues = dict.fromkeys(idle(5), 4)
    homes, everyone = rank("mug@1", queues)
    assert homes == rank("mug@1", idle(5))[-2]
    assert set(everyone) == set(queues)


def test_what_homes_have_no_places_for_goes_to_all():
    homes, everyone = rank("mug@1", dict.fromkeys(idle(5), 4))
    queues = dict.fromkeys(everyone, 4)
    assert rank("mug@1", queues | {homes[0]: 9}, full_at=9) == [homes[1:], everyone]
    assert rank("mug@1", queues | dict.fromkeys(homes, 9), full_at=9) == [everyone]


def test_one_hot_key_waits_nowhere_while_others_are_idle():
    queues = idle(10)
    for _ in range(30):
        queues[rank("mug@1", queues)[0][0]] += 1
    assert max(queues.values()) == 4


def test_keys_spread_evenly():
    homes = Counter(rank(f"object-{number}@d", idle(4))[0][0] for number in range(4000))
    assert set(homes) == set(idle(4))
    assert max(homes.values()) < 1.15 * min(homes.values())


def test_a_replica_that_comes_takes_only_its_share():
    keys = [f"object-{number}@d" for number in range(2000)]
    before = {key: rank(key, idle(4))[0][0] for key in keys}
    after = {key: rank(key, idle(5))[0][0] for key in keys}
    moved = [key for key in keys if after[key] != before[key]]
    assert {after[key] for key in moved} == {"replica-4"}
    assert 300 < len(moved) < 500


def test_few_replicas():
    assert rank("mug@1", idle(1)) == [["replica-0"], ["replica-0"], ["replica-0"]]
    assert rank("mug@1", {}) == [[]]
