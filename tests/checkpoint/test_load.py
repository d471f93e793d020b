"""A folder or hub id becomes an SAE whichever known format it is in; architectures of plugins load; what is not known says what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from saehub import plugins
from saehub.api import ArchitectureEntry, Component
from saehub.checkpoint import format as v1
from saehub.checkpoint.inspect import inspect
from saehub.checkpoint.load import find_format, load
from saehub.checkpoint.probe import make_probe
from saehub.checkpoint.registry import BUILT_IN, architecture, provider
from saehub.checkpoint.sae import SAE
from saehub.checkpoint.verify import verify
from saehub.errors import FormatError, UsageError

pytestmark = pytest.mark.quick


class SoftCap(SAE):
    """A plugin's architecture: f = c tanh(max(p, 0) / c)."""

    def activate(self, p_BF):
        c = self.config.params["c"]
        return c * (p_BF.relu() / c).tanh()

    def margin(self, p_BF):
        return p_BF.abs()


class OneFile:
    """A plugin's format: `one.pt-like` JSON beside a native checkpoint under another name."""

    def __init__(self, config=None):
        pass

    def sniff(self, path):
        return (path / "one.json").is_file()

    def read(self, path):
        return v1.load(path / "inside")

    def refusal(self, sae):
        return None


def registration(name, cls, kind="exporter", requires=()):
    entry = ArchitectureEntry(name, "x:Y", "f = …") if kind == "architecture" else Component(name, "x:Y", requires=requires)
    return SimpleNamespace(
        kind=kind, component=entry, entry=entry, plugin="house", name=name, address=f"house/{name}", distribution="saehub-house", version="1.2",
        load=lambda: cls, load_config=lambda: None, library_versions=lambda: {"saehub-house": "1.2"},
    )  # fmt: skip


@pytest.fixture
def house(monkeypatch):
    """A catalogue with one plugin: the architecture softcap and the format one."""
    found = SimpleNamespace(
        architectures=lambda: {"softcap": registration("softcap", SoftCap, "architecture")},
        components=lambda kind: {"house/one": registration("one", OneFile)} if kind == "exporter" else {},
        require=lambda registered: None,
    )
    monkeypatch.setattr(plugins, "catalog", lambda: found)
    return found


@pytest.fixture
def nobody(monkeypatch):
    """A catalogue without plugins."""
    monkeypatch.setattr(plugins, "catalog", lambda: SimpleNamespace(architectures=dict, components=lambda kind: {}))


def test_import_is_light():
    code = "import sys, saehub.checkpoint, saehub.checkpoint.load, saehub.checkpoint.inspect, saehub.checkpoint.verify, saehub.checkpoint.convert, saehub.checkpoint.registry, saehub_saelens; print([m for m in ('torch', 'numpy', 'safetensors', 'sae_lens') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_built_in_architecture_resolves():
    for entry in BUILT_IN:
        found = architecture(entry.name)
        assert issubclass(found, SAE) and found.__doc__ and provider(entry.name) == "saehub" and entry.summary


def test_an_architecture_of_a_plugin(toy, rows, house, tmp_path):
    base = toy("relu")
    sae = SAE.build(base.config.replace(architecture="softcap", params={"c": 0.7}), base.tensors())
    folder = v1.save(sae, tmp_path / "sae", probe=make_probe(sae, rows))
    assert json.loads((folder / "saehub.json").read_text())["architecture_provider"] == "saehub-house"
    again = load(folder)
    assert isinstance(again, SoftCap) and torch.equal(again(rows), sae(rows)) and verify(folder).ok
    expected = 0.7 * torch.tanh(((rows - base.b_dec) @ base.W_enc + base.b_enc).relu() / 0.7)
    assert torch.allclose(again.encode(rows), expected)


def test_without_the_plugin_the_error_names_its_package(toy, house, tmp_path, monkeypatch):
    base = toy("relu")
    folder = v1.save(SAE.build(base.config.replace(architecture="softcap", params={"c": 0.7}), base.tensors()), tmp_path / "sae")
    monkeypatch.setattr(plugins, "catalog", lambda: SimpleNamespace(architectures=dict, components=lambda kind: {}))
    with pytest.raises(FormatError, match="pip install saehub-house"):
        load(folder)
    with pytest.raises(FormatError, match="did you mean 'topk'"):
        architecture("topkk")


