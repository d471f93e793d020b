"""A zoo of broken plugins, installed as real distributions on sys.path, in; one red row each, and everything else unharmed, out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from saehub.api import ArchitectureEntry, Component
from saehub.errors import MissingDependency, StageFailed, UsageError
from saehub.plugins import Catalog, PluginRow, Registered, discover

pytestmark = pytest.mark.quick

GOOD = """
    from saehub import Component, hookimpl

    @hookimpl
    def saehub_trainers():
        return [Component(name="good", target="json:JSONDecoder", summary="a stand-in")]
"""


class Zoo:
    """Writes plugins as installed distributions: a module and a dist-info folder with its entry point."""

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, plugin: str, source: str, *, distribution: str | None = None, module: str | None = None, version: str = "1.2") -> None:
        """Install one plugin; the module's name is unique so that no earlier test's import answers for it."""
        distribution = distribution or f"saehub-{plugin}"
        module = module or f"zoo_{distribution.replace('-', '_')}_{abs(hash(str(self.folder))) % 10**8}"
        (self.folder / f"{module}.py").write_text(dedent(source))
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[saehub.plugins]\n{plugin} = {module}\n")

    def row(self, plugin: str) -> PluginRow:
        """The row of the one plugin with that name."""
        (row,) = [row for row in discover().rows() if row.plugin == plugin]
        return row


@pytest.fixture
def zoo(tmp_path, monkeypatch) -> Zoo:
    """An empty folder on sys.path, and no plugin switch set."""
    for switch in ("SAEHUB_DISABLE_PLUGINS", "SAEHUB_STRICT_PLUGINS"):
        monkeypatch.delenv(switch, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Zoo(tmp_path)


BROKEN = {
    "import-error": ("import a_library_nobody_has", "a_library_nobody_has"),
    "syntax-error": ("def broken(:", "SyntaxError"),
    "system-exit": ("raise SystemExit(3)", "SystemExit"),
    "misspelt-hook": ("from saehub import hookimpl\n@hookimpl\ndef saehub_trainerz(): return []", "did you mean 'saehub_trainers'"),
    "misspelt-prefix": ("from saehub import hookimpl\n@hookimpl\ndef sahub_trainers(): return []", "sahub_trainers"),
    "unmarked-hook": ("def saehub_trainers(): return []", "@saehub.hookimpl"),
    "hook-with-argument": ("from saehub import hookimpl\n@hookimpl\ndef saehub_trainers(model): return []", "model"),
    "raising-hook": ("from saehub import hookimpl\n@hookimpl\ndef saehub_trainers(): raise RuntimeError('no luck')", "no luck"),
    "raising-generator": (
        "from saehub import hookimpl\n@hookimpl\ndef saehub_trainers():\n    yield from ()\n    raise OSError('late')",
        "late",
    ),
    "exiting-hook": ("from saehub import hookimpl\n@hookimpl\ndef saehub_trainers(): raise SystemExit('bye')", "bye"),
    "returns-a-number": ("from saehub import hookimpl\n@hookimpl\ndef saehub_trainers(): return 7", "returned a int"),
    "returns-a-string": ("from saehub import hookimpl\n@hookimpl\ndef saehub_evaluators(): return 'mine'", "returned a str"),
    "returns-nothing": ("from saehub import hookimpl\n@hookimpl\ndef saehub_trainers(): pass", "saehub_trainers returned None"),
    "returns-dicts": ("from saehub import hookimpl\n@hookimpl\ndef saehub_exporters(): return [{'name': 'x'}]", "saehub.Component"),
    "wrong-api": (
        "from saehub import Component, hookimpl\n@hookimpl\ndef saehub_trainers(): return [Component(name='t', target='a:B', api=99)]",
        "API version 99",
    ),
    "duplicate": (
        "from saehub import Component, hookimpl\n@hookimpl\ndef saehub_trainers(): return [Component(name='t', target='a:B')] * 2",
        "two trainers are called 't'",
    ),
    "unknown-need": (
        "from saehub import Component, hookimpl\n@hookimpl\ndef saehub_trainers(): return [Component('t', 'a:B', needs=('modell',))]",
        "did you mean 'model'",
    ),
    "needs-a-string": (
        "from saehub import Component, hookimpl\n@hookimpl\ndef saehub_trainers(): return [Component('t', 'a:B', needs='model')]",
        "needs is a string",
    ),
    "requires-a-string": (
        "from saehub import Component, hookimpl\n@hookimpl\ndef saehub_trainers(): return [Component('t', 'a:B', requires='torch')]",
        "requires is a string",
    ),
    "bad-target": (
        "from saehub import Component, hookimpl\n@hookimpl\ndef saehub_trainers(): return [Component('t', 'a.B')]",
        "not well formed",
    ),
    "bad-config": (
        "from saehub import Component, hookimpl\n@hookimpl\ndef saehub_trainers(): return [Component('t', 'a:B', config='a.C')]",
        "not well formed",
    ),
    "bad-name": (
        "from saehub import Component, hookimpl\n@hookimpl\ndef saehub_trainers(): return [Component('x/t', 'a:B')]",
        "not well formed",
    ),
    "bad-architecture": ("from saehub import hookimpl\n@hookimpl\ndef saehub_architectures(): return ['topk']", "saehub.ArchitectureEntry"),
    "lost-recipes": ("from saehub import hookimpl\n@hookimpl\ndef saehub_recipes(): return ['no/such/folder']", "does not exist"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_one_red_row_and_the_others_work(name, zoo):
    source, says = BROKEN[name]
    zoo.add(name, source)
    zoo.add("healthy", GOOD)
    catalog = discover()
    rows = {row.plugin: row for row in catalog.rows()}
    assert rows[name].status == "broken"
    assert says in rows[name].error
    assert "Traceback" in rows[name].trace
    assert rows[name].components == [] and rows[name].version == "1.2" and rows[name].distribution == f"saehub-{name}"
    assert rows["healthy"].status == "ok" and catalog.find("trainer", "healthy/good").plugin == "healthy"
    assert rows["native"].status == "ok"


def test_the_whole_zoo_at_once_leaves_the_commands_working(zoo):
    for name, (source, _) in BROKEN.items():
        zoo.add(name, source)
    zoo.add("loud", "print('hello from a plugin')\n" + dedent(GOOD))
    zoo.add("slow", "import time\ntime.sleep(0.2)\n" + dedent(GOOD))
    environment = {**os.environ, "PYTHONPATH": str(zoo.folder)}
    listing = subprocess.run(
        [sys.executable, "-m", "saehub.cli.main", "plugins", "ls", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert listing.returncode == 0, listing.stderr
    text = json.dumps(json.loads(listing.stdout))  # valid JSON although a plugin printed: stdout is data
    assert all(name in text for name in BROKEN) and "loud" in text and "slow" in text
    checked = subprocess.run(
        [sys.executable, "-m", "saehub.cli.main", "recipe", "check", "topk-llama"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def test_a_slow_or_heavy_registration_works_and_is_named(zoo, monkeypatch):
    zoo.add("asleep", "import time\ntime.sleep(1.05)\n" + dedent(GOOD))
    row = zoo.row("asleep")
    assert row.status == "ok" and row.components and "took 1." in row.warning and "inside functions" in row.warning
    real = dict(sys.modules)
    monkeypatch.setattr(sys, "modules", {name: module for name, module in real.items() if name != "torch"})  # a process that has not imported it
    zoo.add("heavy", "import sys, types\nsys.modules['torch'] = types.ModuleType('torch')\n" + dedent(GOOD))
    assert "imports torch" in zoo.row("heavy").warning


def test_what_a_plugin_prints_goes_to_stderr(zoo, capsys):
    zoo.add("loud", "print('hello from a plugin')\n" + dedent(GOOD))
    assert zoo.row("loud").status == "ok"
    captured = capsys.readouterr()
    assert captured.out == "" and "hello from a plugin" in captured.err


def test_ctrl_c_during_discovery_is_not_swallowed(zoo):
    zoo.add("interrupted", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        discover()


def test_strangers_that_share_a_name_are_both_refused(zoo):
    zoo.add("twin", GOOD, distribution="first-twin")
    zoo.add("twin", GOOD, distribution="second-twin")
    catalog = discover()
    rows = [row for row in catalog.rows() if row.plugin == "twin"]
    assert [row.status for row in rows] == ["broken", "broken"]
    assert all("first-twin" in row.error and "second-twin" in row.error for row in rows)
    assert "twin/good" not in catalog.components("trainer")


def test_disabling_one_distribution_settles_a_name_clash(zoo, monkeypatch):
    zoo.add("twin", GOOD, distribution="first-twin")
    zoo.add("twin", GOOD, distribution="second-twin")
    monkeypatch.setenv("SAEHUB_DISABLE_PLUGINS", "first-twin")
    assert discover().find("trainer", "twin/good").distribution == "second-twin"


def test_no_stranger_can_take_the_name_of_our_own_plugin(zoo):
    zoo.add("native", GOOD, distribution="aaa-native", module="aaa_native_zoo")
    catalog = discover()
    ours, theirs = [row for row in catalog.rows() if row.plugin == "native"]
    assert (ours.distribution, ours.status) == ("saehub", "ok")
    assert theirs.status == "broken" and "aaa-native" in theirs.error
    assert "native/good" not in catalog.components("trainer") and "native/topk" in catalog.components("trainer")


ARCHITECTURE = """
    from saehub import ArchitectureEntry, hookimpl

    @hookimpl
    def saehub_architectures():
        return [ArchitectureEntry(name="softcap", target="pkg.mod:SoftCap")]
