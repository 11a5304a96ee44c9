"""Where runs are run: in this process, in several of this machine, or on a Ray cluster.

Each kind of workers takes jobs (a run's values under a key) and hands back results one by one. A
run is told apart from its folder alone, so it does not matter where it was run, or that another
``lorapro compare`` works on the same folder: whoever holds a run's lock trains it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import traceback
from collections.abc import Callable, Hashable, Mapping
from multiprocessing import connection, get_context
from typing import Any, Protocol

from lorapro.experiments import folders
from lorapro.experiments.errors import UserError

__all__ = ["BACKENDS", "Here", "Processes", "RayWorkers", "Workers", "run_values"]

BACKENDS = ("local", "ray")

BUSY, LOST = "busy", "lost"
"""Status of a job that another process has, or whose worker was killed."""

Result = dict[str, Any]


class Workers(Protocol):
    """Something that runs jobs; ``size`` of them at a time."""

    size: int

    def submit(self, key: Hashable, values: Mapping[str, Any]) -> None:
        """Take a job."""

    def wait(self) -> tuple[Hashable, Result]:
        """Return the key and the result of a job that is done, when there is one."""

    def close(self) -> None:
        """Stop; jobs that are running are given up, their runs go on from their checkpoints."""


class Tasks:
    """Prepared tasks by what they depend on, the last few: runs of one task follow each other."""

    most = 4

    def __init__(self, log: Callable[[str], None] | None = None) -> None:
        self._known: dict[str, Any] = {}
        self._log = log

    def of(self, config: Any) -> Any:
        """Return the prepared task of a configuration."""
        from lorapro.experiments.runner import make_task

        run, family = config.run, config.family()
        samples = (run.train_samples, run.validation_samples, run.test_samples, run.split_seed)
        source = (family.model_name, family.data_name, family.data_config, run.dtype)
        name = repr((config.entry.name, config.task, *source, *samples))
        if name not in self._known:
            while len(self._known) >= self.most:
                del self._known[next(iter(self._known))]
            self._known[name] = make_task(config, self._log)
        return self._known[name]


def run_values(
    values: Mapping[str, Any], tasks: Tasks, on_step: Callable[[int, int], None] | None = None
) -> Result:
    """Run one configuration; never raises for what goes wrong inside the run.

    A run that fails leaves ``error.txt`` and a result with ``"status": "failed"``; it is tried
    again by the next comparison.
    """
    from lorapro.experiments.config import from_values
    from lorapro.experiments.runner import run

    config = from_values(values)
    try:
        result = run(config, tasks.of(config), on_step=on_step or (lambda done, total: None))
    except folders.BusyError:
        return {"status": BUSY}
    except Exception as error:  # out of memory, say: the others go on
        result = _failed(config, error)
    folders.clear_checkpoints(config.folder)
    gc.collect()  # the last model's reference cycles, before the next model is built
    return result


def _failed(config: Any, error: Exception) -> Result:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    result = {
        "status": "failed",
        "task": config.entry.name,
        "method": config.method.name,
        "learning_rate": config.training.learning_rate,
        "seed": config.training.seed,
        "steps": None,
        "metrics": {"validation": {"loss": None}, "test": {}},
        "error": reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}",
        "fingerprint": config.fingerprint(),
        "identity": config.identity(),
    }
    with contextlib.suppress(OSError):
        config.folder.mkdir(parents=True, exist_ok=True)
        folders.claim(config)
        folders.write_text(config.folder / folders.ERROR, traceback.format_exc())
        folders.write_json(config.folder / folders.RESULT, result)
    return result


class Here:
    """This process, one run at a time."""

    size = 1

    def __init__(self, tasks: Tasks, on_step: Callable[[int, int], None] | None = None) -> None:
        self._tasks, self._on_step = tasks, on_step
        self._jobs: list[tuple[Hashable, Mapping[str, Any]]] = []

    def submit(self, key: Hashable, values: Mapping[str, Any]) -> None:
        """Remember the job."""
        self._jobs.append((key, values))

    def wait(self) -> tuple[Hashable, Result]:
        """Run the job."""
        key, values = self._jobs.pop(0)
        return key, run_values(values, self._tasks, self._on_step)

    def close(self) -> None:
        """Nothing to stop."""


class _Process:
    """One worker process, and what it is doing."""

    def __init__(self, number: int, threads: int) -> None:
        context = get_context("spawn")
        self.number = number
        self.key: Hashable | None = None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, number, threads))
        self.process.start()
        theirs.close()


def _serve(pipe: Any, number: int, threads: int) -> None:
    """Run what comes through the pipe, until it is closed: the parent is gone then."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown and "," in shown:  # one GPU a process, in turn
        devices = shown.split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    from lorapro.cli.common import quiet_libraries

    quiet_libraries()
    tasks = Tasks()
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            pipe.send(run_values(pipe.recv(), tasks))


