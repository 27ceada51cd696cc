"""Workers as actors of a Ray cluster, one on each GPU (or group of tensor_parallel GPUs). Demands ray, and leakfast of this
very version on every node; starts a cluster on this machine alone where none runs."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.cluster import messages as m
from leakfast.cluster.local import check_alone
from leakfast.cluster.tasks import Task
from leakfast.errors import InputError, LeakfastError, optional
from leakfast.version import __version__

if TYPE_CHECKING:
    from leakfast.study.config import Study

log = logging.getLogger("leakfast.cluster")

_GONE = "the Ray cluster is gone: {} What was made is kept; start the cluster and run the same command again."


def actors(address: str, workers: int | None = None) -> Callable[[Study, Sequence[str]], RayPool]:
    """Actors of the cluster at `address` (HOST:PORT; auto: the one that runs here, else a new one on this machine, bound to
    loopback, without its dashboard). workers: how many; None: one for every GPU, or group of tensor_parallel GPUs; one for
    every node where there are no GPUs. Raises InputError where ray is not installed or cannot be reached."""

    def pool(study: Study, only: Sequence[str]) -> RayPool:
        return RayPool(study, only, address, workers)

    return pool


class RayPool:
    """size: how many actors the cluster has room for, or as many as were asked for."""

    def __init__(self, study: Study, only: Sequence[str], address: str, workers: int | None) -> None:
        self._ray = _connected(address)
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        gpus, cores = (_of_each(nodes, kind) for kind in ("GPU", "CPU"))
        each = study.vllm.tensor_parallel
        # an actor lies on one node: what is left over on several does not make another
        most = sum(n // each for n in gpus) if sum(gpus) else sum(cores)
        self.size = workers or (most if sum(gpus) else len(nodes))
        if not 1 <= self.size <= most:
            self.close()
            a_node = f", of which a worker needs {each} on one node" if sum(gpus) and each > 1 else ""
            raise InputError(
                f"run: {self.size or 1} workers wanted, but the cluster has room for {most} ({sum(gpus)} GPUs{a_node}, "
                f"{sum(cores)} cores). Give --workers a smaller number{' or tensor_parallel' if a_node else ''}, or add nodes."
            )
        check_alone(study, self.size)
        self._threads = _threads(cores, self.size)
        self._needs = {"num_gpus": each} if sum(gpus) else {"num_cpus": self._threads}
        level = logging.getLogger("leakfast").getEffectiveLevel()
        self._told = self._ray.put((study, tuple(only), level, self._threads))
        from ray.util.queue import Queue

        self._inbox = Queue(actor_options={"num_cpus": 0})
        self._raylet = _raylet_of(nodes, self._ray.get_runtime_context().get_node_id())
        self._letter: Any = None  # the next message, asked for and not there yet
        self._actor: dict[int, Any] = {}
        self._work: dict[Any, int] = {}  # calls under way → worker
        self._life: dict[int, int] = {}  # how often a worker was started
        self.where: dict[int, str] = {}  # host and process of a worker that was ready

    def start(self, worker: int) -> None:
        self.kill(worker)
        life = self._life[worker] = self._life.get(worker, 0) + 1
        remote = self._ray.remote(**self._needs, max_restarts=0, max_task_retries=0)(_Actor)
        actor = self._actor[worker] = remote.remote(self._told, self._inbox, (worker, life))
        self._work[actor.version.remote()] = worker

    def give(self, worker: int, task: Task, files: Mapping[str, m.Lent], stages: Mapping[str, Any]) -> None:
        self._work[self._actor[worker].do.remote(task, dict(files), dict(stages))] = worker

    def next(self, timeout_s: float) -> tuple[int, m.Message] | None:
        from ray.exceptions import RayActorError, RayError

        if self._raylet and not _listens(
            self._raylet
        ):  # some seconds later Ray ends this process without a word
            raise LeakfastError(_GONE.format("the raylet of this machine has died."))
        if self._letter is None:
            self._letter = self._inbox.actor.get.remote()
        ready, _ = self._ray.wait([self._letter, *self._work], num_returns=1, timeout=timeout_s)
        for one in ready:
            if one is self._letter:
                self._letter = None
                try:
                    (worker, life), said = self._ray.get(one)
                except RayError as error:
                    raise LeakfastError(_GONE.format(_first_line(error))) from None
                if isinstance(said, m.Ready):
                    self.where[worker] = said.where
                return (worker, said) if life == self._life[worker] else None
            worker = self._work.pop(one)
            try:
                self._check_version(self._ray.get(one))
            except RayActorError as error:
                self.kill(worker)
                return worker, m.Died(_first_line(error))
        return None

    def _check_version(self, found: str | None) -> None:
        if found not in (None, __version__):
            raise InputError(
                f"run: a node of the cluster has leakfast {found}, this one {__version__}. Install the same."
            )

    def kill(self, worker: int) -> None:
        if actor := self._actor.pop(worker, None):
            self._ray.kill(actor)
            self._work = {call: of for call, of in self._work.items() if of != worker}

    def close(self) -> None:
        for worker in list(getattr(self, "_actor", {})):
            self.kill(worker)
        self._ray.shutdown()


def _of_each(nodes: Sequence[Mapping[str, Any]], kind: str) -> list[int]:
    """How many GPUs, or cores (kind as Ray names it), each node has."""
    return [int(node["Resources"].get(kind, 0)) for node in nodes]


def _raylet_of(nodes: Sequence[Mapping[str, Any]], node: str) -> str | None:
    """The socket of the raylet of a node, a path; None where it has none in the file system (Windows)."""
    path = next((one.get("RayletSocketName") for one in nodes if one["NodeID"] == node), None)
    return path if path and Path(path).is_socket() else None


def _listens(path: str) -> bool:
    """Whether a process listens at a socket in the file system; one that is killed leaves it behind."""
    with socket.socket(socket.AF_UNIX) as made:
        made.settimeout(5)
        try:
            made.connect(path)
        except TimeoutError:
            return True  # busy
        except OSError:
            return False
    return True


def _threads(cores: Sequence[int], size: int) -> int:
    """Cores of each of `size` actors, as many as let all of them lie on nodes of so many `cores`; at least one."""
    most = max(1, sum(cores) // size)
    return next((n for n in range(most, 1, -1) if sum(one // n for one in cores) >= size), 1)


class _Actor:
    """What runs on a node."""

    def __init__(self, told: tuple[Any, ...], inbox: Any, who: tuple[int, int]) -> None:
        import atexit

        import ray

        from leakfast.cluster import scratch
        from leakfast.cluster.worker import Worker
        from leakfast.models import threads

        study, only, level, n = told
        logging.getLogger("leakfast").setLevel(level)
        logging.getLogger("leakfast").propagate = False
        threads.ask(n)
        folder = scratch.folder()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)

        def send(message: m.Message) -> None:
            ray.get(inbox.actor.put.remote((who, message)))

        self._worker = Worker(study, only, folder / "run", send)

    def version(self) -> str:
        return __version__

    def do(self, task: Task, files: Mapping[str, m.Lent], stages: Mapping[str, Any]) -> None:
        self._worker.do(task, files, stages)


def _connected(address: str) -> Any:
    """ray, in a cluster. Raises InputError."""
    if importlib.util.find_spec("ray") is None:  # before anything of the cluster is looked for
        raise InputError(
            'run: --cluster given, but ray is not installed. Type: pip install "leakfast[cluster]", on every node.'
        )
    found = _running() if address == "auto" else address
    if found is not None and not _answers(found):
        raise InputError(
            f"run: --cluster {address} given, but no Ray cluster answers at {found}. Start one: ray start --head on one "
            "machine, ray start --address HOST:PORT on the others; or give --cluster auto where none runs."
        )
    if found is None:
        # Ray takes a loopback address for its nodes where it was told that there are no others, and by nothing else: given
        # as an address, 127.0.0.1 is replaced by the machine's own on Linux. Read when ray is imported.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault(
            "RAY_worker_niceness", "0"
        )  # 15 by itself: beside anything else they would starve
    with optional("ray", "run: --cluster needs", 'pip install "leakfast[cluster]", on every node'):
        import ray

    about: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": False,
    }
    if found is not None:
        # of a cluster of this machine Ray looks by itself whether it asks for a token; to an address it shows none unasked
        here = address == "auto" and "RAY_ADDRESS" not in os.environ
        with _Told(_refused(found), InputError):
            ray.init(address="auto" if here else found, **about)
        return ray
    log.info("cluster: none runs here; one is started on this machine")
    with _Told(_unstarted(), LeakfastError):
        ray.init(include_dashboard=False, **about)
    for node in ray.nodes():
        if not node["NodeManagerAddress"].startswith("127."):
            log.warning(
                "cluster: Ray listens at %s, beyond this machine, because it was imported before; whoever reaches it may run "
                "code as you",
                node["NodeManagerAddress"],
            )
    return ray


def _running() -> str | None:
    """HOST:PORT of the cluster that runs here: what RAY_ADDRESS says, or the one that was started last, if it answers."""
    if told := os.environ.get("RAY_ADDRESS"):
        return told
    noted = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    address = noted.read_text(encoding="utf-8").strip() if noted.is_file() else ""
    return address if address and _answers(address) else None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


class _Told:
    """Says in a line why Ray did not start, or took no driver: it raises errors of several kinds, of no kind where it was not
    up after 30 s. said: with a place for Ray's own words."""

    def __init__(self, said: str, kind: type[LeakfastError]) -> None:
        self.said, self.kind = said, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):  # whole with LEAKFAST_DEBUG=1
            raise self.kind(self.said.replace("{}", _in_a_line(error))) from error


def _unstarted() -> str:
    logs = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "session_latest" / "logs"
    return (
        f"run: Ray could not be started on this machine: {{}} Its logs lie in {logs}. Where the machine was busy, run the "
        "same command again; --workers N takes processes of this machine without Ray."
    )


def _refused(address: str) -> str:
    return (
        f"run: the Ray cluster at {address} takes no driver from here: {{}} A cluster that asks for a token (that of a newer "
        "Ray does, where its machine has one) needs it from every node and from this command: set RAY_AUTH_MODE=token and "
        "have the same token in ~/.ray/auth_token or RAY_AUTH_TOKEN. docs/clusters.md says how."
    )


def _in_a_line(error: BaseException) -> str:
    """What an error says, of two versions of Ray for one in nine lines, as a sentence of 300 signs at most."""
    said = " ".join(str(error).split())
    return (said if len(said) <= 300 else f"{said[:299]}…").rstrip(".") + "."


def _first_line(error: BaseException) -> str:
    """The first line of what an error says, as a sentence."""
    return str(error).strip().partition("\n")[0].rstrip(".") + "."
