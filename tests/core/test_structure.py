"""The project's own source in; proof that it keeps its layout, its dependency arrows and its safety rules out."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CORE = ROOT / "saehub"
PLUGINS = sorted(path.parent for folder in ("adapters", "plugins") for path in (ROOT / folder).glob("saehub_*/__init__.py"))
ADAPTERS = [path for path in PLUGINS if path.parent.name == "adapters"]
SOURCES = sorted([*CORE.rglob("*.py"), *(file for package in PLUGINS for file in package.rglob("*.py"))])
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Import names of the libraries that adapters wrap: no part of the core may know them.
WRAPPED = {
    "saehub_saelens": {"sae_lens", "transformer_lens"},
    "saehub_sparsify": {"sparsify"},
    "saehub_dictionary_learning": {"dictionary_learning", "nnsight"},
    "saehub_saebench": {"sae_bench", "sae_probes", "transformer_lens", "sae_lens"},
    "saehub_transformer_lens": {"transformer_lens"},
}
EVERY_WRAPPED = set().union(*WRAPPED.values())

TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "uv.lock", "saehub", "adapters", "plugins", "recipes", "tests"}


def name(path: Path) -> str:
    """Relative to the repository: what a failing test shows."""
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_of(path: Path) -> str:
    """`saehub/data/model.py` -> `saehub.data.model`; plugin packages lose their folder."""
    base = ROOT if CORE in path.parents or path.parent == CORE else next(package.parent for package in PLUGINS if package in path.parents)
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """(absolute module, statement) of every import in a file, local ones included."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            above = module_of(path).split(".")[: -node.level] if node.level and path.name != "__init__.py" else []
            module = ".".join([*above, node.module] if node.module else above)
            yield module, node
            for alias in node.names:
                yield f"{module}.{alias.name}", node


def top(module: str) -> str:
    """The package of a module."""
    return module.partition(".")[0]


