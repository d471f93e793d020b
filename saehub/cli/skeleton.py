"""A name and the kinds wanted in; a plugin of one's own, copied from the example plugin that saehub ships, out (`saehub plugins new`)."""

from __future__ import annotations

import ast
import json
import keyword
import re
import sys
from collections.abc import Collection, Iterator
from importlib import metadata
from pathlib import Path

from saehub.errors import UsageError, did_you_mean

KINDS = ("trainer", "extractor", "evaluator", "exporter")
FILES = {  # file stem -> the kind that needs it; other files belong to every plugin
    "architecture": "trainer", "train": "trainer", "train_config": "trainer", "test_trainer": "trainer",
    "extract": "extractor", "extract_config": "extractor", "test_extractor": "extractor",
    "evaluate": "evaluator", "evaluate_config": "evaluator", "test_evaluator": "evaluator",
    "codec": "exporter", "test_exporter": "exporter",
}  # fmt: skip
HOOKS = {"saehub_architectures": "trainer"} | {f"saehub_{kind}s": kind for kind in KINDS}
RECIPES = {"peak": {"trainer"}, "bars": {"trainer", "extractor"}}
ONLY = re.compile(r"\s*# only with: (\w+)\n")
"""Ends a line of the template that belongs to one kind."""


def template_dir() -> Path:
    """The example plugin: `saehub/template` in a wheel, `plugins/saehub-example` beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "template"
    return inside if inside.is_dir() else package.parent / "plugins" / "saehub-example"


def write_plugin(directory: Path, name: str, kinds: Collection[str] = KINDS) -> list[Path]:
    """Write the plugin `name` with components of `kinds` into `directory`, which must be empty or absent; the files written, in order.

    Raises UsageError for a name that cannot be a distribution, an unknown kind and a folder that holds something.
    """
    kinds = set(kinds)
    unknown = sorted(kinds - set(KINDS))
    if unknown or not kinds:
        raise UsageError(
            f"there is no component kind {unknown[0]!r}{did_you_mean(unknown[0], KINDS)}" if unknown else "no kind of component was asked for",
            where="--kinds",
            fix=f"--kinds {','.join(KINDS)}, or some of them",
        )
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
        raise UsageError(
            f"{name!r} cannot name a plugin", where="--name", fix="lower-case letters, digits and single hyphens: --name saehub-something"
        )
    short = name.removeprefix("saehub-")
    _refuse_taken(name, short)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory} is not an empty folder", fix="name another one; nothing is overwritten")
    module = name.replace("-", "_")
    recipes = {recipe for recipe, needed in RECIPES.items() if needed <= kinds}
    written = []
    for file in _template_files():
        if FILES.get(file.stem, next(iter(kinds))) not in kinds or (file.suffix == ".yaml" and file.stem not in recipes):
            continue
        if file.stem == "test_recipes" and not recipes:
            continue
        text = _adapt(file.read_text(encoding="utf-8"), file, kinds, recipes)
        text = _rename(text, name, module, short)
        target = directory / file.relative_to(template_dir()).as_posix().replace("saehub_example", module)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{target} cannot be written", why=str(error), fix="name a folder that you may write to") from error
        written.append(target)
    return written


def _refuse_taken(name: str, short: str) -> None:
    """UsageError for a name that would replace something: installing a distribution called torch uninstalls the real one."""
    from saehub.plugins import catalog

    module = name.replace("-", "_")
    normal = re.sub("[-_.]+", "-", name)
    installed = {re.sub("[-_.]+", "-", dist.name.lower()) for dist in metadata.distributions() if dist.name}
    if keyword.iskeyword(module) or module in sys.stdlib_module_names or module in metadata.packages_distributions() or normal in installed:
        raise UsageError(
            f"{name!r} cannot name a plugin",
            where="--name",
            why=f"Python, or something that is installed here, is already called {module!r}",
            fix=f"another name, such as saehub-my-{short}",
        )

    for row in catalog().rows():
        if row.plugin == short:
            raise UsageError(
                f"an installed plugin is already called {short!r} (of {row.distribution})",
                where="--name",
                why="two plugins of one name are both refused",
                fix=f"another name, such as {name}-2",
            )


def _template_files() -> Iterator[Path]:
    root = template_dir()
    if not (root / "pyproject.toml").is_file():
        raise UsageError(f"the template is not at {root}", why="this installation of saehub lacks it", fix="install saehub again")
    for file in sorted(root.rglob("*")):
        parts = file.relative_to(root).parts
        if file.suffix in (".py", ".toml", ".md", ".yaml") and not any(part.startswith(".") or part in ("dist", "build") for part in parts):
            yield file


def _adapt(text: str, file: Path, kinds: set[str], recipes: set[str]) -> str:
    """The file with what belongs to `kinds` only."""
    lines = []
    for line in text.splitlines(keepends=True):
        only = ONLY.search(line)
        if only is None or only[1] in kinds:
            lines.append(line if only is None else ONLY.sub("\n", line))
    text = "".join(lines)
    if file.name == "__init__.py":
        text = _without_hooks(text, {hook for hook, kind in HOOKS.items() if kind not in kinds} | (set() if recipes else {"saehub_recipes"}))
    if file.suffix == ".md":
        rows = [line for line in text.splitlines(keepends=True) if not any(f"| {kind} |" in line for kind in set(KINDS) - kinds)]
        text = "".join(line for line in rows if not any(f"example/{recipe} " in line for recipe in set(RECIPES) - recipes if "recipe run" in line))
    if file.name == "pyproject.toml":
        text = _source_of_saehub(text)
    return text


def _without_hooks(text: str, hooks: set[str]) -> str:
    """The module without those functions, and without the imports that nothing uses any more."""
    tree, lines = ast.parse(text), text.splitlines(keepends=True)
    for node in reversed(tree.body):
        if isinstance(node, ast.FunctionDef) and node.name in hooks:
            del lines[node.decorator_list[0].lineno - 1 : node.end_lineno]
    text = "".join(lines)
    used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    for name, line in (("Path", "from pathlib import Path\n\n"), ("ArchitectureEntry", "ArchitectureEntry, "), ("Component", "Component, ")):
        if name not in used:
            text = text.replace(line, "", 1)
    if "ARCHITECTURE" not in {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}:
        text = re.sub(r'ARCHITECTURE = "peak"\n""".*?"""\n', "", text, flags=re.DOTALL)
    return re.sub(r"\n{4,}", "\n\n\n", text).rstrip("\n") + "\n"


def _source_of_saehub(text: str) -> str:
    """Where `uv run` finds saehub: the checkout that this installation is an editable view of, else the index."""
    without = re.sub(r"\[tool\.uv\.sources\]\n.*?\n\n", "", text, flags=re.DOTALL)
    try:
        about = json.loads(metadata.distribution("saehub").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        about = {}
    url = str(about.get("url", ""))
    if not (url.startswith("file://") and about.get("dir_info", {}).get("editable")):
        return without
    from urllib.parse import unquote, urlparse

    source = json.dumps(unquote(urlparse(url).path))
    lines = f"[tool.uv.sources] # this machine's checkout: delete it when saehub comes from an index\nsaehub = {{ path = {source}, editable = true }}\n\n"
    return without.replace("[dependency-groups]", lines + "[dependency-groups]", 1)


def _rename(text: str, name: str, module: str, short: str) -> str:
    """Every name of the example becomes one of the new plugin; the architecture's too, because it must be unique among all plugins."""
    text = text.replace("saehub-example", name).replace("saehub_example", module).replace('ARCHITECTURE = "peak"', f'ARCHITECTURE = "{module}_peak"')
    text = text.replace("example.dominance/1", f"{short.replace('-', '_')}.dominance/1").replace("architecture `peak`", f"architecture `{module}_peak`")
    text = text.replace('MARK = "folio/1"', f'MARK = "{module}-folio/1"').replace("of the example plugin", f"of {name}")
    text = re.sub(r"^example = ", f"{short} = ", text, flags=re.MULTILINE)
    return re.sub(r"\bexample(?=/(?:(?:peak|bars|dominance|folio)\b|\{name\}))|(?<=row\.plugin == \")example|(?<=plugins check )example\b", short, text)
