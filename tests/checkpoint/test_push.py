"""Uploads against a stub of the hub: what arrives, the card, the way back with its commit recorded, and every way to fail."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from saehub.checkpoint import format as v1
from saehub.checkpoint.card import card
from saehub.checkpoint.certificate import Certificate
from saehub.checkpoint.inspect import inspect
from saehub.checkpoint.load import load
from saehub.checkpoint.probe import make_probe
from saehub.errors import UsageError

spec = importlib.util.spec_from_file_location("hub_stub", Path(__file__).with_name("hub_stub.py"))
hub_stub = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub_stub)

PROVENANCE = {
    "site": "resid_post.2",
    "model": {"name": "org/model", "revision": "abc"},
    "tokens": {"context": 128, "bos": "sequence"},
    "data": {"tokens_trained": 1_000_000},
    "trainer": {"component": "native/topk", "version": "0.1.0"},
}
RUN = [sys.executable, "-c", "import sys; from saehub.cli.main import main; sys.exit(main())"]


@pytest.fixture
def hub():
    made = hub_stub.Hub()
    yield made
    made.close()


@pytest.fixture
def source(toy, rows, tmp_path):
    sae = toy("topk", provenance=PROVENANCE)
    return v1.save(sae, tmp_path / "source", probe=make_probe(sae, rows))


def call(args, url: str, home: Path, token: str | None = hub_stub.WRITER, **env: str):
    """A fresh process: huggingface_hub reads its settings when it is imported."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    clean |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    clean |= ({"HF_TOKEN": token} if token else {}) | env
    return subprocess.run([*map(str, args)], env=clean, capture_output=True, text=True, timeout=300)


def pushing(source, target="hf://org/saes/layer2"):
    code = "import sys, json; from saehub.checkpoint.push import push\nfrom saehub.errors import SaehubError\ntry: print(json.dumps(push(sys.argv[1], sys.argv[2])))\nexcept SaehubError as e: print(e); sys.exit(e.exit_code)"
    return [sys.executable, "-c", code, source, target]