# ---------------------------------------------------------------------- layout
def tracked() -> set[str]:
    """Files under version control, or of the source archive."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return set(listed.stdout.splitlines())
    return {
        name(path) for path in ROOT.rglob("*") if path.is_file() and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    }


def test_top_level_entries_are_those_allowed():
    tops = {path.partition("/")[0] for path in tracked()}
    assert {entry for entry in tops if not entry.startswith(".")} <= TOP_LEVEL


def test_no_lock_file_and_no_build_output_is_tracked():
    bad = [path for path in tracked() if re.search(r"uv\.lock$|(^|/)__pycache__/|\.pyc$|(^|/)dist/|\.egg-info|\.saehub/", path)]
    assert not bad


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=name)
def test_a_module_opens_with_a_docstring_and_ends_within_600_lines(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 600, f"{name(path)} has {lines} lines"
    assert ast.get_docstring(tree(path)), f"{name(path)} does not open with a docstring"
    assert "TODO" not in path.read_text(encoding="utf-8") or path == Path(__file__)


def test_every_public_function_and_class_says_what_it_is():
    silent = []
    for path in SOURCES:
        for node in tree(path).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node):
                silent.append(f"{name(path)}:{node.lineno} {node.name}")
    assert not silent, "\n".join(silent)


def test_no_module_is_empty_and_none_is_unreferenced():
    users: dict[str, set[Path]] = {}
    for path in [*SOURCES, *TESTS]:
        for module, _ in imports(path):
            users.setdefault(module, set()).add(path)
        # Names that are loaded late: "package.module:Class" of a registration, "name": "module" of a lazy package.
        text = path.read_text(encoding="utf-8")
        package = module_of(path) if path.name == "__init__.py" and path in SOURCES else ""
        for target in [*re.findall(r"[\"']([\w.]+):\w", text), *re.findall(r"(?<=\.)\w+(?=:\w)", text)]:
            users.setdefault(target.rpartition(".")[2], set()).add(path)
        for module in re.findall(r"[\"'](saehub[\w.]+)[\"']", text):  # python -m saehub.pipeline.worker
            users.setdefault(module, set()).add(path)
        for stem in re.findall(r"[\"'](\w+)[\"']", text) if package else ():
            users.setdefault(f"{package}.{stem}", set()).add(path)
    metadata_text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    orphans = []
    for path in SOURCES:
        if path.name == "__init__.py":
            continue
        assert len(tree(path).body) > 1, f"{name(path)} holds nothing but a docstring"
        module = module_of(path)
        if not (users.get(module, set()) | users.get(path.stem, set())) - {path} and module not in metadata_text:
            orphans.append(name(path))
    assert not orphans, f"imported by nothing: {orphans}"


def test_every_package_has_an_init():
    missing = {name(path.parent) for path in SOURCES if not (path.parent / "__init__.py").exists()}
    assert not missing


# ---------------------------------------------------------------------- dependency arrows
def test_the_core_names_no_plugin_and_no_wrapped_library():
    forbidden = {package.name for package in PLUGINS} | EVERY_WRAPPED
    found = [
        f"{name(path)}:{node.lineno} imports {module}"
        for path in SOURCES
        if CORE in path.parents
        for module, node in imports(path)
        if top(module) in forbidden
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", PLUGINS, ids=lambda path: path.name)
def test_a_plugin_imports_its_own_library_and_saehub_only(package):
    allowed = WRAPPED.get(package.name, set())
    forbidden = ({other.name for other in PLUGINS} - {package.name}) | (EVERY_WRAPPED - allowed)
    found = [
        f"{name(path)}:{node.lineno} imports {module}"
        for path in package.rglob("*.py")
        for module, node in imports(path)
        if top(module) in forbidden
    ]
    assert not found, "\n".join(found)


def test_every_adapter_is_in_the_table_of_wrapped_libraries():
    assert {package.name for package in ADAPTERS} <= set(WRAPPED)


def test_the_native_plugin_runs_with_torch_and_a_few_small_libraries():
    """GPU machines are often bare: no click, datasets or rich at module level."""
    allowed = {"torch", "transformers", "safetensors", "numpy", "yaml", "pluggy", "saehub", "saehub_native", "triton", "numba", "scipy"}
    native = ROOT / "plugins" / "saehub_native"
    found = []
    for path in native.rglob("*.py"):
        for node in tree(path).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                if top(module) not in allowed | set(sys.stdlib_module_names):
                    found.append(f"{name(path)}:{node.lineno} imports {module}")
    assert not found, "\n".join(found)


def requirement(text: str) -> str:
    """`datasets>=3.0` -> `datasets`."""
    return re.split(r"[<>=!~;\[( ]", text.strip())[0].lower().replace("_", "-")


def test_every_imported_library_is_declared_or_comes_with_one_that_is():
    project = PROJECT["project"]
    declared = {
        requirement(text)
        for text in [*project["dependencies"], *(item for items in project["optional-dependencies"].values() for item in items)]
    }
    brought = {requirement(line) for word in declared - {"saehub"} for line in metadata.requires(word) or () if "extra ==" not in line}
    distributions = metadata.packages_distributions()
    allowed = (
        {package.name for package in PLUGINS} | {"saehub", "pytest", "triton"} | set(sys.stdlib_module_names)
    )  # pytest: our fixtures; triton: torch on a GPU
    found = sorted(
        {
            f"{top(module)} ({name(path)})"
            for path in SOURCES
            for module, _ in imports(path)
            if top(module) not in allowed and not {requirement(word) for word in distributions.get(top(module), ())} & (declared | brought)
        }
    )
    assert not found, f"not declared in pyproject.toml: {found}"


def in_fresh_python(code: str) -> str:
    """stdout of a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LIGHT = ["saehub", "saehub.api", "saehub.hookspecs", "saehub.plugins", "saehub.testing", "saehub.testing.pytest_plugin", "saehub.cli.main"]


