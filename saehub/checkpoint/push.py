"""A checkpoint folder of any known format in; the same folder on the Hugging Face hub, in one commit with a model card, out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saehub.checkpoint.hub import parse
from saehub.errors import MissingDependency, SaehubError, UsageError

CARD = "README.md"


def check(target: str) -> tuple[str, str]:
    """Repository and folder of `hf://org/repo[/folder]`, if an upload can be tried at all; UsageError for a malformed id, for offline mode
    and for a missing token. Nothing is sent: what `convert --push` asks before it starts to work."""
    repo, revision, folder = parse(target)
    if revision is not None:
        raise UsageError(f"{target!r} names a revision", why="an upload makes a new one", fix=target.replace(f"@{revision}", ""))
    try:
        from huggingface_hub import constants, get_token
    except ImportError as error:
        raise MissingDependency("an upload needs huggingface_hub, which is not installed", fix="pip install huggingface_hub") from error
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"{target}: nothing can be uploaded", why="HF_HUB_OFFLINE is set", fix="unset HF_HUB_OFFLINE")
    if not get_token():
        raise UsageError(
            f"{target}: nothing can be uploaded", why="no access token was found", fix="hf auth login (with a write token), or set HF_TOKEN"
        )
    return repo, folder


def push(
    path: str | Path, target: str, *, private: bool = False, message: str | None = None, figures: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Upload the folder `path` to `hf://org/repo[/folder]`; returns `{"id", "repository", "folder", "commit", "url"}`.

    The repository is made if need be (`private` counts only then). A model card README.md is added to the folder, unless the folder has
    its own, and one that points to the folder to a repository that has none; `figures` (metric -> value) are put into the card. Everything
    is one commit. FormatError: not a checkpoint. UsageError: wrong id, no token, no permission, no network; nothing was changed then.
    """
    from saehub.checkpoint.card import card, front_page
    from saehub.checkpoint.inspect import inspect

    repo, folder = check(target)
    path, address = Path(path), f"hf://{repo}" + (f"/{folder}" if folder else "")
    about = inspect(path)
    if not path.is_dir():
        raise UsageError(f"{path} is a file", fix="name the checkpoint's folder")
    files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file, path)}
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        parts: dict[str, Any] = dict(files)
        if CARD not in files:
            parts[CARD] = card(about, path, address, figures).encode()
        added = {f"{folder}/{name}" if folder else name: content for name, content in parts.items()}
        if folder and not api.file_exists(repo, CARD):
            added[CARD] = front_page(about, repo, address).encode()
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in added.items()]
        done = api.create_commit(repo, operations=operations, commit_message=message or f"Add {folder or 'the checkpoint'} with saehub")
    except SaehubError:
        raise
    except Exception as error:  # the client raises a dozen kinds, from requests', httpx' and its own families
        raise _failed(target, error) from error
    return {"id": address, "repository": repo, "folder": folder, "commit": done.oid, "url": str(done.commit_url)}


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _failed(target: str, error: Exception) -> UsageError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    known = {
        401: ("the hub does not accept the access token", "hf auth login with a token that may write"),
        403: ("the access token has no permission to write there", "ask the organisation for access, or push to your own name"),
        404: ("the hub has no such repository, or hides it from this token", "check the id and the token's permissions"),
        409: ("somebody else changed the repository at the same time", "push again"),
        429: ("the hub asks to slow down", "push again later"),
    }
    why, fix = known.get(status, (type(error).__name__ + (f", HTTP {status}" if status else ""), "check the network and HF_ENDPOINT, then push again"))
    return UsageError(f"{target}: the upload failed", why=why, fix=fix, said=str(error) or type(error).__name__)
