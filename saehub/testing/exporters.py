"""An exporter in; a report out on round trips of every architecture, agreement of the library's own code, damaged files and refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.errors import SaehubError
from saehub.testing.conformance import (
    ConformanceReport,
    Subject,
    common_checks,
    difference,
    expect,
    raises_cleanly,
    resolve,
    run_checks,
    scratch,
    world_unchanged,
)

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.checkpoint.sae import SAE
    from saehub.pipeline.components import Components

ROUND = 2.0**-24
"""Unit roundoff of float32."""


class Written:
    """One SAE that the format could say: where it lies, what the exporter noted, and what it reads back (a published folder: as read)."""

    def __init__(self, name: str, sae: SAE, path: Path, notes: Mapping[str, Any], back: SAE):
        self.name, self.sae, self.path, self.notes, self.back = name, sae, path, notes, back


class Bench:
    """The exporter under test; every architecture and variant written and read once."""

    def __init__(self, subject: Subject, folder: Path, saes: Mapping[str, SAE] | None, folders: Mapping[str, Path] | None):
        self.subject, self.folder, self._saes, self.folders = subject, folder, saes, dict(folders or {})
        self.exporter = subject.cls(subject.config)  # reading and writing are the hub's own code, so they are tried here
        self.refused: dict[str, str] = {}
        self._fresh = 0

    def path(self) -> Path:
        """A path that does not exist yet."""
        self._fresh += 1
        return self.folder / f"export-{self._fresh}"

    @cached_property
    def saes(self) -> dict[str, SAE]:
        """What is tried: the suite's zoo, or the caller's own."""
        from saehub.testing.saes import random_sae, zoo

        if self._saes is not None:
            return dict(self._saes)
        return dict(zoo()) | {f"topk, {dtype}": random_sae("topk", dtype=dtype) for dtype in ("bfloat16", "float16")}

    @cached_property
    def all(self) -> list[Written]:
        """What was written, and the published folders."""
        found = list(self.written)
        for name, path in self.folders.items():
            sae = self.exporter.read(Path(path))
            found.append(Written(name, sae, Path(path), {"bit_exact": list(sae.tensors())}, sae))
        return found

    @cached_property
    def written(self) -> list[Written]:
        """Those that could be written; the others end in `refused` with their reason."""
        found = []
        for name, sae in self.saes.items():
            path = self.path()
            try:
                notes = self.exporter.write(sae, path)
            except SaehubError as error:
                self.refused[name] = str(error).splitlines()[0]
                continue
            found.append(Written(name, sae, path, notes, self.exporter.read(path)))
        return found


def check_exporter(
    component: Any,
    with_: Mapping[str, Any] | None = None,
    *,
    saes: Mapping[str, SAE] | None = None,
    folders: Mapping[str, Path] | None = None,
    only: Collection[str] | None = None,
    workers: Components | None = None,
) -> ConformanceReport:
    """Everything that `saehub.api.Exporter` promises, on every built-in architecture in every variant (norms, transcoders, dtypes).

    Args:
        component: `"plugin/name"`, a `Registered` (its `run` is called in a worker where it `requires` a library), or `(Class, config)`.
        with_: settings, as in a recipe (the first two forms).
        saes: what to write instead, by name; for a format of architectures that are not built in, or that needs to know a site.
        folders: published folders (or files) by name, which are only read; needed for a format that is not written.
        only: names of the checks to run; None: all.
        workers: worker processes to use and to leave running, so that several components share one import of their library; None: own ones.
    """
    subject = resolve("exporter", component, with_, workers)
    with scratch() as folder:
        bench = Bench(subject, Path(folder), saes, folders)
        checks: list[tuple[str, Callable[[], str | None]]] = [
            *common_checks(subject),
            ("writes or refuses, cleanly", lambda: _writes_or_refuses(bench)),
            ("round trip bit-exact or declared", lambda: _round_trip(bench)),
            ("round trip computes the same", lambda: _same_function(bench)),
            ("second round trip exact", lambda: _second_trip(bench)),
            ("its own code agrees", lambda: _own_code(bench)),
            ("sniffs its own files only", lambda: _sniff(bench)),
            ("damaged files refused", lambda: _damaged(bench)),
            ("files need no library", lambda: _no_library(bench)),
            ("nothing mutated", lambda: _untouched(bench)),
        ]
        return run_checks("exporter", subject.name, checks, only, subject.close)


def _writes_or_refuses(bench: Bench) -> str:
    written = bench.written
    expect(bench.all, f"no SAE could be written, and no `folders` to read were given: {json.dumps(bench.refused)}")
    for item in written:
        notes = item.notes
        expect(
            isinstance(notes, Mapping) and "bit_exact" in notes,
            f"{item.name}: write() returned {notes!r}, expected folded, dropped, bit_exact",
        )
        unknown = set(notes["bit_exact"]) - set(item.sae.tensors())
        expect(not unknown, f"{item.name}: bit_exact names {sorted(unknown)}, which are not tensors of the SAE")
    refusal = getattr(bench.exporter, "refusal", None)
    if refusal is not None:
        for name, sae in bench.saes.items():
            said, did = refusal(sae), name in bench.refused
            expect(bool(said) == did, f"{name}: refusal() says {said!r}, write() {'refuses' if did else 'writes'}")
    for name in bench.refused:
        path = bench.path()
        raises_cleanly(lambda path=path, name=name: bench.exporter.write(bench.saes[name], path), name)
        expect(not path.exists() or not bench.exporter.sniff(path), f"{name}: refused, but a folder that looks complete was left behind")
    reasons = "; ".join(f"{name}: {reason}" for name, reason in list(bench.refused.items())[:2])
    return f"{len(written)} written, {len(bench.refused)} refused, {len(bench.folders)} published" + (f" ({reasons} …)" if reasons else "")


def _round_trip(bench: Bench) -> str:
    exact = folded = 0
    for item in bench.written:
        before, after = item.sae.tensors(), item.back.tensors()
        promised = set(item.notes["bit_exact"])
        declared = json.dumps([item.notes.get("folded", []), item.notes.get("dropped", [])])
        for name, tensor in before.items():
            same = name in after and not difference({name: tensor}, {name: after[name]})
            if name in promised:
                expect(same, f"{item.name}: {name} is promised bit-exact and is not")
            else:
                expect(same or declared != "[[], []]", f"{item.name}: {name} changed, and neither folded nor dropped says why")
            exact, folded = exact + same, folded + (not same)
    return f"{exact} tensors bit-exact, {folded} folded and declared"


def _same_function(bench: Bench) -> str:
    from saehub.testing.saes import rows_for

    worst = 0.0
    for item in bench.written:
        x_ND = rows_for(item.sae)
        features_NF, reconstruction_ND = _run(item.back, x_ND)
        worst = max(worst, agreement(item.sae, x_ND, features_NF, reconstruction_ND, f"{item.name}: read back"))
    return f"{len(bench.written)} SAEs, reconstruction within {worst:.1g}"


def _run(sae: SAE, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    with torch.no_grad():
        wide = sae.astype(torch.float32)
        acts_NF = wide.encode(x_ND)
        return acts_NF, wide.decode(acts_NF, like=x_ND)


def agreement(sae: SAE, x_ND: Tensor, features_NF: Tensor, reconstruction_ND: Tensor, what: str) -> float:
    """Relative Frobenius difference of the reconstruction, after the support was found equal (rounding at a boundary aside).

    Float64 copies of the stored tensors are the reference. A latent may be in one support alone where its float64 margin is within
    64 unit roundoffs of the terms that were summed, and only rows without such a latent count for the reconstruction.
    """
    import torch

    wide = sae.astype(torch.float64)
    with torch.no_grad():
        x = x_ND.double()
        f_NF = wide.encode(x)
        y_ND = wide.decode(f_NF, like=x)
        centred = wide.centre(x)
        near_NF = wide.margin(wide.preacts(centred)) <= 64 * ROUND * wide.rounding_scale(centred)
    expect(features_NF.shape == f_NF.shape, f"{what}: features {list(features_NF.shape)}, expected {list(f_NF.shape)}")
    expect(reconstruction_ND.shape == y_ND.shape, f"{what}: reconstruction {list(reconstruction_ND.shape)}, expected {list(y_ND.shape)}")
    differs_NF = (f_NF != 0) != (features_NF != 0)
    unexplained = int((differs_NF & ~near_NF).sum())
    expect(not unexplained, f"{what}: {unexplained} of {int((f_NF != 0).sum())} active latents differ, which no rounding explains")
    rows_N = ~differs_NF.any(1)
    expect(float(rows_N.double().mean()) > 0.9, f"{what}: rounding decides the support of {int((~rows_N).sum())} of {len(rows_N)} rows")
    gap = float((reconstruction_ND.double() - y_ND)[rows_N].norm() / y_ND[rows_N].norm())
    expect(gap <= 1e-5, f"{what}: the reconstruction differs by {gap:.2g} (relative)")
    features_gap = float((features_NF.double() - f_NF)[rows_N].norm() / f_NF[rows_N].norm())
    expect(features_gap <= 1e-5, f"{what}: features differ by {features_gap:.2g} (relative)")
    return gap


def _second_trip(bench: Bench) -> str:
    for item in bench.written:
        path = bench.path()
        bench.exporter.write(item.back, path)
        gap = difference(item.back.tensors(), bench.exporter.read(path).tensors())
        expect(not gap, f"{item.name}: written, read, written and read: {gap}")
    return f"{len(bench.written)} SAEs"


def _own_code(bench: Bench) -> str:
    from saehub.testing.saes import rows_for

    registered, worst = bench.subject.registered, 0.0
    if registered is not None and registered.component.requires:
        worst = _compare(bench, bench.subject.make().run, rows_for)
    else:
        worst = _compare(bench, bench.exporter.run, rows_for)
    return f"{len(bench.all)} SAEs, reconstruction within {worst:.1g}"


def _compare(bench: Bench, run: Callable[..., tuple[Tensor, Tensor]], rows_for: Callable[..., Tensor]) -> float:
    worst = 0.0
    for item in bench.all:
        if item.sae.W_dec.element_size() < 4:
            continue  # a stored low-precision SAE computes in its own dtype; the read-back check covers it
        x_ND = rows_for(item.sae)
        kept = x_ND.clone()
        features_NF, reconstruction_ND = run(item.path, x_ND)
        expect(bool((kept == x_ND).all()), f"{item.name}: run() changed its rows")
        worst = max(worst, agreement(item.sae, x_ND, features_NF, reconstruction_ND, f"{item.name}: run()"))
    return worst


def _sniff(bench: Bench) -> str:
    import torch
    from safetensors.torch import save_file

    from saehub.testing.components import ToyExporter
    from saehub.testing.saes import random_sae

    for item in bench.all:
        expect(bench.exporter.sniff(item.path), f"{item.name}: sniff() does not know its own format")
    empty, junk, weights = bench.path(), bench.path(), bench.path()
    for folder in (empty, junk, weights):
        folder.mkdir()
    for name in ("config.json", "cfg.json", "metadata.json", "config.yaml"):
        (junk / name).write_bytes(b'["not", "what", "you", "think"]')
    (junk / "notes.bin").write_bytes(bytes(range(256)))
    for name in ("model.safetensors", "sae.safetensors", "sae_weights.safetensors"):
        save_file({"unrelated": torch.zeros(2)}, weights / name)
        (weights / "config.json").write_text('{"model_type": "llama"}')
    foreign = [empty, junk, weights, junk / "notes.bin", bench.path()]
    if bench.subject.cls is not ToyExporter:
        foreign.append(bench.path())
        ToyExporter(None).write(random_sae("topk"), foreign[-1])
    for path in foreign:
        answer = bench.exporter.sniff(path)
        expect(answer is False, f"sniff() says {answer!r} to {sorted(p.name for p in path.iterdir()) if path.is_dir() else path.name}")
    return f"{len(bench.all)} own, {len(foreign)} foreign"


def _damaged(bench: Bench) -> str:
    # The largest file holds the weights: without it, or with damage to it, nothing may be read. A side file may be ignored.
    item, tried = bench.all[0], 0
    root = item.path if item.path.is_dir() else item.path.parent
    files = [file.relative_to(root) for file in sorted(root.rglob("*")) if file.is_file() and file.stat().st_size > 0]
    weights = max(files, key=lambda file: (root / file).stat().st_size)
    for file in files:
        for damage in ("cut in half", "missing", "zeros"):
            copy = bench.path()
            shutil.copytree(root, copy)
            whole = (copy / file).read_bytes()
            if damage == "missing":
                (copy / file).unlink()
            else:
                (copy / file).write_bytes(whole[: len(whole) // 2] if damage == "cut in half" else bytes(len(whole)))
            path = copy if item.path.is_dir() else copy / item.path.name
            tried += 1
            if file == weights:
                raises_cleanly(lambda path=path: bench.exporter.read(path), f"{file} {damage}")
                continue
            try:
                bench.exporter.read(path)
            except SaehubError:
                pass
            except Exception as error:
                raise AssertionError(f"{file} {damage}: read() raised {type(error).__name__}: {error}, not a saehub error") from error
    return f"{tried} damages"


def _no_library(bench: Bench) -> str:
    registered = bench.subject.registered
    if registered is None or not registered.component.requires:
        return "no library"
    from saehub.checkpoint.format import save

    if not bench.written:
        return "nothing is written"
    item = bench.written[0]
    source, target = bench.path(), bench.path()
    save(item.sae, source)
    code = (
        "import sys\nfrom pathlib import Path\nfrom saehub.checkpoint.format import load\nfrom saehub.plugins import catalog\n"
        f"registered = catalog().find('exporter', {registered.address!r})\nconfig = registered.load_config()\n"
        "exporter = registered.load()(config() if config else None)\n"
        f"exporter.write(load({str(source)!r}), Path({str(target)!r}))\nassert exporter.sniff(Path({str(target)!r}))\n"
        f"exporter.read(Path({str(target)!r}))\nprint(*[m for m in {registered.component.requires!r} if m in sys.modules])"
    )
    path = [entry for entry in sys.path if entry]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"], capture_output=True, text=True, timeout=300, check=False
    )
    expect(done.returncode == 0, f"sniff, read and write in a process of their own failed: {done.stderr.strip().splitlines()[-1:]}")
    expect(not done.stdout.strip(), f"sniff, read or write imports {done.stdout.strip()}; only run() may")
    return f"without importing {', '.join(registered.component.requires)}"


def _untouched(bench: Bench) -> str:
    for item in bench.written[:6]:
        before = {name: tensor.clone() for name, tensor in item.sae.tensors().items()}
        provenance = json.dumps(item.sae.provenance, sort_keys=True, default=str)
        path = bench.path()
        with world_unchanged():
            bench.exporter.write(item.sae, path)
            bench.exporter.read(path)
            bench.exporter.sniff(path)
        gap = difference(before, item.sae.tensors())
        expect(not gap, f"{item.name}: write() changed the SAE: {gap}")
        expect(provenance == json.dumps(item.sae.provenance, sort_keys=True, default=str), f"{item.name}: write() changed the provenance")
    return "the SAE, its provenance, random states, gradient mode, threads, environment"