@pytest.mark.parametrize("module", [*LIGHT, *(package.name for package in PLUGINS)])
def test_registration_imports_no_torch(module):
    heavy = ("torch", "transformers", "numpy", "pydantic", "rich", "datasets", "scipy", *EVERY_WRAPPED)
    assert in_fresh_python(f"import sys, {module}; print(*[m for m in {heavy!r} if m in sys.modules])") == ""


def test_the_whole_catalogue_and_every_config_import_no_torch():
    code = (
        "import sys\nfrom saehub.api import KINDS\nfrom saehub.plugins import catalog\n"
        "for kind in KINDS:\n    for item in catalog().components(kind).values():\n        if item.distribution == 'saehub': item.load_config()\n"
        f"print(*[m for m in {('torch', 'transformers', *EVERY_WRAPPED)!r} if m in sys.modules])"
    )
    assert in_fresh_python(code) == ""


# ---------------------------------------------------------------------- safety
def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, node) of every call in a file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nothing_that_executes_what_it_reads(path):
    for called, node in calls(path):
        where = f"{name(path)}:{node.lineno}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in ("eval", "exec", "os.system"), where
        if called.endswith("torch.load"):
            assert keywords.get("weights_only") == "True", f"{where}: torch.load without weights_only=True"
        if called in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"):
            loader = keywords.get("Loader", ast.unparse(node.args[1]) if len(node.args) > 1 else "")
            assert loader and loader.rpartition(".")[2] not in ("Loader", "FullLoader", "UnsafeLoader"), (
                f"{where}: {called} without a safe loader"
            )
        if called in ("np.load", "numpy.load"):
            assert keywords.get("allow_pickle", "False") == "False", f"{where}: pickled arrays"
        assert "shell" not in keywords or keywords["shell"] == "False", f"{where}: shell=True"
        assert keywords.get("trust_remote_code") in (None, "False"), f"{where}: trust_remote_code"
    modules = {top(module) for module, _ in imports(path)}
    assert not modules & {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}, f"{name(path)} imports a pickler"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_star_imports_and_no_bare_except(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"{name(path)}:{node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name(path)}:{node.lineno}: bare except"


def test_no_registry_address_and_no_private_path_is_tracked():
    # Written in two pieces, so that this file does not find itself.
    forbidden = ["pypi" + ".org", "pythonhosted" + ".org", "index" + "-url", "/work" + "/", "/tmp" + "/team", "file" + ":///"]
    texts = (".py", ".toml", ".md", ".yaml", ".yml", ".json", ".cfg", ".sh", ".html", ".css", "")
    found = []
    for relative in sorted(tracked()):
        path = ROOT / relative
        if path.suffix in texts and path.is_file() and path.stat().st_size < 2_000_000 and path.name != "tokenizer.json":
            content = path.read_text(encoding="utf-8", errors="ignore")
            found += [f"{relative}: {word}" for word in forbidden if word in content]
    assert not found, "\n".join(found)


# ---------------------------------------------------------------------- everything public is named in a test
def test_every_hook_kind_and_error_is_named_in_a_test():
    from saehub.api import KINDS
    from saehub.errors import ERRORS
    from saehub.hookspecs import HOOKS

    tests = "\n".join(path.read_text(encoding="utf-8") for path in TESTS)
    for word in (*HOOKS, *(f"check_{kind}" for kind in KINDS), *ERRORS, "RecipeError"):
        assert re.search(rf"\b{word}\b", tests), f"no test names {word}"


def test_every_command_and_every_component_is_named_in_the_readme():
    from saehub.api import KINDS
    from saehub.cli.main import COMMANDS
    from saehub.plugins import catalog

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ours = [item.address for kind in KINDS for item in catalog().components(kind).values() if item.distribution == "saehub"]
    for word in [*(f"saehub {command}" for command in COMMANDS), *(f"`{address}`" for address in ours)]:
        assert word in readme, f"README.md does not mention {word}"
    assert "pip install uv && uv run saehub recipe run topk-llama" in readme and "pip install uv && uv run pytest" in readme
