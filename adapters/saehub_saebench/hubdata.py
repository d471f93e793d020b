"""Names of datasets that SAEBench loads from the hub in; each put where SAEBench finds it without a network, or named with the command that fetches it, out."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from saehub.errors import SaehubError, StageFailed
from saehub.jsonio import hash_json

DATA_DIR = "data"
"""Where the printed commands put datasets when a recipe names no `data_dir`."""

MOVED = {"wikitext": "Salesforce/wikitext"}
"""Name that SAEBench uses -> where the hub has it."""
PARTS = {
    "codeparrot/github-code": ("github-code.py", "data/train-0000[0-3]-*"),  # of 1,126 files: SAEBench reads a few thousand texts from the first ones
    "Helsinki-NLP/europarl": ("README.md", "de-en/*", "en-fr/*", "es-fr/*", "fr-it/*", "nl-pt/*"),
    "wikitext": ("README.md", "wikitext-2-raw-v1/*"),
    "cais/wmdp": ("README.md", "wmdp-bio/*"),
}
"""Hub dataset -> patterns of the files that SAEBench reads of it; of others it reads all."""


def repository(name: str) -> str:
    """The hub repository behind a dataset's name in SAEBench: `LabHC/bias_in_bios_class_set1` is `LabHC/bias_in_bios`."""
    return name.split("_class_set")[0].removesuffix("_sentiment")


def fetch_command(repo: str, data_dir: str | None, parts: Iterable[str] = ()) -> str:
    """The command that puts what is read of a dataset where `data_dir` expects it."""
    chosen = "".join(f" --include {shlex.quote(pattern)}" for pattern in parts or PARTS.get(repo, ()))
    return f"hf download {MOVED.get(repo, repo)} --repo-type dataset{chosen} --local-dir {shlex.quote(str(Path(data_dir or DATA_DIR) / repo))}"


def local_folder(repo: str, data_dir: str | None) -> Path | None:
    """`data_dir/repo`, if it holds something."""
    folder = Path(data_dir).expanduser().absolute() / repo if data_dir else None
    return folder if folder is not None and folder.is_dir() and any(folder.iterdir()) else None


def in_cache(repo: str) -> bool:
    """Whether a copy lies in the caches of datasets or huggingface_hub."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    built, raw = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")), Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    for name in {repo, MOVED.get(repo, repo)}:
        owned = "/" in name  # what was built of any local folder `wikitext` lies under that name, too
        if owned and (built / name.replace("/", "___")).is_dir() or (raw / f"datasets--{name.replace('/', '--')}" / "snapshots").is_dir():
            return True
    return False


def absent(names: Iterable[str], data_dir: str | None) -> list[str]:
    """Repositories of which this machine has no copy."""
    repos = dict.fromkeys(map(repository, names))
    return [repo for repo in repos if local_folder(repo, data_dir) is None and not in_cache(repo)]


def offline() -> bool:
    """Whether the hub is switched off."""
    return any(os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))


def commands(repos: Iterable[str], data_dir: str | None, parts: Mapping[str, Iterable[str]] | None = None) -> str:
    """Every fetch command, and the setting that goes with them; `parts` names files of some of them."""
    lines = "; ".join(fetch_command(repo, data_dir, (parts or {}).get(repo, ())) for repo in repos)
    return f"{lines} (then with: {{data_dir: {data_dir or DATA_DIR}}})"


def require(names: Iterable[str], data_dir: str | None, evaluator: str, parts: Mapping[str, Iterable[str]] | None = None) -> None:
    """StageFailed that names every missing dataset, and how to get it, where the hub is switched off."""
    missing = absent(names, data_dir)
    if missing and offline():
        raise StageFailed(
            f"saebench/{evaluator} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not on this machine",
            where="data_dir",
            why="the hub is switched off (HF_HUB_OFFLINE)",
            fix=commands(missing, data_dir, parts),
        )


def warnings(names: Iterable[str], data_dir: str | None, evaluator: str, parts: Mapping[str, Iterable[str]] | None = None) -> list[str]:
    """What a plan says about datasets that a run would have to fetch; with the hub switched off they are lacking (`saehub_saebench.lacking`)."""
    missing = [] if offline() else absent(names, data_dir)
    return [f"saebench/{evaluator} will fetch {', '.join(missing)} from the hub; to have them before: {commands(missing, data_dir, parts)}"] if missing else []


@contextmanager
def found_here(names: Iterable[str], data_dir: str | None, evaluator: str) -> Iterator[None]:
    """In the current folder, links under the repositories' names: `datasets` takes a folder of that name before it asks the hub.

    What fails inside while a dataset is missing is reported as that, with the library's words.
    """
    names = list(names)
    for repo in dict.fromkeys(map(repository, names)):
        folder, link = local_folder(repo, data_dir), Path(repo)
        if folder is not None and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder)
    try:
        with _built_here(Path.cwd().parent / f"datasets-{identity(names, data_dir)[:16]}"):
            yield
    except SaehubError:
        raise
    except Exception as error:
        missing = absent(names, data_dir)
        if not missing:
            raise
        raise StageFailed(
            f"saebench/{evaluator} could not load {', '.join(missing)}", fix=commands(missing, data_dir), said=f"{type(error).__name__}: {error}"
        ) from error


@contextmanager
def _built_here(cache: Path) -> Iterator[None]:
    """What `datasets` builds of a local folder goes to `cache`: in its own cache it is found by the folder's name, whatever the folder holds by now."""
    import datasets.load

    from saehub_saebench.isolation import replaced

    build = datasets.load.load_dataset_builder

    def builder(path: str, *args: object, cache_dir: str | None = None, **options: object) -> object:
        return build(path, *args, cache_dir=str(cache) if cache_dir is None and Path(path).is_dir() else cache_dir, **options)

    with replaced(datasets.load, load_dataset_builder=builder):
        yield


def identity(names: Iterable[str], data_dir: str | None) -> str:
    """Hash of the files that the numbers come from: of local folders their contents, of hub datasets the commit where the cache knows it."""
    from saehub.pipeline.keys import tree_hash

    found = []
    for name in names:
        repo = repository(name)
        folder = local_folder(repo, data_dir)
        found.append([name, tree_hash(folder) if folder is not None else _commit(repo)])
    return hash_json(found)


def _commit(repo: str) -> str:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    reference = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"datasets--{repo.replace('/', '--')}" / "refs" / "main"
    return reference.read_text().strip() if reference.is_file() else "hub"
