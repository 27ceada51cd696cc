"""Engines without a model, for tests of what goes on between processes: importable where a spawned process looks, which
test files are not. Demands the package alone; holds no tests."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from leakfast.errors import AdapterError
from leakfast.generation.contract import Completion, Request, Sampling, Work
from leakfast.generation.vllm import serve
from leakfast.generation.vllm.start import EngineDied, Spec


def spec(name: str = "standin", seats: int = 4) -> Spec:
    return Spec(name, {"max_num_seqs": seats}, ())


def works(n: int, requests: int = 1, samples: int = 1, tokens: int = 1):
    for key in range(n):
        yield Work(
            key,
            None,
            [
                Request(
                    f"request {i}",
                    [*range(100, 100 + tokens)],
                    [2**40 * (key + i + s) for s in range(samples)],
                )
                for i in range(requests)
            ],
        )


class Standin:
    """Takes works while it has seats, as Engine.stream does, and finishes `each` completions of `length` a step."""

    version = "none"
    each, length, step_s = 200, 1, 0.0

    def __init__(self, given: Spec) -> None:
        self.spec = given

    def described(self, sampling: Sampling) -> dict:
        return {"pid": os.getpid(), "session": os.getsid(0)}

    def taken(self, work: Work) -> None:
        """Called with every work that comes in."""

    def drawn(self, work: Work, request: int, sample: int) -> Completion:
        return Completion(request, sample, [7] * self.length, "stop")

    def next(self, open_works: list) -> int:
        """Which of the open works, (work, what is left of it, what is done), is drawn of."""
        return 0

    def stream(self, works, sampling, finished=None):
        waiting, open_works, more = iter(works), [], True
        while True:
            while more and sum(len(left) for _, left, _ in open_works) < 2 * self.spec.seats:
                work = next(waiting, self)
                if work is self or work is None:
                    more = work is None
                    break
                asked = [(i, s) for i, request in enumerate(work.requests) for s in range(len(request.seeds))]
                open_works.append((work, [at for at in asked if at not in work.there], []))
                self.taken(work)
            if not open_works:
                if not more:
                    return
                continue
            time.sleep(self.step_s)
            number = self.next(open_works)
            work, left, done = open_works[number]
            now = [self.drawn(work, *at) for at in left[: self.each]]
            del left[: self.each]
            done += now
            if finished is not None:
                finished(now, work)
            if not left:
                open_works.pop(number)
                yield work, done


class Wordy(Standin):
    """Says far more than a line's buffer holds."""

    length, step_s = 300, 0.001


class Counted(Standin):
    """Draws of all open works by turns, by the seed, and writes a line for each completion into the file that its spec
    names."""

    each, step_s = 6, 0.01

    def next(self, open_works: list) -> int:
        return max(range(len(open_works)), key=lambda number: len(open_works[number][1]))

    def drawn(self, work: Work, request: int, sample: int) -> Completion:
        with open(self.spec.name, "a") as file:
            file.write(f"{work.requests[request].label}, {sample}\n")
        return Completion(request, sample, [10 + work.requests[request].seeds[sample] % 80], "length")


class Slow(Counted):
    """100 a second and engine, so that what is on its way when its parent dies is little, on a busy machine too."""

    each, step_s = 4, 0.04


class Orderly(Standin):
    """Says so when it is closed."""

    def close(self) -> None:
        Path(self.spec.name).touch()


class OnceBroken(Standin):
    """The first of the engines to have taken two works, and no other, dies of its device. The spec's name is a file
    that tells them apart."""

    each, step_s = 1, 0.02
    had = 0

    def drawn(self, work: Work, request: int, sample: int) -> Completion:
        path = Path(f"{self.spec.name}.{os.getpid()}")
        path.write_text(str(int(path.read_text()) + 1 if path.exists() else 1))
        return super().drawn(work, request, sample)

    def taken(self, work: Work) -> None:
        self.had += 1
        if self.had == 2 and self.first():
            raise EngineDied("vllm: the engine of it died: device-side assert.")

    def first(self) -> bool:
        try:
            Path(self.spec.name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class OnceHung(OnceBroken):
    """The first to draw its fortieth completion is in a step that does not end."""

    def drawn(self, work: Work, request: int, sample: int) -> Completion:
        self.had += 1
        if self.had == 40 and self.first():
            time.sleep(600)
        return Completion(request, sample, [7] * self.length, "stop")

    def taken(self, work: Work) -> None:
        pass


class Late(OnceBroken):
    """Takes long to start where one was broken before."""

    def __init__(self, given: Spec) -> None:
        super().__init__(given)
        if Path(given.name).exists():
            time.sleep(20)


class AlwaysBroken(OnceBroken):
    def first(self) -> bool:
        return True


class Stillborn(Standin):
    def taken(self, work: Work) -> None:
        raise EngineDied("vllm: the engine of it died at once.")


class Refusing(OnceBroken):
    """What one refuses, all would."""

    def taken(self, work: Work) -> None:
        raise AdapterError("vllm: a.safetensors is of another base. Use its own.")


class Stuck(Standin):
    """In a step that does not end, in a process that gives its step less time once its parent is gone."""

    def taken(self, work: Work) -> None:
        serve._GRACE_S = 2.0
        Path(self.spec.name).write_text(str(os.getpid()))
        time.sleep(600)


class Surprised(Standin):
    """Ends in an error that nobody foresaw, while a thread keeps its process from ending."""

    def taken(self, work: Work) -> None:
        threading.Thread(target=time.sleep, args=(60,)).start()
        raise KeyError("a name nobody gave")
