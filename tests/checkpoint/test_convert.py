"""The certificate: faults that a target could have are refused, rounding is explained, and what proves nothing says so."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from saehub import plugins
from saehub.api import Component
from saehub.checkpoint import format as v1
from saehub.checkpoint.certificate import BY_EQUATION, BY_LIBRARY, Certificate
from saehub.checkpoint.compare import compare
from saehub.checkpoint.convert import Refused, convert, in_process
from saehub.checkpoint.inputs import real_rows, synthetic_rows
from saehub.checkpoint.load import load
from saehub.checkpoint.probe import make_probe
from saehub.checkpoint.sae import SAE
from saehub.checkpoint.verify import verify
from saehub.errors import CheckFailed, FormatError, MissingDependency, UsageError

pytestmark = pytest.mark.quick


class House:
    """Another library, played by ours: the same folder under another name, and its own arithmetic in `run`."""

    fault = staticmethod(lambda sae: sae)
    says = staticmethod(lambda sae: None)

    def __init__(self, config=None):
        pass

    def sniff(self, path):
        return (path / "house").is_dir()

    def read(self, path):
        return v1.load(path / "house")

    def write(self, sae, path):
        if sae.config.params.get("k") == 1:
            raise CheckFailed("k must be above 1", why="the house counts from 2")
        v1.save(sae, path / "house")
        return {"folded": ["nothing"], "dropped": ["the smell"]}

    def refusal(self, sae):
        return self.says(sae)

    def run(self, path, x_ND):
        sae = type(self).fault(self.read(path))
        acts = sae.encode(x_ND.double(), dtype=torch.float64)  # another order of sums than float32's
        return acts.float(), sae.decode(acts, like=x_ND, dtype=torch.float64).float()


@pytest.fixture
def house(monkeypatch):
    """A catalogue with the format `house`, whose library counts as installed."""
    made = SimpleNamespace(fault=lambda sae: sae, says=lambda sae: None)
    cls = type("House", (House,), {"fault": staticmethod(lambda sae: made.fault(sae)), "says": staticmethod(lambda sae: made.says(sae))})
    component = Component("house", "x:Y", requires=("house_library",))
    entry = SimpleNamespace(
        component=component, entry=component, plugin="house", name="house", address="house/house", load=lambda: cls, load_config=lambda: None,
        library_versions=lambda: {"house-library": "3.1"},
    )  # fmt: skip
    made.entry = entry
    made.require = lambda registered: None
    monkeypatch.setattr(
        plugins,
        "catalog",
        lambda: SimpleNamespace(architectures=dict, components=lambda kind: {"house/house": entry}, require=lambda r: made.require(r)),
    )
    return made


@pytest.fixture
def source(toy, rows, tmp_path):
    """A JumpReLU checkpoint with a probe."""
    sae = toy("jumprelu", provenance={"site": "resid_post.2"})
    return v1.save(sae, tmp_path / "source", probe=make_probe(sae, rows))


def to_house(source, dst, **settings):
    return convert(source, dst, "house", invoke=in_process, **settings)


def test_a_faithful_conversion_is_verified(source, house, tmp_path):
    certificate = to_house(source, tmp_path / "out")
    assert certificate.outcome == BY_LIBRARY and certificate.passed and certificate.exact_way_back
    assert certificate.rows == 96 + 256 + 128 and certificate.support["unexplained"] == 0 and certificate.active_share > 0.9
    assert certificate.mean_l0 > 1 and certificate.latents_exercised > 0.5
    assert set(certificate.bit_exact) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"} and not certificate.changed
    assert certificate.folded == ["nothing"] and certificate.dropped == ["the smell"]
    stored = json.loads((tmp_path / "out/conversion.json").read_text())
    assert stored["passed"] and stored["source"]["path"] == str(source) and stored["target"]["versions"] == {"house-library": "3.1"}
    assert str(Certificate.read(tmp_path / "out/conversion.json")) == str(certificate)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]  # nothing left of the work
    back = convert(tmp_path / "out", tmp_path / "back", "saehub", invoke=in_process)
    assert back.passed and not back.changed
    was, now = load(source).tensors(), load(tmp_path / "back").tensors()
    assert all(torch.equal(was[name], now[name]) for name in was)


def changed(**tensors):
    return lambda sae: SAE.build(
        sae.config, sae.tensors() | {name: change(getattr(sae, name).detach()) for name, change in tensors.items()}
    )


def configured(**fields):
    return lambda sae: SAE.build(sae.config.replace(**fields), sae.tensors())


FAULTS = {
    "ReLU for JumpReLU": changed(threshold=lambda t: t * 0),
    "threshold rounded to bf16": changed(threshold=lambda t: t.bfloat16().float()),
    "thresholds off by 0.1 %": changed(threshold=lambda t: t * 1.001),
    "b_dec not subtracted": configured(subtract_b_dec=False),
    "rescale flag": configured(decoder_norm_scaling=True),
    "wrong norm": configured(norm_in="layer_norm", norm_out="layer_norm"),
    "output norm forgotten": configured(norm_in="constant_norm_rescale"),
    "weights rounded to fp16": changed(W_enc=lambda t: t.half().float()),
    "decoder rounded to bf16": changed(W_dec=lambda t: t.bfloat16().float()),
    "encoder bias dropped": changed(b_enc=lambda t: t * 0),
    "decoder bias dropped": changed(b_dec=lambda t: t * 0),
    "latents permuted": changed(
        W_enc=lambda t: t.flip(1), b_enc=lambda t: t.flip(0), W_dec=lambda t: t.flip(0), threshold=lambda t: t.flip(0)
    ),
    "features in another scale": changed(W_enc=lambda t: t * 2, b_enc=lambda t: t * 2, threshold=lambda t: t * 2, W_dec=lambda t: t / 2),
    "a factor of sqrt(d)": changed(W_enc=lambda t: t * 12**0.5),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_target_that_computes_something_else_is_refused(source, house, tmp_path, fault):
    house.fault = FAULTS[fault]
    with pytest.raises(Refused) as error:
        to_house(source, tmp_path / "out")
    assert error.value.exit_code == 1 and error.value.certificate.outcome == "refused" and error.value.why
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("wrong", [4, 6])
def test_k_off_by_one_is_refused(toy, rows, house, tmp_path, wrong):
    v1.save(toy("topk"), tmp_path / "source")
    house.fault = configured(params={"k": wrong})
    with pytest.raises(Refused, match="another dictionary"):
        to_house(tmp_path / "source", tmp_path / "out")


def test_lossy_is_asked_for_and_says_by_how_much(source, house, tmp_path):
    house.fault = FAULTS["weights rounded to fp16"]
    certificate = to_house(source, tmp_path / "out", allow_lossy=True)
    assert certificate.outcome == "lossy" and not certificate.passed and 1e-6 < certificate.reconstruction["frobenius"] < 1e-2
    assert "differ by" in certificate.reason and (tmp_path / "out/conversion.json").is_file()


def test_a_target_that_crashes_or_gives_nonsense(source, house, tmp_path):
    house.fault = changed(W_dec=lambda t: t * float("nan"))
    with pytest.raises(Refused) as error:
        to_house(source, tmp_path / "out")
    assert "the target computed NaN" in error.value.why

    def broken(sae):
        raise RuntimeError("no")

    house.fault = broken
    with pytest.raises(RuntimeError):
        to_house(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_rounding_at_the_boundary_is_explained_and_nothing_else(toy, rows):
    """Thresholds put on the very float32 pre-activations of the rows: float32 and float64 disagree on which side some of them are."""
    base = toy("jumprelu")
    p_BF = base.preacts(base.centre(rows)).detach()
    sae = SAE.build(base.config, base.tensors() | {"threshold": p_BF.abs().topk(30, dim=0).values[29]})
    x = rows.repeat(20, 1)
    x[96:] = x[96:] * (1 + 2**-23)
    narrow = (sae.encode(x), sae(x))
    wide = (sae.encode(x, dtype=torch.float64).float(), sae(x, dtype=torch.float64).float())
    found = compare(sae, sae, narrow, wide, x)
    assert found.values["support"]["different"] > 0 and found.values["support"]["unexplained"] == 0 and not found.problems
    off = sae.encode(x).clone()
    row, latent = divmod(int((off > 1.5 * sae.threshold).flatten().nonzero()[0]), 40)
    off[row, latent] = 0  # a latent well inside
    assert compare(sae, sae, (off, sae(x)), wide, x).values["support"]["unexplained"] == 1


def test_a_tie_between_equal_latents_is_explained(toy, rows):
    sae = toy("topk")
    tensors = {name: tensor.clone() for name, tensor in sae.tensors().items()}
    for name in ("W_enc", "b_enc"):
        tensors[name][..., 1] = tensors[name][..., 0]
    sae = SAE.build(sae.config, tensors)
    acts = sae.encode(rows)
    one = (acts[:, 0] != 0) != (acts[:, 1] != 0)
    assert bool(one.any())
    other = torch.where(one[:, None], acts[:, [1, 0, *range(2, 40)]], acts)
    found = compare(sae, sae, (acts, sae.decode(acts)), (other, sae.decode(other)), rows)
    assert found.values["support"] == {
        "rows_equal": int((~one).sum()),
        "different": 2 * int(one.sum()),
        "explained": 2 * int(one.sum()),
        "unexplained": 0,
    }
    assert not found.problems


def test_an_sae_that_stays_asleep_is_inconclusive(toy, rows, house, tmp_path):
    sae = toy("jumprelu")
    asleep = SAE.build(sae.config, sae.tensors() | {"threshold": torch.full((40,), float("inf"))})
    v1.save(asleep, tmp_path / "source")
    certificate = to_house(tmp_path / "source", tmp_path / "out")
    assert certificate.outcome == "inconclusive" and not certificate.passed and "0% of the rows" in certificate.reason
    assert load(tmp_path / "out").config == asleep.config


def test_unverified_runs_nothing(source, house, tmp_path):
    def never(*_, **__):
        raise AssertionError

    certificate = convert(source, tmp_path / "out", "house", verify=False, invoke=never)
    assert certificate.outcome == "unverified" and not certificate.passed and certificate.rows == 0
    assert len(certificate.bit_exact) == 5  # read back and compared all the same


def test_a_missing_library_is_named_before_anything_runs(source, house, tmp_path):
    def absent(registered):
        raise MissingDependency("house/house needs house_library", fix="pip install house-library")

    house.require = absent
    with pytest.raises(MissingDependency, match="--no-verify"):
        to_house(source, tmp_path / "out")
    assert to_house(source, tmp_path / "out", verify=False).outcome == "unverified"


def test_refusals_name_the_formats_that_can(source, toy, house, tmp_path):
    house.says = lambda sae: "the house has no JumpReLU"
    with pytest.raises(Refused) as error:
        to_house(source, tmp_path / "out")
    assert error.value.why == "the house has no JumpReLU" and error.value.fix == "formats that can: saehub"
    house.says = lambda sae: None
    v1.save(toy("topk").__class__(toy("topk").config.replace(params={"k": 1}), toy("topk").tensors()), tmp_path / "one")
    with pytest.raises(Refused, match="counts from 2"):
        to_house(tmp_path / "one", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_format_without_a_library_is_verified_against_its_equation(source, house, tmp_path):
    house.entry.component = Component("house", "x:Y")
    assert to_house(source, tmp_path / "out").outcome == BY_EQUATION


def test_the_destination_is_never_overwritten(source, house, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("…")
    with pytest.raises(UsageError, match="not empty"):
        to_house(source, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert to_house(source, tmp_path / "empty").passed
    assert to_house(source, tmp_path / "new/folders/out").passed


def test_keep_original_is_an_exact_way_back(toy, rows, house, tmp_path):
    """The target stores everything in bf16; the original beside it is what comes back."""
    sae = toy("jumprelu")
    v1.save(sae, tmp_path / "source")
    house.entry.load = lambda: type("Lossy", (House,), {"write": lambda self, s, p: v1.save(s.astype(torch.bfloat16), p / "house") and {}})
    certificate = to_house(tmp_path / "source", tmp_path / "out", allow_lossy=True, keep_original=True)
    assert certificate.outcome == "lossy" and certificate.original == "original" and certificate.exact_way_back and certificate.changed
    back = convert(tmp_path / "out", tmp_path / "back", "saehub", invoke=in_process, verify=False)
    assert back.source["tensors_hash"] == v1.sae_hash(sae)
    assert torch.equal(load(tmp_path / "back").W_enc, sae.W_enc)
    v1.save(toy("jumprelu", seed=3).astype(torch.bfloat16), tmp_path / "out/house", overwrite=True)
    with pytest.raises(FormatError, match="was changed after its conversion"):
        convert(tmp_path / "out", tmp_path / "again", "saehub", invoke=in_process)


def test_verify_sees_that_a_certificate_no_longer_applies(source, toy, house, tmp_path):
    to_house(source, tmp_path / "out")
    assert verify(tmp_path / "out").ok
    v1.save(toy("jumprelu", seed=3), tmp_path / "out/house", overwrite=True)
    report = verify(tmp_path / "out")
    assert not report.ok and "speaks of other tensors" in str(report)


def test_the_probe_goes_along_into_the_hubs_format(source, house, tmp_path):
    convert(source, tmp_path / "copy", "saehub", invoke=in_process)
    assert verify(tmp_path / "copy").ok and v1.read_header(tmp_path / "copy")["probe"]["rows"] == 96


ARCHITECTURES = ("relu", "topk", "abstopk", "batchtopk", "matryoshka", "jumprelu", "gated", "groupmax", "matching_pursuit")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_synthetic_rows_exercise_the_dictionary(toy, architecture):
    sae = toy(architecture)
    x = synthetic_rows(sae, 256)
    active = sae.encode(x) != 0
    assert x.dtype == torch.float32 and x.shape == (256, 12) and torch.equal(x, synthetic_rows(sae, 256))
    assert not torch.equal(x, synthetic_rows(sae, 256, seed=1))
    assert float(active.any(1).float().mean()) >= 0.9 and float(active.any(0).float().mean()) > 0.5
    transcoder = toy("relu", kind="transcoder", subtract_b_dec=False, d_out=7)
    assert float((transcoder.encode(synthetic_rows(transcoder, 128)) != 0).any(1).float().mean()) > 0.9


def test_real_rows_are_the_models_own(toy, house, source, tmp_path):
    from saehub.api import ModelShape

    class Double(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = torch.nn.Module()
            self.model.embed_tokens = torch.nn.Embedding(128, 12)
            self.model.layers = torch.nn.ModuleList([torch.nn.Linear(12, 12) for _ in range(3)])

        def forward(self, input_ids):
            hidden = self.model.embed_tokens(input_ids)
            for layer in self.model.layers:
                hidden = hidden + layer(hidden)
            return hidden

    net, read = Double(), []

    def tokenizer(text, add_special_tokens, verbose):
        read.append([ord(letter) % 128 for letter in text])
        return {"input_ids": read[-1]}

    shape = ModelShape("llama", n_layers=3, d_model=12, d_mlp=1, n_heads=1, d_head=12, vocab=128, context=32)
    model = SimpleNamespace(hf=net, shape=shape, tokenizer=tokenizer, spec=SimpleNamespace(name="double"), fingerprint="x")
    x = real_rows(model, "resid_post.2", 40)
    first = net.model.embed_tokens(torch.tensor(read[0][:32]))
    for layer in net.model.layers[:2]:
        first = first + layer(first)
    expected = net.model.layers[2](first)  # this model's layer 2 gives what is added, and that is its module's output
    assert x.shape == (40, 12) and torch.allclose(x[:7], expected[4:32:4], atol=1e-6)
    certificate = to_house(source, tmp_path / "out", model=model)
    assert "activations of double" in certificate.inputs and certificate.outcome in (BY_LIBRARY, "inconclusive")
    with pytest.raises(UsageError, match="names no site"):
        real_rows(model, "", 40)