def test_another_package_s_architecture_of_the_same_name_is_not_taken_for_it(toy, house, tmp_path):
    base = toy("relu")
    folder = v1.save(SAE.build(base.config.replace(architecture="softcap", params={"c": 0.7}), base.tensors()), tmp_path / "sae")
    header = json.loads((folder / "saehub.json").read_text())
    header["architecture_provider"] = "somebody-else"
    header["hash"] = v1.header_hash(header)
    (folder / "saehub.json").write_text(json.dumps(header))
    with pytest.raises(FormatError, match="is that of somebody-else; the one installed here is that of saehub-house"):
        load(folder)


def test_a_plugin_that_registers_something_else(house):
    house.architectures = lambda: {"wrong": registration("wrong", dict, "architecture")}
    with pytest.raises(FormatError, match="not a subclass of saehub.SAE"):
        architecture("wrong")


def test_formats_are_recognised(toy, house, tmp_path):
    sae = toy("topk")
    native = v1.save(sae, tmp_path / "native")
    v1.save(sae, tmp_path / "foreign" / "inside")
    (tmp_path / "foreign/one.json").write_text("{}")
    assert (find_format(native), find_format(tmp_path / "foreign"), find_format(tmp_path)) == ("saehub", "house/one", None)
    for path, name in ((native, None), (tmp_path / "foreign", None), (tmp_path / "foreign", "one"), (tmp_path / "foreign", "house")):
        assert torch.equal(load(path, format=name).W_enc, sae.W_enc)


def test_what_is_not_a_checkpoint_says_so(toy, nobody, tmp_path):
    v1.save(toy("topk"), tmp_path / "runs" / "k5")
    with pytest.raises(FormatError, match="name one of those inside it: .*k5"):
        load(tmp_path / "runs")
    with pytest.raises(FormatError, match="it holds nothing"):
        load(tmp_path.joinpath("empty").mkdir() or tmp_path / "empty")
    with pytest.raises(FormatError, match="it is a file"):
        load(tmp_path / "runs/k5/saehub.json")
    with pytest.raises(UsageError, match="hf://org/name"):
        load("org/name")
    with pytest.raises(UsageError, match="no format is called 'saehubb'; did you mean 'saehub'"):
        load(tmp_path, format="saehubb")


@pytest.fixture
def hub(toy, tmp_path, monkeypatch):
    """A repository as huggingface_hub keeps it in its cache, and the switch that forbids the network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--saes"
    sae = toy("topk")
    v1.save(sae, repository / "snapshots" / commit / "layer.2" / "k5")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "refs" / "v1").write_text(commit)
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline_download(tmp_path / "hub"))
    return sae, commit


def offline_download(cache):
    from huggingface_hub import snapshot_download

    return lambda *args, **kwargs: snapshot_download(*args, **kwargs, cache_dir=cache, local_files_only=True)


@pytest.mark.parametrize("text", ["hf://org/saes/layer.2/k5", "hf://org/saes@main/layer.2/k5", "hf://org/saes@v1/layer.2/k5/"])
def test_hub_ids_from_the_cache(hub, text):
    sae, commit = hub
    again = load(text)
    assert torch.equal(again.W_dec, sae.W_dec)
    assert again.provenance["hub"]["commit"] == commit and again.provenance["hub"]["repository"] == "org/saes"
    assert inspect(text)["hub"]["commit"] == commit


def test_hub_ids_that_are_not_there(hub):
    with pytest.raises(UsageError) as error:
        load("hf://org/other")
    assert "hf download org/other" in str(error.value) and error.value.said
    with pytest.raises(UsageError, match="has no folder 'layer.3'"):
        load("hf://org/saes/layer.3")
    for bad in ("hf://org", "hf://org/saes/../../etc", "hf://org/../etc", "hf://", "hf://org/saes@/x"):
        with pytest.raises(UsageError, match="hf://ORGANISATION/REPOSITORY"):
            load(bad)


def test_inspect_says_what_it_is_and_what_is_missing(toy, rows, nobody, tmp_path):
    sae = toy("jumprelu", dtype=torch.bfloat16, provenance={"site": "resid_post.2", "model": {"name": "m"}})
    found = json.loads(json.dumps(inspect(v1.save(sae, tmp_path / "sae", probe=make_probe(sae, rows)))))
    assert (found["format"], found["architecture"], found["d_in"], found["d_sae"]) == ("saehub", "jumprelu", 12, 40)
    assert found["equation"] == "f = max(p, 0) [p > θ_i]"
    assert found["tensors"]["W_dec"] == {"dtype": "bfloat16", "shape": [40, 12]} and found["probe"] == {"rows": 96, "tokens": False}
    missing = {line.partition(":")[0] for line in found["missing"]}
    assert missing == {"tokens", "data", "trainer", "probe tokens"}
    with pytest.raises(FormatError):
        inspect(tmp_path)
