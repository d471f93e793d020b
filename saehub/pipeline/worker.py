"""Requests on a pipe in; a wrapped library's component run in this process, apart from everything else, and its answers out."""

from __future__ import annotations

import os
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from saehub.pipeline.pipe import Duplex


class Worker:
    """Serves one parent: makes components, calls their methods, keeps what cannot cross (an open training session) under a number."""

    def __init__(self, connection: Duplex, scratch: Path):
        from saehub.pipeline.wire import Wire

        self.connection = connection
        self.objects: dict[int, Any] = {}
        self.kept = 0
        self.wire = Wire(scratch, keep=self._keep, fetch=self.objects.__getitem__)

    def _keep(self, value: Any) -> int:
        self.kept += 1
        self.objects[self.kept] = value
        return self.kept

    def serve(self) -> None:
        """Answer until the parent closes the pipe."""
        while True:
            try:
                request = self.connection.recv()
            except EOFError:
                return
            try:
                answer = {"ok": self.wire.encode(self._do(request))}
            except KeyboardInterrupt:
                return
            except BaseException as error:
                answer = {"error": _describe(error, request)}
            self.connection.send(answer)

    def _do(self, request: dict) -> Any:
        match request["op"]:
            case "create":
                from saehub.pipeline.local import make_local

                return make_local(request["kind"], request["address"], self.wire.decode(request["config"]))
            case "call":
                method = getattr(self.objects[request["ref"]], request["method"])
                return method(*self.wire.decode(request["args"]), **self.wire.decode(request["kwargs"]))
            case "offers":
                return hasattr(self.objects[request["ref"]], request["name"])
            case "get":
                return getattr(self.objects[request["ref"]], request["name"])
            case "steps":  # many batches in one message: a message a step would cost more than the step
                session = self.objects[request["ref"]]
                inputs, targets, batch = self.wire.decode(request["x"]), self.wire.decode(request["y"]), request["batch"]
                for start in range(0, inputs.shape[0], batch):
                    session.step(inputs[start : start + batch], None if targets is None else targets[start : start + batch])
                return session.metrics()
            case "drop":
                self.objects.pop(request["ref"], None)
                return None
        raise ValueError(f"unknown request {request['op']!r}")


def _describe(error: BaseException, request: dict) -> dict:
    from saehub.errors import SaehubError

    if isinstance(error, SaehubError):
        return error.to_json()
    words = "".join(traceback.format_exception_only(error)).strip()
    return {
        "type": "StageFailed",
        "what": f"{request.get('address') or request.get('method') or request['op']} failed in its worker",
        "where": _deepest(error),
        "why": None,
        "fix": "SAEHUB_TRACE=1 shows the whole trace",
        "said": words if os.environ.get("SAEHUB_TRACE") != "1" else "".join(traceback.format_exception(error)),
    }


def _deepest(error: BaseException) -> str | None:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


def main() -> None:
    """`python -m saehub.pipeline.worker READ_FD WRITE_FD SCRATCH`, started by `components.WorkerProcess`."""
    requests, answers, scratch = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    os.dup2(2, 1)  # a library that prints must not reach the parent's stdout, which is data
    connection = Duplex(Connection(requests, writable=False), Connection(answers, readable=False))
    Worker(connection, scratch).serve()


if __name__ == "__main__":
    main()
