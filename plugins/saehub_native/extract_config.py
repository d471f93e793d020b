"""The settings of `native/hf` and `native/files`, without torch; a folder of activations in, what it holds out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class HFConfig:
    """`native/hf` has no settings of its own: model, dtype, attention and batch are the recipe's."""


@dataclass(frozen=True)
class FilesConfig:
    """Activations that exist already.

    `path` is a folder in one of two layouts, files in the order of their names:

    * `*.safetensors`, each with one tensor a site, named after it (`resid_post.6`), and optionally `token_ids`, `positions` and `sequences`;
      what the hub itself stores has this layout;
    * `resid_post.6.npy`, or a folder `resid_post.6/` of `.npy` parts, a site; optionally `token_ids`, `positions`, `sequences` likewise.

    A tensor is [rows, d] or [sequences, positions, d]; ids are [rows] or [sequences, positions].
    """

    path: str
    """The folder."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Site -> name of its tensor or file, where that is not the site itself."""
    exclude_ids: tuple[int, ...] = ()
    """Token ids whose rows are dropped (needs `token_ids`)."""

    def describe(self) -> dict[str, Any]:
        """`widths` (site -> d), `rows` (after exclusion) and `hash` (SHA-256 over the files): what a plan needs. Errors name file and fix."""
        from saehub_native.files_layout import Layout

        layout = Layout.scan(self)
        return {"widths": dict(layout.widths), "rows": layout.kept_rows(), "hash": layout.content_hash()}
