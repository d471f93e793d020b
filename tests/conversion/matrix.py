"""SAEs of every architecture in; what becomes of each between every ordered pair of formats out, as cells and as the table of adapters/README.md.

    python tests/conversion/matrix.py            prints the table
    python tests/conversion/matrix.py --write    puts it, and the table of faults, into adapters/README.md
    python tests/conversion/matrix.py --faults   the table of faults alone: nothing is converted
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import torch

from saehub.checkpoint.certificate import BY_EQUATION, BY_LIBRARY, Certificate
from saehub.checkpoint.convert import Refused, convert
from saehub.checkpoint.load import NATIVE, codec, exporters, load
from saehub.checkpoint.registry import BUILT_IN
from saehub.checkpoint.sae import SAE
from saehub.errors import FormatError, SaehubError
from saehub.pipeline.components import Components
from saehub.testing.saes import D_IN, random_sae

ROOT = Path(__file__).parents[2]
README = ROOT / "adapters" / "README.md"
START, END = "<!-- matrix: python tests/conversion/matrix.py --write -->", "<!-- end of the matrix -->"
FAULTS_START, FAULTS_END = "<!-- faults: python tests/conversion/matrix.py --faults -->", "<!-- end of the faults -->"
TRANSCODER = {"kind": "transcoder", "subtract_b_dec": False}
SKIP = {"kind": "skip_transcoder", "subtract_b_dec": False}
WIDER = {"d_out": D_IN + 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "b_dec not subtracted": {"subtract_b_dec": False},
    "decoder norms": {"decoder_norm_scaling": True},
    "decoder norms, b_dec not subtracted": {"decoder_norm_scaling": True, "subtract_b_dec": False},
    "constant norm": {"norm_in": "constant_norm_rescale", "norm_out": "constant_norm_rescale"},
    "layer norm": {"norm_in": "layer_norm", "norm_out": "layer_norm"},
    "layer norm of the input only": {"norm_in": "layer_norm"},
    "transcoder": TRANSCODER,
    "transcoder to another width": TRANSCODER | WIDER,
    "transcoder, decoder norms": TRANSCODER | {"decoder_norm_scaling": True},
    "transcoder, layer norm": TRANSCODER | {"norm_in": "layer_norm"},
    "skip transcoder": SKIP,
    "skip transcoder to another width": SKIP | WIDER,
}
"""What an SAE can be besides its architecture; an architecture whose equation does not allow a variant has none."""
PARAMS = {"temporal": {"n_heads": 2, "n_attn_layers": 1, "bottleneck_factor": 4, "k": 6, "tied": True, "input_scale": 1.0}}
"""Where `saehub.testing.saes` has none of its own."""
EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "matching_pursuit, stopping rules": (
        "matching_pursuit",
        {"params": {"max_iterations": None, "residual_threshold": 0.5, "stop_on_duplicate_support": True}},
    ),
    "temporal, own encoder and no k": ("temporal", {"params": PARAMS["temporal"] | {"tied": False, "k": None, "n_attn_layers": 2}}),
}
"""Parameters that change the equation."""
SITES = {"site": "resid_post.1"}
TRANSCODER_SITES = {"site": "resid_mid.1", "target_site": "mlp_out.1"}
MODEL = {"model": {"name": "builtin/tiny-llama", "revision": None}}
LIBRARY, EQUATION, REFUSED = "library", "equation", "refused"
WORDS = {BY_LIBRARY: LIBRARY, BY_EQUATION: EQUATION}


# ---------------------------------------------------------------------- what is converted
@lru_cache(maxsize=1)
def subjects() -> dict[str, SAE]:
    """Every built-in architecture in every variant that it has, in float32."""
    wanted = {
        f"{entry.name}, {variant}" if variant else entry.name: (entry.name, fields) for entry in BUILT_IN for variant, fields in VARIANTS.items()
    }
    found = {}
    for name, (architecture, fields) in (wanted | EXTRA).items():
        params = {"params": PARAMS[architecture]} if architecture in PARAMS else {}
        try:
            sae = random_sae(architecture, **(params | fields))
        except FormatError:
            continue
        sae.provenance = {**(SITES if sae.config.kind == "autoencoder" else TRANSCODER_SITES), **MODEL}
        found[name] = sae
    return dict(sorted(found.items(), key=lambda item: item[1].config.architecture))


@lru_cache(maxsize=1)
def layouts() -> dict[str, Callable[[Path], Any]]:
    """Published folders, as the tests of the read-only formats write them with numpy and torch alone, and those of trained.py."""
    return by_path(ROOT / "tests/plugins/test_formats/conftest.py").LAYOUTS | by_path(Path(__file__).with_name("trained.py")).CASES


def by_path(file: Path) -> Any:
    """A module outside any package, imported once."""
    name = f"saehub_conversion_{file.parent.name}_{file.stem}"
    if name not in sys.modules:
        spec = spec_from_file_location(name, file)
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def short(address: str) -> str:
    """`formats/gemma_scope` -> `gemma_scope`."""
    return address.rpartition("/")[2]


@lru_cache(maxsize=1)
def writable() -> tuple[str, ...]:
    """Formats that can say at least one of the subjects."""
    able = [short(address) for address in exporters() if any(codec(address)[1].refusal(sae) is None for sae in subjects().values())]
    return (NATIVE, *able)


def write(sae: SAE, format: str, folder: Path) -> Path | None:
    """The SAE in `format` as its library would have left it, without what saehub puts beside; None where the format cannot say it."""
    instance = codec(format)[1]
    if instance.refusal(sae) is not None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        instance.write(sae, folder)
    STRIP[format](folder)
    return folder


def _strip_json(name: str, *keys: str) -> Callable[[Path], None]:
    def strip(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        inner = config
        for key in keys[:-1]:
            inner = inner[key]
        inner.pop(keys[-1], None)
        (folder / name).write_text(json.dumps(config))

    return strip


def _strip_header(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(folder / "sae.safetensors"), folder / "sae.safetensors")


def _strip_files(folder: Path) -> None:
    for file in folder.glob("*.saehub.json"):
        file.unlink()


STRIP: dict[str, Callable[[Path], None]] = {
    NATIVE: lambda folder: None,
    "saelens": _strip_json("cfg.json", "metadata", "saehub"),
    "sparsify": _strip_header,
    "dictionary_learning": _strip_json("config.json", "saehub"),
    "gemma_scope": _strip_files,
    "circuit_tracer": _strip_files,
}
"""How to take the side channel away from a folder of each writable format."""


# ---------------------------------------------------------------------- converting
class Workers:
    """`invoke` for `convert`: every library in one worker process that lives as long as this object."""

    def __init__(self) -> None:
        self.components, self.remotes = Components(), {}

    def __call__(self, registered: Any, config: Any, method: str, **kwargs: Any) -> Any:
        if registered.address not in self.remotes:
            self.remotes[registered.address] = self.components.make(registered, config)
        return getattr(self.remotes[registered.address], method)(**kwargs)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.components.close()


@dataclass
class Cell:
    """One conversion and where it ended."""

    subject: str
    source: str
    target: str
    outcome: str
    """`library`, `equation`, `refused`; anything else is a failure of this suite: `inconclusive`, or an exception's name."""
    reason: str = ""
    fix: str = ""
    certificate: Certificate | None = None
    source_path: Path | None = None
    path: Path | None = None

    @property
    def folded(self) -> bool:
        """Whether the target's tensors are not the source's, bit for bit."""
        return bool(self.certificate and self.certificate.changed)


