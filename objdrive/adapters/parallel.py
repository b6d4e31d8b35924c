"""Many calls at once that mostly wait for the storage, in bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

THREADS = 64
"""Calls at once. A filesystem that pools connections needs as many."""

_AHEAD = 4 * THREADS
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_parallel(call: Callable[[_Item], _Result], items: Iterable[_Item]) -> "Iterator[tuple[_Item, Future[_Result]]]":
    """Call for every item, and yield the items in order, each with its call, which has ended by then.

    `items` are read here, a few hundred ahead; if reading them fails, that is raised after the items that came before.
    What a call raises waits in its future and ends nothing else. Closing the generator waits for the calls that run,
    and makes no further ones.
    """
    todo = iter(items)
    under_way: deque[tuple[_Item, Future[_Result]]] = deque()
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="objdrive-store")
    failure: Exception | None = None
    try:
        while True:
            try:
                for item in islice(todo, _AHEAD - len(under_way)):
                    under_way.append((item, threads.submit(call, item)))
            except Exception as error:
                failure = error
            if not under_way:
                break
            item, done = under_way.popleft()
            done.exception()
            yield item, done
    finally:
        threads.shutdown(cancel_futures=True)
    if failure is not None:
        raise failure
