"""Many requests to a judge that answers one at a time, some at once; each reply is on the disk before the next
request takes its place. Demands a client that asks; retries nothing (its library does)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

from leakfast.errors import JudgeError
from leakfast.judge.contract import Reply, Request
from leakfast.judge.prices import Budget
from leakfast.progress import Progress
from leakfast.storage.interrupts import finishing

IN_A_ROW = 24  # failures one after another, after which the service is taken to be down


class Client(Protocol):
    """What a judge that answers one at a time can do; from several threads."""

    def ask(self, request: Request) -> Reply: ...


def carry_out(
    client: Client,
    requests: Sequence[tuple[Request, int]],
    budget: Budget,
    keep: Callable[[list[Reply]], None],
    concurrency: int,
    progress: Progress | None = None,
) -> tuple[dict[str, Reply], bool]:
    """Ask `requests` (with their prompt tokens) in order, as far as the budget goes.

    Returns (replies by key, whether the budget stopped it). Where the client raises, or a stop is asked for, no
    more is sent, what is under way is awaited and kept, and then it is raised. Raises JudgeError after IN_A_ROW
    failures without an answer between them."""
    waiting = deque(requests)
    running: dict[Future[Reply], float] = {}
    replies: dict[str, Reply] = {}
    error: BaseException | None = None
    short, in_a_row = False, 0
    with ThreadPoolExecutor(concurrency) as pool, finishing("the requests under way") as stop_asked:
        while True:
            while waiting and len(running) < concurrency and error is None and not short and not stop_asked():
                usd = budget.at_most(waiting[0][1])
                if not budget.promise(usd):
                    short = True
                    break
                running[pool.submit(client.ask, waiting.popleft()[0])] = usd
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            came = []
            for future in done:
                budget.settle(running.pop(future), 0.0)
                failure = future.exception()
                if failure is None:
                    came.append(future.result())
                else:
                    error = error or failure
            keep(came)
            for reply in came:
                replies[reply.key] = reply
                in_a_row = 0 if reply.is_paid else in_a_row + 1
            if in_a_row >= IN_A_ROW and error is None:
                error = JudgeError(
                    f"judge: {in_a_row} requests in a row failed ({came[-1].status}: {came[-1].detail}). "
                    "Look after the service, and run the same command again: what is paid for is kept."
                )
            if progress is not None:
                progress(len(replies), len(requests), "replies")
        if error is not None:
            raise error
        if stop_asked():
            raise KeyboardInterrupt
    return replies, short