def try_convert(subject: str, source: str, target: str, path: Path, out: Path, invoke: Any) -> Cell:
    """One cell; every exception becomes an outcome."""
    cell = Cell(subject, source, target, "", source_path=path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cell.certificate = convert(path, out, target, invoke=invoke)
        cell.outcome, cell.reason, cell.path = WORDS.get(cell.certificate.outcome, cell.certificate.outcome), cell.certificate.reason or "", out
    except Refused as error:
        cell.outcome, cell.reason, cell.fix, cell.certificate = REFUSED, error.why or "", error.fix or "", error.certificate
        if not error.fix.startswith("formats that can"):
            cell.outcome = "another dictionary"  # a target that computes something else is a bug in a codec, not a refusal
    except Exception as error:
        cell.outcome, cell.reason = type(error).__name__, str(error)
    return cell


def convert_subject(name: str, folder: Path, invoke: Any) -> list[Cell]:
    """One SAE in every format that can say it, to every other writable format."""
    found = []
    for source in writable():
        path = write(subjects()[name], source, folder / source / "source")
        if path is not None:
            found += [try_convert(name, source, target, path, folder / source / target, invoke) for target in writable() if target != source]
    return found


def convert_layout(name: str, folder: Path, invoke: Any) -> list[Cell]:
    """One published folder to every writable format: its own too, which may say it in today's words."""
    (folder / "source").mkdir(parents=True)
    case = layouts()[name](folder / "source")
    return [try_convert(name, short(case.address), target, case.path, folder / f"to-{target}", invoke) for target in writable()]


def everything(folder: Path, invoke: Any) -> Iterator[Cell]:
    """All cells."""
    for number, name in enumerate(subjects()):
        yield from convert_subject(name, folder / str(number), invoke)
    for name in layouts():
        yield from convert_layout(name, folder / f"published-{name}", invoke)


# ---------------------------------------------------------------------- the table
@dataclass
class Notes:
    """Reasons of refusals, numbered in order of appearance."""

    numbers: dict[str, int] = field(default_factory=dict)

    def number(self, reason: str) -> int:
        return self.numbers.setdefault(reason, len(self.numbers) + 1)


def table(cells: list[Cell]) -> str:
    """Markdown: a row per SAE and per sources that fare alike, a column per target; then the reasons."""
    notes, targets = Notes(), writable()
    published = set(layouts())  # set in code: a folder of a library, not one of our subjects
    lines = ["| SAE | from | " + " | ".join(targets) + " |", "|---|---|" + "---|" * len(targets)]
    counts: dict[str, int] = {}
    for name in dict.fromkeys(cell.subject for cell in cells):
        mine = [cell for cell in cells if cell.subject == name]
        for cell in mine:
            counts[cell.outcome] = counts.get(cell.outcome, 0) + 1
        words = {(cell.source, cell.target): _word(cell, notes) for cell in mine}
        groups: list[tuple[list[str], dict[str, str]]] = []
        for source in dict.fromkeys(cell.source for cell in mine):
            row = {target: words[source, target] for target in targets if (source, target) in words}
            for sources, known in groups:
                if all(known.get(target, word) == word for target, word in row.items()):
                    sources.append(source)
                    known.update(row)
                    break
            else:
                groups.append(([source], row))
        for sources, row in groups:
            shown = f"`{name}`" if name in published else name
            lines.append(f"| {shown} | {', '.join(sources)} | " + " | ".join(row.get(target, "") for target in targets) + " |")
    total = ", ".join(f"{counts[word]} {word}" for word in (LIBRARY, EQUATION, REFUSED) if word in counts)
    reasons = [f"{number}. {reason}" for reason, number in notes.numbers.items()]
    return "\n".join([f"{len(cells)} conversions: {total}.", "", *lines, "", "Reasons of refusals:", "", *reasons])


def _word(cell: Cell, notes: Notes) -> str:
    if cell.outcome == REFUSED:
        return f"– {notes.number(cell.reason)}"
    on_reading = bool(cell.certificate and any(fold.startswith("on reading") for fold in cell.certificate.folded))
    return cell.outcome + (" (folded)" if cell.folded or on_reading else "")


def committed(start: str, end: str) -> str:
    """What stands between two markers of adapters/README.md."""
    return README.read_text().partition(start)[2].partition(end)[0].strip()


def commit(start: str, end: str, text: str) -> None:
    """Put `text` between them."""
    before, _, rest = README.read_text().partition(start)
    README.write_text(f"{before}{start}\n\n{text}\n\n{end}{rest.partition(end)[2]}")


def main() -> None:
    """Print or write the tables."""
    torch.set_num_threads(1)
    if {"--write", "--faults"} & set(sys.argv):
        commit(FAULTS_START, FAULTS_END, by_path(Path(__file__).with_name("faults.py")).table())
    if "--faults" in sys.argv:
        return
    with tempfile.TemporaryDirectory() as folder, Workers() as invoke:
        text = table(list(everything(Path(folder), invoke)))
    if "--write" in sys.argv:
        commit(START, END, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