class Processes:
    """Several processes of this machine.

    Cores are shared out evenly (unless ``OMP_NUM_THREADS`` is set); with several GPUs, list them in
    ``CUDA_VISIBLE_DEVICES`` and each process gets one in turn. A process that is killed is
    replaced, and its job handed back as lost.
    """

    def __init__(self, count: int) -> None:
        self.size = count
        threads = max(1, (os.cpu_count() or 1) // count)
        self._start = lambda number: _Process(number, threads)
        self._workers = [self._start(number) for number in range(count)]

    def submit(self, key: Hashable, values: Mapping[str, Any]) -> None:
        """Give the job to a free process."""
        worker = next(w for w in self._workers if w.key is None)
        worker.key = key
        with contextlib.suppress(BrokenPipeError):  # it was killed: seen when waiting
            worker.pipe.send(dict(values))

    def wait(self) -> tuple[Hashable, Result]:
        """Return what the first process that is done has to say."""
        busy = {worker.pipe: worker for worker in self._workers if worker.key is not None}
        (pipe, *_) = connection.wait(list(busy))
        worker = busy[pipe]  # type: ignore[index]
        key, worker.key = worker.key, None
        assert key is not None
        try:
            return key, worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            code = worker.process.exitcode
            self._workers[self._workers.index(worker)] = self._start(worker.number)
            return key, {"status": LOST, "error": f"its process was killed (exit code {code})"}

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()


_RAY_TASKS: list[Tasks] = []


def _on_ray(values: Mapping[str, Any], folder: str) -> Result:
    """Run one job in a Ray worker, in the folder that the paths are relative to."""
    from lorapro.cli.common import quiet_libraries

    if os.path.isdir(folder):
        os.chdir(folder)
    if not _RAY_TASKS:
        quiet_libraries()
        _RAY_TASKS.append(Tasks())
    return run_values(values, _RAY_TASKS[0])


class RayWorkers:
    """A Ray cluster: the one that ``RAY_ADDRESS`` names or that runs here, else one made here.

    Every node must see the same files under the same paths (code, data, ``output_dir``). A run asks
    for one GPU where the cluster has any, else for one CPU; ``count`` bounds the runs at a time.
    """

    def __init__(self, count: int | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise UserError(
                "--backend ray needs the package 'ray', which is not installed; run: "
                "pip install 'lorapro[ray]'"
            ) from None
        self._ray = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            options: dict[str, Any] = {
                "log_to_driver": False,
                "include_dashboard": False,
                "logging_level": logging.ERROR,
            }
            if "RAY_ADDRESS" in os.environ:
                del options["include_dashboard"]
            elif count is not None:
                options["num_cpus"] = count
            ray.init(**options)
        resources = ray.cluster_resources()
        kind = "GPU" if resources.get("GPU") else "CPU"
        self.size = count or max(1, int(resources.get(kind, 1)))
        chosen: dict[str, Any] = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
        self._run = ray.remote(**chosen, max_retries=0)(_on_ray)
        self._jobs: dict[Any, Hashable] = {}

    def submit(self, key: Hashable, values: Mapping[str, Any]) -> None:
        """Queue the job."""
        self._jobs[self._run.remote(dict(values), os.getcwd())] = key

    def wait(self) -> tuple[Hashable, Result]:
        """Return the first result there is."""
        (done, *_), _ = self._ray.wait(list(self._jobs))
        key = self._jobs.pop(done)
        try:
            result: Result = self._ray.get(done)
        except self._ray.exceptions.WorkerCrashedError:
            return key, {"status": LOST, "error": "its Ray worker was killed"}
        return key, result

    def close(self) -> None:
        """Give up what runs; shut Ray down if it was started here."""
        for job in self._jobs:
            self._ray.cancel(job, force=True)
        if self._ours:
            self._ray.shutdown()
