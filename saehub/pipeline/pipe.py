"""Plain data in at one end of a pair of pipes, out at the other, as JSON."""

from __future__ import annotations

import json
from multiprocessing.connection import Connection
from typing import Any


class Duplex:
    """Two one-way pipes as one; JSON text only, so that nothing on the wire can execute."""

    def __init__(self, reader: Connection, writer: Connection):
        self.reader, self.writer = reader, writer

    def recv(self) -> Any:
        """Wait for one message; EOFError when the other side is gone."""
        return json.loads(self.reader.recv_bytes())

    def send(self, value: Any) -> None:
        """Send one message."""
        self.writer.send_bytes(json.dumps(value).encode())

    def close(self) -> None:
        """Close both directions."""
        self.reader.close()
        self.writer.close()
