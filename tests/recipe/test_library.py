"""Names and paths of recipes: built-in, of plugins, of the user's own."""

import shutil

import pytest

from saehub.errors import UsageError
from saehub.plugins import Catalog, PluginRow
from saehub.recipe import library

pytestmark = pytest.mark.quick


@pytest.fixture
def plugins(tmp_path):
    """Two plugins that ship `shared`, one of which also ships `mine`."""
    rows = []
    for plugin, names in (("red", ["shared", "mine", "topk-llama"]), ("blue", ["shared"])):
        folder = tmp_path / "plugins" / plugin
        folder.mkdir(parents=True)
        row = PluginRow(plugin, f"{plugin}-dist", "1")
        for name in names:
            path = folder / f"{name}.yaml"
            path.write_text(f"saehub: 1\nname: {name}\ndescription: from {plugin}\n")
            row.recipes.append(path)
        rows.append(row)
    return Catalog(rows)


def test_built_in_recipes_by_name_with_and_without_suffix(plugins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = library.builtin_dir() / "topk-llama.yaml"
    assert expected.is_file()
    assert library.find("topk-llama", plugins) == library.find("topk-llama.yaml", plugins) == expected


def test_a_checkout_and_a_wheel_find_their_recipes(tmp_path, monkeypatch):
    package = tmp_path / "site" / "saehub"
    (package / "recipe").mkdir(parents=True)
    monkeypatch.setattr(library, "__file__", str(package / "recipe" / "library.py"))
    (tmp_path / "site" / "recipes").mkdir()
    assert library.builtin_dir() == tmp_path / "site" / "recipes"  # a checkout: recipes/ beside saehub/
    (package / "recipes").mkdir()
    assert library.builtin_dir() == package / "recipes"  # a wheel: inside the package


def test_files_win_and_folders_do_not_hide_names(plugins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "topk-llama").mkdir()  # an output folder of that name
    assert library.find("topk-llama", plugins).name == "topk-llama.yaml"
    shutil.copy(library.find("topk-llama", plugins), tmp_path / "topk-llama.yaml")
    assert library.find("topk-llama.yaml", plugins).resolve() == tmp_path / "topk-llama.yaml"
    assert library.find("topk-llama", plugins).parent == library.builtin_dir()


def test_recipes_of_plugins(plugins):
    assert library.find("mine", plugins) == library.find("red/mine", plugins) == plugins.recipes()["red/mine"]
    assert library.find("red/topk-llama", plugins) == plugins.recipes()["red/topk-llama"]
    with pytest.raises(UsageError, match="2 plugins ship a recipe 'shared'") as caught:
        library.find("shared", plugins)
    assert "red/shared, blue/shared" in caught.value.fix


@pytest.mark.parametrize("name", ["topk-lama", "topk-lama.yaml", "some/where/topk-lama.yml"])
def test_a_wrong_name_gets_the_nearest(plugins, name):
    with pytest.raises(UsageError, match="did you mean 'topk-llama'") as caught:
        library.find(name, plugins)
    assert "topk-llama-3.1-8b" in caught.value.fix


def test_folders_and_impossible_names(plugins, tmp_path):
    with pytest.raises(UsageError, match="is a folder, not a recipe"):
        library.find(tmp_path, plugins)
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(UsageError) as caught:
        library.find(tmp_path, plugins)
    assert str(tmp_path / "recipe.yaml") in caught.value.fix
    for name in ("", "x" * 5000, "a\0b"):
        with pytest.raises(UsageError):
            library.find(name, plugins)


def test_listing(plugins):
    (plugins.recipes()["red/mine"]).write_text("a: [")
    rows = {entry.name: entry for entry in library.listing(plugins)}
    assert rows["topk-llama"].origin == "built-in" and "TopK" in rows["topk-llama"].description
    assert rows["blue/shared"].origin == "plugin blue" and rows["blue/shared"].description == "from blue"
    assert rows["red/mine"].description.startswith("cannot be read")
    origins = [entry.origin for entry in rows.values()]
    assert origins == sorted(origins, key=lambda origin: origin != "built-in")  # ours come first
