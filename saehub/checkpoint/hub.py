"""A hub id in, a local folder (or file) and the commit it came from out (`hf://org/repo[@revision][/folder]`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from saehub.errors import MissingDependency, UsageError

BESIDE = ("config.json", "config.yaml", "README.md")
"""Texts that say what a weight file is, in the layouts whose SAEs are single files."""
_PART = re.compile(r"[\w.+=-]+")


def parse(text: str) -> tuple[str, str | None, str]:
    """Repository, revision or None, folder or ''; a UsageError shows the grammar. A revision with a slash is given separately."""
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w.-]+))?((?:/[^/]+)*)/?", text)
    folder = match[3].strip("/") if match else ""
    parts = [*match[1].split("/"), *(folder.split("/") if folder else [])] if match else []
    if not match or any(not _PART.fullmatch(part) or part in (".", "..") for part in parts):
        raise UsageError(f"{text!r} is not a hub id", fix="hf://ORGANISATION/REPOSITORY[@REVISION][/FOLDER]")
    return match[1], match[2], folder


def download(text: str, *, revision: str | None = None) -> tuple[Path, dict[str, Any]]:
    """The folder or file on this machine (downloaded, or from the cache when offline) and `{"id", "revision", "commit"}`."""
    repo, in_id, folder = parse(text)
    revision = revision or in_id
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingDependency("hub ids need huggingface_hub, which is not installed", fix="pip install huggingface_hub") from error
    try:
        root = Path(snapshot_download(repo, revision=revision, allow_patterns=_patterns(folder)))
    except Exception as error:  # the client raises a dozen kinds, from requests', httpx' and its own families
        raise UsageError(
            f"{text} could not be downloaded",
            why=_reason(error),
            fix=f"check the id and revision; offline, fetch it once on a connected machine: hf download {repo}; gated: hf auth login",
            said=str(error) or type(error).__name__,
        ) from error
    path = root / folder
    if not path.exists():
        raise UsageError(
            f"{text}: the repository has no folder {folder!r}",
            why=f"it has {', '.join(sorted(p.name for p in root.iterdir())[:12]) or 'nothing'}",
        )
    return path, {"id": text, "repository": repo, "folder": folder, "revision": revision or "main", "commit": root.name}


def _patterns(folder: str) -> list[str] | None:
    """What to fetch: everything, a folder, or one file with the texts beside it (some layouts keep several SAEs in one folder)."""
    if not folder:
        return None
    beside = folder.rpartition("/")[0]
    return [f"{folder}/*", folder, *(f"{beside}/{name}" if beside else name for name in BESIDE)]


def _reason(error: Exception) -> str:
    kind = type(error).__name__
    known = {
        "LocalEntryNotFoundError": "it is not in the local cache and the hub cannot be reached",
        "OfflineModeIsEnabled": "it is not in the local cache and HF_HUB_OFFLINE is set",
        "RepositoryNotFoundError": "no such repository, or it is private",
        "GatedRepoError": "the repository is gated: its owner must grant access first",
        "RevisionNotFoundError": "the repository has no such revision",
    }
    return known.get(kind, kind)