"""


def test_an_architecture_name_has_one_provider(zoo):
    zoo.add("alpha", ARCHITECTURE)
    zoo.add("beta", ARCHITECTURE)
    catalog = discover()
    rows = {row.plugin: row for row in catalog.rows()}
    assert rows["alpha"].status == "ok"
    assert rows["beta"].status == "broken" and "already provided by plugin alpha" in rows["beta"].error
    assert catalog.architectures()["softcap"].plugin == "alpha"


def test_no_plugin_can_take_the_name_of_a_built_in_architecture(zoo):
    zoo.add("alpha", ARCHITECTURE.replace("softcap", "topk"))
    row = zoo.row("alpha")
    assert row.status == "broken" and "'topk' is already provided by saehub itself" in row.error


def test_recipes_of_a_plugin_are_listed_under_its_name(zoo):
    folder = zoo.folder / "kitchen"
    folder.mkdir()
    (folder / "soup.yaml").write_text("saehub: 1\n")
    (folder / "notes.txt").write_text("not a recipe")
    zoo.add("cook", f"from saehub import hookimpl\n@hookimpl\ndef saehub_recipes(): return [{str(folder)!r}]")
    assert discover().recipes()["cook/soup"] == folder / "soup.yaml"


def test_a_disabled_plugin_is_not_even_imported(zoo, monkeypatch):
    zoo.add("bad", "raise SystemExit(3)")
    zoo.add("healthy", GOOD)
    monkeypatch.setenv("SAEHUB_DISABLE_PLUGINS", "bad, other")
    row = zoo.row("bad")
    assert (row.status, row.error, row.components) == ("disabled", None, [])
    assert zoo.row("healthy").status == "ok"


def test_strict_mode_raises_the_first_failure(zoo, monkeypatch):
    zoo.add("bad", "import a_library_nobody_has")
    monkeypatch.setenv("SAEHUB_STRICT_PLUGINS", "1")
    with pytest.raises(ModuleNotFoundError, match="a_library_nobody_has"):
        discover()


def catalog_of(*addresses: str, **parts) -> Catalog:
    """A catalogue of trainers with these addresses."""
    rows: dict[str, PluginRow] = {}
    for address in addresses:
        plugin, _, name = address.partition("/")
        row = rows.setdefault(plugin, PluginRow(plugin, f"saehub-{plugin}", "1.0"))
        row.components.append(
            Registered("trainer", Component(name, **{"target": "json:JSONDecoder", **parts}), plugin, row.distribution, "1.0")
        )
    return Catalog(rows.values())


def test_a_full_address_always_works():
    assert catalog_of("native/topk", "house/topk").find("trainer", "house/topk").address == "house/topk"


def test_a_bare_name_works_while_one_plugin_provides_it():
    assert catalog_of("native/topk", "house/gated").find("trainer", "gated").address == "house/gated"


def test_an_ambiguous_name_lists_the_choices():
    with pytest.raises(UsageError, match=r"provided by 2 plugins") as caught:
        catalog_of("native/topk", "house/topk").find("trainer", "topk")
    assert "house/topk, native/topk" in caught.value.fix and caught.value.exit_code == 2


def test_an_unknown_name_suggests_the_nearest_and_lists_all():
    with pytest.raises(UsageError, match=r"did you mean 'native/topk'") as caught:
        catalog_of("native/topk", "house/gated").find("trainer", "native/topkk")
    assert "house/gated, native/topk" in caught.value.fix


def test_an_unknown_name_mentions_broken_plugins():
    catalog = Catalog([PluginRow("house", "saehub-house", "1.0", status="broken", error="ImportError: x")])
    with pytest.raises(UsageError, match="belongs to the plugin 'house', which is broken") as caught:
        catalog.find("trainer", "house/topk")
    assert caught.value.why == "ImportError: x" and "--trace" in caught.value.fix
    with pytest.raises(UsageError) as caught:  # a bare name could be anybody's
        catalog.find("trainer", "topk")
    assert "house" in caught.value.why and "--trace" in caught.value.why


def test_an_unknown_kind_is_a_usage_error():
    with pytest.raises(UsageError, match="did you mean 'trainer'"):
        catalog_of("native/topk").components("trainr")


def test_a_missing_library_names_the_extra():
    catalog = catalog_of("house/topk", requires=("a_library_nobody_has",), extra="fast")
    registered = catalog.find("trainer", "topk")
    assert catalog.missing(registered) == ["a_library_nobody_has"]
    with pytest.raises(MissingDependency) as caught:
        catalog.require(registered)
    assert caught.value.fix == "pip install 'saehub-house[fast]'" and caught.value.exit_code == 3


def test_a_present_library_is_not_imported_to_be_found():
    catalog = catalog_of("house/topk", requires=("this",))  # importing `this` prints a poem
    assert catalog.missing(catalog.find("trainer", "topk")) == [] and "this" not in sys.modules


LOADS = {
    "gone": ("json:NoSuchClass", StageFailed, "NoSuchClass"),
    "no-module": ("json.no_such_module:X", StageFailed, "no module 'json.no_such_module'"),
    "no-package": ("no_such_package_here.sub:X", StageFailed, "no module 'no_such_package_here'"),
}


@pytest.mark.parametrize("name", LOADS)
def test_a_target_that_does_not_exist_blames_the_registration(name):
    target, kind, says = LOADS[name]
    with pytest.raises(kind) as caught:
        catalog_of("house/topk", target=target).find("trainer", "topk").load()
    assert says in str(caught.value)


def test_a_target_that_lacks_a_library_says_how_to_install_it(zoo):
    (zoo.folder / "needs_a_library.py").write_text("import a_library_nobody_has\nclass T: ...\n")
    with pytest.raises(MissingDependency) as caught:
        catalog_of("house/topk", target="needs_a_library:T", extra="fast").find("trainer", "topk").load()
    assert caught.value.fix == "pip install 'saehub-house[fast]'"


def test_a_target_that_exits_at_import_is_a_failed_stage(zoo):
    (zoo.folder / "exits_at_import.py").write_text("raise SystemExit('bye')\n")
    with pytest.raises(StageFailed) as caught:
        catalog_of("house/topk", target="exits_at_import:T").find("trainer", "topk").load()
    assert "SystemExit: bye" in caught.value.said


def test_versions_of_a_component_name_its_distribution_and_its_libraries():
    import importlib.metadata

    versions = catalog_of("house/topk", requires=("pluggy",)).find("trainer", "topk").library_versions()
    assert versions == {"saehub-house": "1.0", "pluggy": importlib.metadata.version("pluggy")}


def test_an_architecture_row_is_a_registered_entry():
    entry = Registered("architecture", ArchitectureEntry("softcap", "json:JSONDecoder"), "house", "saehub-house", "1.0")
    import json as module

    assert entry.address == "house/softcap" and entry.load() is module.JSONDecoder and entry.entry.name == "softcap"


WRONG_TARGETS = """
    from saehub import Component, hookimpl

    @hookimpl
    def saehub_trainers():
        return [Component("class", "json:JSONDecodr"), Component("config", "json:JSONDecoder", config="json:JSONDecoder"),
                Component("lost", "json:JSONDecoder", config="json.decoder:Nothing")]
