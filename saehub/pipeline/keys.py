"""What determines a result in; the content key of the stage that makes it out. Device, threads and torch version are recorded, not keyed."""

from __future__ import annotations

import platform
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from saehub.jsonio import hash_json, sha256_file
from saehub.plugins import Registered

KEY_FORMAT = 1  # raise it when the core itself would make something else of the same plan


def stage_key(kind: str, **parts: Any) -> str:
    """SHA-256 over everything that could change the result."""
    return hash_json({"key_format": KEY_FORMAT, "kind": kind, **parts})


def component_identity(registered: Registered, config: Any) -> dict:
    """Address, cache version, settings, contents of the files that these name (`config.files()`), and versions of the distributions it requires."""
    versions = registered.library_versions()
    versions.pop(registered.distribution, None)
    files = [path for path in (config.files() if callable(getattr(config, "files", None)) else ()) if Path(path).exists()]
    return {
        "address": registered.address,
        "cache_version": registered.component.cache_version,
        "config": plain_config(config),
        "libraries": versions,
        **({"files": [tree_hash(Path(path)) for path in files]} if files else {}),
    }


def plain_config(config: Any) -> Any:
    """A config dataclass as JSON data."""
    if config is None:
        return {}
    return asdict(config) if is_dataclass(config) else dict(config)


def source_identity(entry: Any) -> dict:
    """A text source: for builtin ones the interpreter whose library is read, for local ones the contents, for hub ones the revision."""
    identity = {key: value for key, value in asdict(entry).items() if key not in ("streaming", "tokens")}
    source = entry.source
    if source.startswith("builtin/"):
        identity["python"] = f"{platform.python_implementation()} {platform.python_version()}"
    elif (path := Path(source).expanduser()).exists():
        identity |= {"source": "files", "contents": tree_hash(path)}  # wherever they lie
    return identity


def tree_hash(path: Path) -> str:
    """SHA-256 over the names and contents of a file, or of every file of a folder in order of name."""
    path = Path(path)
    if path.is_file():
        return sha256_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return hash_json([[file.relative_to(path).as_posix(), sha256_file(file)] for file in files])
