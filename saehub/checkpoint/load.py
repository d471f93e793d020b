"""A path or a hub id in, an SAE out: finds out which library's format a folder is and reads it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.errors import FormatError, SaehubError, UsageError, did_you_mean

if TYPE_CHECKING:
    from saehub.api import Exporter
    from saehub.checkpoint.sae import SAE

NATIVE = "saehub"
"""The name of the hub's own format among the exporters'."""


LOOKED_AT = 200
"""Folders inside a folder that is no checkpoint, in search of one."""
ANYBODYS = {"config.json"}
"""Names that tell no format: a language model's folder has one, too."""


class NativeFormat:
    """Checkpoint format v1 as an exporter: what `convert` uses where one side is the hub's own."""

    files = ("saehub.json", "sae.safetensors")

    def __init__(self, config: Any = None):
        self.config = config

    def sniff(self, path: Path) -> bool:
        from saehub.checkpoint.format import is_checkpoint

        return is_checkpoint(path)

    def read(self, path: Path) -> SAE:
        from saehub.checkpoint import format as v1

        return v1.load(path)

    def write(self, sae: SAE, path: Path) -> dict[str, Any]:
        from saehub.checkpoint import format as v1

        v1.save(sae, path)
        return {"folded": [], "dropped": [], "bit_exact": list(sae.tensors())}

    def run(self, path: Path, x_ND: Any) -> tuple[Any, Any]:
        import torch

        sae = self.read(path)
        with torch.no_grad():
            acts_NF = sae.encode(x_ND, dtype=torch.float32)
            return acts_NF, sae.decode(acts_NF, like=x_ND, dtype=torch.float32)

    def refusal(self, sae: SAE) -> str | None:
        return None


def exporters() -> dict[str, Any]:
    """Registered exporters by address (`saelens/folder` …); the hub's own format is not among them."""
    from saehub.plugins import catalog

    return catalog().components("exporter")


def codec(name: str) -> tuple[str, Exporter, Any]:
    """Address, instance and registration of a format named by address, exporter or plugin (`saelens`); `saehub` is the hub's own.

    The instance lives in this process: `sniff`, `read` and `write` must not import the library, only `run` may (in a worker).
    """
    if name == NATIVE:
        return NATIVE, NativeFormat(), None
    known = exporters()
    matches = [r for address, r in known.items() if address == name] or [r for r in known.values() if name in (r.name, r.plugin)]
    if len(matches) != 1:
        words = sorted({NATIVE, *(r.address for r in known.values())})
        hint = did_you_mean(name, [*words, *(r.name for r in known.values())])
        what = f"no format is called {name!r}{hint}" if not matches else f"several formats are called {name!r}"
        raise UsageError(what, fix=f"one of: {', '.join(words)}")
    registered = matches[0]
    return registered.address, _instance(registered), registered


def _instance(registered: Any) -> Exporter:
    config = registered.load_config()
    return registered.load()(config() if config else None)


def find_format(path: Path) -> str | None:
    """`saehub`, an exporter's address, or None for a folder that nothing here knows."""
    from saehub.checkpoint.format import is_checkpoint

    if is_checkpoint(path):
        return NATIVE
    for address, registered in exporters().items():
        try:
            if _instance(registered).sniff(Path(path)):
                return address
        except SaehubError:  # a codec that cannot even be loaded does not hide the others
            continue
    return None


def locate(source: str | Path, *, revision: str | None = None) -> tuple[Path, dict[str, Any]]:
    """A local path, downloaded first if `source` is `hf://org/repo[@revision][/folder]`; and what to remember about where it came from."""
    text = str(source)
    if text.startswith("hf://"):
        from saehub.checkpoint.hub import download

        return download(text, revision=revision)
    path = Path(text).expanduser()
    if not path.exists():
        looks_like_hub = text.count("/") >= 1 and not text.startswith((".", "/", "~"))
        raise UsageError(
            f"{source} does not exist",
            fix=f"a checkpoint folder; for the Hugging Face hub write hf://{text}" if looks_like_hub else "name a checkpoint folder",
        )
    return path, {}


