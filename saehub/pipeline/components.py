"""A registered component and its settings in; an instance out, here or as a proxy of one that lives in its plugin's worker process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import deque
from dataclasses import asdict, is_dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from saehub.errors import StageFailed, from_json
from saehub.pipeline.local import configured
from saehub.pipeline.pipe import Duplex
from saehub.pipeline.wire import Wire
from saehub.plugins import Registered, catalog


class WorkerProcess:
    """One spawned process for one plugin, reused over stages; its death is a StageFailed with its last words."""

    def __init__(self, plugin: str, env: dict[str, str], log: Path | None = None):
        self.plugin = plugin
        self.env = env
        self.scratch = tempfile.TemporaryDirectory(prefix="saehub-worker-", dir=_fast_scratch())
        self.wire = Wire(Path(self.scratch.name), fetch=None)
        self.last_words: deque[str] = deque(maxlen=40)
        self.released: deque[int] = deque()
        """Objects in the worker that nothing here refers to any more; it is told with the next request."""
        down_read, down_write = os.pipe()
        up_read, up_write = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "saehub.pipeline.worker", str(down_read), str(up_write), self.scratch.name],
            pass_fds=(down_read, up_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **_threads(), **env, "SAEHUB_WORKER": plugin, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches us, who then stop the worker in order
        )
        os.close(down_read)
        os.close(up_write)
        self.connection = Duplex(Connection(up_read, writable=False), Connection(down_write, readable=False))
        self._log = open(log, "a", encoding="utf-8") if log else None  # noqa: SIM115
        self._drain = threading.Thread(target=self._read_stderr, daemon=True)
        self._drain.start()

    def _read_stderr(self) -> None:
        for line in self.process.stderr:
            self.last_words.append(line.rstrip())
            if self._log:
                self._log.write(line)
                self._log.flush()

    def ask(self, request: dict) -> Any:
        """Send one request, wait for its answer; errors arrive as SaehubErrors."""
        while self.released:
            self._send({"op": "drop", "ref": self.released.popleft()})
        return self._send(request)

    def _send(self, request: dict) -> Any:
        try:
            self.connection.send(request)
            answer = self.connection.reader.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._died() from error
        import json

        data = json.loads(answer)
        if "error" in data:
            error = from_json(data["error"])
            error.where = error.where or f"worker of {self.plugin}"
            raise error
        return self._receive(data["ok"])

    def _receive(self, data: Any) -> Any:
        if isinstance(data, dict) and "$ref" in data:
            return Remote(self, data["$ref"], data["type"])
        return self.wire.decode(data)

    def _died(self) -> StageFailed:
        code = self.process.wait(timeout=10)
        self._drain.join(timeout=2)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = "out of memory, most likely: fewer jobs or a smaller batch" if code == -signal.SIGKILL else "SAEHUB_TRACE=1 shows more"
        return StageFailed(
            f"the worker of {self.plugin} died ({how})", where=f"process {self.process.pid}", fix=hint, said="\n".join(self.last_words) or None
        )

    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def close(self) -> None:
        """Ask it to end, then make it."""
        self.connection.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._drain.join(timeout=2)
        if self._log:
            self._log.close()
        self.scratch.cleanup()


def _threads() -> dict[str, str]:
    """The threads of this process for the worker too: they are what is recorded, and they can change the last bits."""
    torch = sys.modules.get("torch")
    return {"OMP_NUM_THREADS": str(torch.get_num_threads())} if torch is not None else {}


def _fast_scratch() -> str | None:
    """Shared memory where there is plenty of it (containers often have 64 MB), else the usual temporary folder."""
    shared = "/dev/shm"
    roomy = os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 4_000_000_000
    return shared if roomy else None


class Remote:
    """An object in a worker; calling a method sends the arguments across."""

    def __init__(self, worker: WorkerProcess, ref: int, kind: str):
        self._worker, self._ref, self._kind = worker, ref, kind
        weakref.finalize(self, worker.released.append, ref).atexit = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in ("widths", "n_batches"):
            return self._worker.ask({"op": "get", "ref": self._ref, "name": name})

        def call(*args: Any, **kwargs: Any) -> Any:
            wire = self._worker.wire
            request = {"op": "call", "ref": self._ref, "method": name, "args": wire.encode(list(args)), "kwargs": wire.encode(kwargs)}
            return self._worker.ask(request)

        return call

    def steps(self, x_ND: Any, y_ND: Any, batch: int) -> dict[str, float]:
        """Many optimizer steps in one message; the metrics of the last one."""
        wire = self._worker.wire
        return self._worker.ask({"op": "steps", "ref": self._ref, "x": wire.encode(x_ND), "y": wire.encode(y_ND), "batch": batch})

    def offers(self, method: str) -> bool:
        """Whether the object in the worker has that method."""
        return self._worker.ask({"op": "offers", "ref": self._ref, "name": method})

    def __repr__(self) -> str:
        return f"<{self._kind} in the worker of {self._worker.plugin}>"


def optional(instance: Any, method: str, *args: Any) -> Any:
    """`instance.method(*args)`, here or in its worker; None where it has no such method."""
    offered = instance.offers(method) if isinstance(instance, Remote) else hasattr(instance, method)
    return getattr(instance, method)(*args) if offered else None


class Components:
    """Instances for one run: local where `requires` is empty, in the plugin's worker otherwise."""

    def __init__(self, log_dir: Path | None = None):
        self._workers: dict[tuple, WorkerProcess] = {}
        self._log_dir = log_dir

    def make(self, registered: Registered, config: Any) -> Any:
        """`Class(config)`, or a Remote of it."""
        catalog().require(registered)
        if not registered.component.requires:
            return registered.load()(configured(registered, config))
        worker = self._worker(registered)
        plain = asdict(config) if is_dataclass(config) else (config or {})
        request = {"op": "create", "kind": registered.kind, "address": registered.address, "config": worker.wire.encode(plain)}
        return worker.ask(request)

    def _worker(self, registered: Registered) -> WorkerProcess:
        env = dict(registered.component.env)
        name = (registered.plugin, tuple(sorted(env.items())))
        worker = self._workers.get(name)
        if worker is None or not worker.alive():
            log = self._log_dir / f"worker-{registered.plugin}.log" if self._log_dir else None
            worker = self._workers[name] = WorkerProcess(registered.plugin, env, log)
        return worker

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def __enter__(self) -> Components:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def call_component(registered: Registered, config: Any, method: str, **kwargs: Any) -> Any:
    """One call of one component, in a worker of its own where it needs one."""
    with Components() as components:
        return getattr(components.make(registered, config), method)(**kwargs)

