"""Arguments and results in; JSON that names safetensors files and checkpoint folders out: how values cross to a worker process and back."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from saehub import api
from saehub.errors import SaehubError

# Plain data classes that cross by value.
BY_VALUE = {kind.__name__: kind for kind in (api.Job, api.Measurement, api.ModelSpec, api.ModelShape)}


class Wire:
    """Encodes and decodes values through a scratch folder that both processes see."""

    def __init__(self, scratch: Path, keep: Callable[[Any], int] | None = None, fetch: Callable[[int], Any] | None = None):
        self.scratch = Path(scratch)
        self._count = itertools.count()
        self._keep, self._fetch = keep, fetch

    def encode(self, value: Any) -> Any:
        """Plain data for `value`; objects that cannot cross stay where they are and travel as a number (worker side only)."""
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Path):
            return {"$path": str(value)}
        if isinstance(value, dict):
            return {"$map": [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        if isinstance(value, tuple):
            return {"$tuple": [self.encode(item) for item in value]}
        if isinstance(value, (list, set, frozenset)):
            return [self.encode(item) for item in value]
        if isinstance(value, SaehubError):
            return {"$error": value.to_json()}

        import torch

        if isinstance(value, torch.Tensor):
            return {"$tensor": self._write_tensor(value)}
        from saehub.checkpoint.sae import SAE

        if isinstance(value, SAE):
            from saehub.checkpoint.format import save

            path = self._fresh("sae")
            save(value, path)
            return {"$sae": str(path)}
        if isinstance(value, api.Rows):
            return {"$rows": self.encode(vars(value))}
        if isinstance(value, api.EvalContext):
            return {"$evaluation": self.encode(_context_spec(value))}
        if type(value).__name__ in BY_VALUE and is_dataclass(value):
            return {"$data": type(value).__name__, "of": self.encode(asdict(value))}
        if type(value).__name__ == "ModelHandle":
            return {"$model": asdict(value.spec)}
        if type(value).__name__ == "TokenDataset":
            return {"$tokens": str(value.path)}
        if isinstance(value, api.CalibrationRows):
            return {"$calibration": self.encode([value.x_ND, value.y_ND])}
        if self._keep is not None:
            if hasattr(value, "__next__") or hasattr(value, "send"):  # generators are drained: Measurements, mostly
                return [self.encode(item) for item in value]
            return {"$ref": self._keep(value), "type": type(value).__name__}
        raise TypeError(f"a {type(value).__name__} cannot be sent to a worker")

    def decode(self, data: Any) -> Any:
        """The value that `encode` described."""
        if isinstance(data, list):
            return [self.decode(item) for item in data]
        if not isinstance(data, dict):
            return data
        (tag, content), *rest = data.items()
        match tag:
            case "$path":
                return Path(content)
            case "$map":
                return {self.decode(key): self.decode(item) for key, item in content}
            case "$tuple":
                return tuple(self.decode(item) for item in content)
            case "$tensor":
                return self._read_tensor(content)
            case "$sae":
                from saehub.checkpoint.format import load

                return load(Path(content))
            case "$rows":
                return api.Rows(**self.decode(content))
            case "$evaluation":
                from saehub.pipeline.evaluation import open_context

                return open_context(self.decode(content))
            case "$model":
                from saehub.data.model import ModelHandle

                return ModelHandle.load(api.ModelSpec(**content))
            case "$tokens":
                from saehub.data.tokens import TokenDataset

                return TokenDataset.open(Path(content))
            case "$calibration":
                return api.CalibrationRows(*self.decode(content))
            case "$data":
                return BY_VALUE[content](**self.decode(rest[0][1]))
            case "$ref" if self._fetch is not None:
                return self._fetch(content)
        raise TypeError(f"unknown value on the wire: {tag}")

    def _fresh(self, stem: str) -> Path:
        return self.scratch / f"{stem}-{id(self):x}-{next(self._count)}"

    def _write_tensor(self, tensor: Any) -> str:
        from safetensors.torch import save_file

        path = self._fresh("tensor").with_suffix(".safetensors")
        save_file({"value": tensor.detach().cpu().contiguous().clone()}, path)
        return str(path)

    @staticmethod
    def _read_tensor(path: str) -> Any:
        from safetensors.torch import load

        file = Path(path)
        value = load(file.read_bytes())["value"]  # read, not mapped: the file goes away now
        file.unlink()
        return value


def _context_spec(context: api.EvalContext) -> dict:
    spec = getattr(context, "spec", None)
    if spec is None:
        raise TypeError("this EvalContext was not made by the hub and cannot be sent to a worker")
    return spec