def load(source: str | Path, *, format: str | None = None, revision: str | None = None, device: str = "cpu") -> SAE:
    """The SAE at a path or hub id, whichever known format it is in (`format` names one instead of looking).

    FormatError: the folder is not any known format, or is damaged. UsageError: nothing is there, or the hub is out of reach.
    """
    path, origin = locate(source, revision=revision)
    sae, *_ = read(path, format)
    if origin:
        record_origin(sae, origin)
    return sae.to(device) if device != "cpu" else sae


def read(path: Path, asked: str | None = None) -> tuple[SAE, str, Exporter, Any]:
    """The SAE in a local folder, and the address, instance and registration of its format: `asked`, or what its files say.

    FormatError: damaged, or in no known format. UsageError: it is another format than the one asked for.
    """
    name = asked or find_format(path)
    if name is None:
        raise unknown(path)
    address, instance, registered = codec(name)
    try:
        return instance.read(path), address, instance, registered
    except FormatError as error:
        other = find_format(path) if asked else None
        if other in (None, address):
            raise
        raise UsageError(
            f"{path} is not in the format {asked!r} that was asked for",
            why=f"its files are those of {other}; as {address}: {error.what}",
            fix=f"leave the format (--from) out, or name {other}",
        ) from error


def record_origin(sae: SAE, origin: dict[str, Any]) -> None:
    """Put where it was read from into the provenance; an earlier hub id becomes its `upstream`."""
    earlier = sae.provenance.get("hub")
    sae.provenance["hub"] = origin | ({"upstream": earlier} if earlier and earlier != origin else {})


def unknown(path: Path) -> FormatError:
    """The error for a folder that no format knows: which files are missing or broken, if it is nearly one."""
    if not path.is_dir():
        return _no_format(path, "it is a file; checkpoints are folders")
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in path.iterdir())
    why = f"it holds {', '.join(names[:12]) or 'nothing'}" + (" …" if len(names) > 12 else "")
    from saehub.checkpoint.foreign import is_map_with
    from saehub.checkpoint.format import RESTORE

    if is_map_with(path / "config.json", {"model_type"}):
        return _no_format(path, f"it is a language model, by its config.json: {why}")
    for depth in ("*", "*/*", "*/*/*"):  # a run folder keeps them in checkpoints/ID and exports/FORMAT/ID
        folders = [entry for entry in sorted(islice(path.glob(depth), LOOKED_AT)) if entry.is_dir()]
        inside = [str(entry) for entry in folders if find_format(entry)][:5]
        if inside:
            return FormatError(f"{path} is not a checkpoint itself", why=why, fix=f"name one of those inside it: {', '.join(inside)}")
    near = _nearly(path)
    return FormatError(f"{path} is not a whole checkpoint: {'; or '.join(near)}", why=why, fix=RESTORE) if near else _no_format(path, why)


def _nearly(path: Path) -> list[str]:
    """What is wrong with a folder in each format some of whose `files` it holds; those that lack fewest."""
    lacking: dict[str, list[str]] = {}
    for name in [NATIVE, *exporters()]:
        try:
            address, instance, _ = codec(name)
            files = list(getattr(instance, "files", ()))
            missing = [file for file in files if not (path / file).is_file()]
            if not missing and files:
                instance.read(path)
            elif {file for file in files if file not in missing} - ANYBODYS:
                lacking[address] = missing
        except FormatError as error:  # all files are there, and this is why they are not that format
            return [error.what + (f" ({error.why})" if error.why else "")]
        except SaehubError:
            continue
    least = min(map(len, lacking.values()), default=0)
    return [f"{' and '.join(missing)} of the format {address} is missing" for address, missing in lacking.items() if len(missing) == least]


def _no_format(path: Path, why: str) -> FormatError:
    return FormatError(
        f"{path} is in no format that is known here",
        why=why,
        fix=f"known: {', '.join([NATIVE, *exporters()])}; saehub plugins ls shows broken ones",
    )