def test_convert_push_and_load_again(hub, source, tmp_path):
    """`convert --push`, all files and the card in one commit, then `convert hf://…` in another process: same tensors, commit recorded."""
    done = call([*RUN, "convert", source, tmp_path / "out", "--to", "saehub", "--push", "hf://org/saes/layer2", "--json"], hub.url, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    pushed = json.loads(done.stdout)["pushed"]
    (_, before), (commit, files) = hub.repositories["org/saes"]
    assert before == {} and pushed == {"id": "hf://org/saes/layer2", "repository": "org/saes", "folder": "layer2", "commit": commit, "url": f"{hub.url}/org/saes/commit/{commit}"}
    here = {f"layer2/{file.name}": file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert {name: files[name] for name in here} == here and set(files) - set(here) == {"layer2/README.md", "README.md"}
    assert "layer2/conversion.json" in here and not (tmp_path / "out/README.md").exists()
    text = files["layer2/README.md"].decode()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "saehub" and front["base_model"] == "org/model" and {"sparse-autoencoder", "topk"} <= set(front["tags"])
    certificate = Certificate.read(tmp_path / "out/conversion.json")
    for words in ('saehub.load("hf://org/saes/layer2")', "resid_post.2", "k = 5", "1,000,000 tokens", "96 rows", certificate.outcome, f"{certificate.mean_l0:.1f}"):
        assert words in text, words
    assert yaml.safe_load(files["README.md"].decode().split("---")[1])["library_name"] == "saehub"

    back = call([*RUN, "convert", "hf://org/saes/layer2", tmp_path / "back", "--to", "saehub", "--no-verify"], hub.url, tmp_path / "home", token=None)
    assert back.returncode == 0, back.stderr
    again, was = load(tmp_path / "back"), load(source)
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in was.tensors().items())
    assert again.provenance["hub"] == {"id": "hf://org/saes/layer2", "repository": "org/saes", "folder": "layer2", "revision": "main", "commit": commit}
    # offline now, out of the cache: the same commit
    off = call([*RUN, "inspect", "hf://org/saes/layer2", "--json"], hub.url, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert json.loads(off.stdout)["checkpoint"]["hub"]["commit"] == commit, off.stderr

    # a second push into the same repository keeps its front page, and what it had
    (tmp_path / "out/README.md").write_text("---\nlibrary_name: mine\n---\nmine")
    second = call(pushing(tmp_path / "out", "hf://org/saes/other"), hub.url, tmp_path / "home")
    assert second.returncode == 0, second.stdout
    now = hub.repositories["org/saes"][-1][1]
    assert now["other/README.md"].endswith(b"mine") and now["README.md"] == files["README.md"] and now["layer2/sae.safetensors"] == files["layer2/sae.safetensors"]


def test_every_way_to_fail(hub, source, tmp_path):
    """Each says why and what to do, exits with 2, and leaves the repository as it was."""
    home, before = tmp_path / "home", lambda: len(hub.repositories.get("org/saes", []))
    cases = [
        (dict(token=None), "no access token was found", "hf auth login"),
        (dict(HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
        (dict(token=hub_stub.READER), "no permission to write", "ask the organisation"),
        (dict(token="hf_wrong"), "does not accept the access token", "hf auth login"),
        (dict(HF_ENDPOINT="http://127.0.0.1:9"), "the upload failed", "check the network"),
    ]
    for settings, why, fix in cases:
        said = call(pushing(source), hub.url, home, **settings)
        assert said.returncode == 2 and why in said.stdout and fix in said.stdout, (settings, said.stdout, said.stderr)
        assert before() == 0
    hub.broken_commits = 100
    said = call(pushing(source), hub.url, home)
    assert said.returncode == 2 and "at the same time" in said.stdout and before() == 1, said.stdout
    # with the command line, said before any work is done
    for target, words in (("hf://org", "is not a hub id"), ("hf://org/saes@main/x", "names a revision"), ("hf://org/saes", "no access token")):
        said = call([*RUN, "convert", source, tmp_path / "out", "--to", "saehub", "--push", target], hub.url, home, token=None)
        assert said.returncode == 2 and words in said.stderr and not (tmp_path / "out").exists(), said.stderr


def test_what_was_not_proved_is_not_pushed(hub, toy, tmp_path):
    """An inconclusive conversion stays here."""
    sae = toy("jumprelu")
    v1.save(type(sae)(sae.config, sae.tensors() | {"threshold": torch.full((40,), 1e9)}), tmp_path / "source")
    done = call([*RUN, "convert", tmp_path / "source", tmp_path / "out", "--to", "saehub", "--push", "hf://org/saes"], hub.url, tmp_path / "home")
    assert done.returncode == 1 and "not pushed" in done.stderr and not hub.repositories, done.stderr


@pytest.mark.quick
def test_the_card_is_nothing_but_words(toy, tmp_path):
    """A hostile name in a checkpoint makes no table cell, tag, link or YAML of its own."""
    hostile = 'x|y\n---\n<script>alert(1)</script> [a](http://b) `c` "q": z'
    v1.save(toy("topk", provenance={**PROVENANCE, "site": hostile, "model": {"name": f"org/{hostile}"}}), tmp_path / "a")
    text = card(inspect(tmp_path / "a"), tmp_path / "a", "hf://org/saes", {"fvu": 0.123456789})
    front = yaml.safe_load(text.split("---\n")[1])
    assert set(front) <= {"library_name", "tags", "base_model"} and front["library_name"] == "saehub"
    body = text.split("---\n", 2)[2]
    assert "<script>" not in body and "[a](http" not in body and "| fvu | 0.123457 |" in body
    assert all(line.count("|") - line.count("\\|") == 3 for line in body.splitlines() if line.startswith("| "))
    assert "probe: without one" in body


@pytest.mark.quick
def test_wrong_ids_are_refused_before_anything(source):
    from saehub.checkpoint.push import push

    for target in ("org/saes", "hf://org", "hf://org/saes/../x", "hf://org/saes@main"):
        with pytest.raises(UsageError):
            push(source, target)