"""


def test_a_missing_class_and_a_config_that_is_no_dataclass_are_named(zoo):
    zoo.add("wrong", WRONG_TARGETS)
    catalog = discover()
    with pytest.raises(StageFailed, match=r"points at 'json:JSONDecodr', but json has no 'JSONDecodr'; did you mean 'JSONDecode"):
        catalog.find("trainer", "wrong/class").load()
    with pytest.raises(StageFailed, match="json.decoder has no 'Nothing'"):
        catalog.find("trainer", "wrong/lost").load_config()
    with pytest.raises(StageFailed, match="the config 'json:JSONDecoder' of wrong/config is not a dataclass") as caught:
        catalog.find("trainer", "wrong/config").load_config()
    assert "@dataclass" in caught.value.fix


def test_a_recipe_that_names_them_is_told_the_same(zoo):
    from saehub.recipe import check_text

    zoo.add("wrong", WRONG_TARGETS)
    zoo.add("raises", "raise RuntimeError('no luck')")
    text = "saehub: 1\nname: x\nmodel: {name: builtin/tiny-llama}\ndata: {train: {source: builtin/python-docs, tokens: 100}}\n"
    text += "extract: {sites: [resid_post.1]}\ntrain:\n" + "".join(f"  - {{id: t{i}, uses: {name}}}\n" for i, name in enumerate(("wrong/config", "raises/foo")))
    _, problems = check_text(text, "x.yaml", catalog=discover())
    told = "\n".join(map(str, problems))
    assert len(problems) == 2 and "pydantic" not in told, told
    assert "x.yaml:7:20: train.t0.uses: the config 'json:JSONDecoder' of wrong/config is not a dataclass" in told
    assert "x.yaml:8:20: train.t1.uses: trainer 'raises/foo' belongs to the plugin 'raises', which is broken (RuntimeError: no luck)" in told
    assert "saehub plugins ls --trace" in told


def test_the_plugin_of_a_name_that_is_switched_off_and_the_kind_of_another_are_named(zoo, monkeypatch):
    zoo.add("off", GOOD)
    with pytest.raises(UsageError, match="'off/good' is a trainer, not an evaluator"):
        discover().find("evaluator", "off/good")
    monkeypatch.setenv("SAEHUB_DISABLE_PLUGINS", "off")
    with pytest.raises(UsageError, match="belongs to the plugin 'off', which is switched off") as caught:
        discover().find("trainer", "off/good")
    assert caught.value.fix == "unset SAEHUB_DISABLE_PLUGINS"
