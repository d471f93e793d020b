"""A recipe's tree in; whether its model, sources, devices and paths exist, and whether evaluation is apart from training, out."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from saehub.api import ModelShape
from saehub.errors import SaehubError, did_you_mean
from saehub.recipe.schema import SourceEntry
from saehub.recipe.tree import Mark, Node, Problem, show

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")  # names become folders
_NAME_RULE = "at most 100 letters, digits and . _ + -, beginning with a letter or digit"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]*)?)\s*([kKMGT]?)(i?)B")
_DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")


class Places:
    """Rules about what a recipe points at; every method reports what it finds and leaves wrong types to the schema."""

    def __init__(self, root: Node):
        self.root = root
        self.problems: list[Problem] = []

    def places(self) -> None:
        """All of them but checkpoints, which belong to entries."""
        self.name(self.root.get("name"))
        self.store_limit()
        self.model()
        self.sources()
        self.domains()

    def entries(self, section: str) -> list[Node]:
        node = self.root.get(section)
        return [item for item in node.items() if item.is_map] if node is not None else []

    def report(self, node: Node, message: str, hint: str | None = None, severity: str = "error", mark: Mark | None = None) -> None:
        self.problems.append(Problem.at(mark or node.mark, node.path, message, hint, severity))

    def blame(self, node: Node, error: SaehubError) -> None:
        """Another part's error, at the value that caused it."""
        self.report(node, error.what + (f" ({error.why})" if error.why else ""), error.fix)

    def name(self, node: Node | None) -> None:
        if node is not None and isinstance(node.data, str) and not _NAME.fullmatch(node.data):
            self.report(node, f"{show(node)} cannot be the name of a folder", _NAME_RULE)

    def store_limit(self) -> None:
        """`2 GB` becomes a number of bytes, in place."""
        extract = self.root.get("extract")
        node = extract.get("store_limit") if extract is not None else None
        if node is None or not isinstance(node.data, str):
            return
        match = _SIZE.fullmatch(node.data.strip())
        if match is None:
            self.report(node, f"{node.data!r} is not a size", "a number of bytes, or such as 500 MB, 2 GB, 1.5 TB, 2 GiB")
            node.data = 0  # reported here; the schema need not say it again
        else:
            power = "kmgt".index(match[2].lower()) + 1 if match[2] else 0
            node.data = int(float(match[1]) * (1024 if match[3] else 1000) ** power)

    def model(self) -> None:
        model = self.root.get("model")
        if model is None or not model.is_map:
            return
        name, device, shape = model.get("name"), model.get("device"), model.get("shape")
        if name is not None and isinstance(name.data, str):
            self.model_name(name)
        if device is not None and isinstance(device.data, str):
            head, _, index = device.data.partition(":")
            if head not in _DEVICES or (index and not index.isdigit()):
                near = "; did you mean 'cuda'?" if head.lower() in ("gpu", "nvidia") else did_you_mean(head, _DEVICES)
                self.report(device, f"{device.data!r} is not a device{near}", f"one of {', '.join(_DEVICES)}, with an index such as cuda:1")
        if shape is not None and shape.is_map:
            for item in fields(ModelShape):
                value = shape.get(item.name)
                if value is not None and isinstance(value.data, (int, float)) and value.data <= 0:
                    self.report(value, f"should be greater than 0, got {value.data}")
            from saehub.sites import FAMILIES

            family = shape.get("family")
            if family is not None and isinstance(family.data, str) and family.data not in (*FAMILIES, "other"):
                self.report(family, f"the family {family.data!r} is not known{did_you_mean(family.data, FAMILIES)}", f"one of {', '.join(FAMILIES)}, other")

    def model_name(self, node: Node) -> None:
        """Embedded, a folder that exists, or something that can be a hub id."""
        from saehub.builtin import MODELS

        text, embedded = node.data, [f"builtin/{key}" for key in MODELS]
        near = did_you_mean(text, [*embedded, *MODELS])
        if text.startswith("builtin/"):
            if text not in embedded:
                self.report(node, f"no embedded model is called {text!r}{near}", f"embedded: {', '.join(embedded)}")
        elif (text.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(text)) and not _exists(text):
            hint = f"a folder (relative to {Path.cwd()}), a Hugging Face id, or {', '.join(embedded)}"
            self.report(node, f"there is no model {show(text)}{near}", hint)

    def sources(self) -> None:
        from saehub.data.sources import check_source

        train, evals = self.data("train"), self.data("eval")
        for name, node in evals.data.items() if evals is not None and evals.is_map else ():
            if not _NAME.fullmatch(name):
                self.report(evals, f"{name!r} cannot be the name of a dataset", _NAME_RULE, mark=evals.keys[name])
            if node.get("mix") is not None and node.get("mix").data == []:
                self.report(node.get("mix"), "a mix of nothing", "add 'source:'")
        for node in [train, *(evals.data.values() if evals is not None and evals.is_map else ())]:
            mix = node.get("mix") if node is not None else None
            for entry in mix.items() if mix is not None else ():
                source, split = entry.text("source"), entry.text("split") or "train"
                if source is None:
                    continue
                try:
                    check_source(SourceEntry(source, split=split))
                except SaehubError as error:
                    about_split = error.what.startswith("split") and entry.get("split") is not None
                    self.blame(entry.get("split" if about_split else "source"), error)
                except (OSError, ValueError) as error:  # a name that no file can have
                    self.report(entry.get("source"), f"{show(source)} cannot be read: {error}")

    def data(self, part: str) -> Node | None:
        """`data.train` or `data.eval`; None where it is not there, or null."""
        data = self.root.get("data")
        node = data.get(part) if data is not None else None
        return node if node is not None and node.data is not None else None

    def checkpoint(self, node: Node | None, hub: bool = True) -> None:
        if node is None or not isinstance(node.data, str):
            return
        if hub and "://" in node.data:
            from saehub.checkpoint.hub import parse

            try:
                parse(node.data)
            except SaehubError as error:
                self.blame(node, error)
            return
        if not _exists(node.data):
            hint = f"paths are relative to the folder you run in, {Path.cwd()}" + ("; the hub is written hf://org/repo" if hub else "")
            self.report(node, f"there is no checkpoint {show(node)}", hint)

    def domains(self) -> None:
        """`out_of_sample` must be a domain that training never sees, and nothing is evaluated on what it was trained on."""
        train, evals = self.data("train"), self.data("eval")
        mix = train.get("mix") if train is not None else None
        if mix is None or evals is None or not evals.is_map:
            return
        trained = {(entry.text("source"), entry.text("config")): entry.text("split") or "train" for entry in mix.items()}
        for name, node in evals.data.items():
            for entry in (node.get("mix") or node).items():
                domain = (entry.text("source"), entry.text("config"))
                if domain[0] is None or domain not in trained:
                    continue
                if name == "out_of_sample":
                    hint = "take a source that is not in data.train, or call this dataset in_sample"
                    self.report(entry.get("source"), f"{domain[0]!r} is also in data.train: this is not out of sample", hint, "warning")
                if "all" in (entry.text("split"), trained[domain]) or entry.text("split") == trained[domain]:
                    hint = "name a split that training does not read"
                    self.report(entry.get("source"), f"split {entry.text('split')!r} of {domain[0]!r} holds what training reads (split {trained[domain]!r})", hint, "warning")


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False
