"""`saehub inspect`, `verify`, `convert`, `eval` on a small real checkpoint, whole and damaged; long jobs are replaced."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from saehub.cli.checkpoint import words


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A ReLU SAE of 8 → 24 with a golden probe and a little provenance."""
    import torch

    from saehub.checkpoint.format import save
    from saehub.checkpoint.probe import make_probe
    from saehub.checkpoint.sae import SAE, SAEConfig

    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tensors = {"W_enc": draw(8, 24), "b_enc": draw(24), "W_dec": draw(24, 8), "b_dec": draw(8)}
    sae = SAE.build(SAEConfig(architecture="relu", d_in=8, d_out=8, d_sae=24), tensors, {"site": "resid_post.2"})
    path = tmp_path_factory.mktemp("checkpoint") / "small"
    save(sae, path, probe=make_probe(sae, draw(64, 8)))
    return path


@pytest.mark.quick
def test_words():
    assert words({"a": 1, "b": None, "c": {"d": [1, 2], "e": True}, "f": []}) == "a 1, c (d (1, 2), e yes)"
    assert [words(value) for value in (None, {}, [], False, [1, "x"], 0)] == ["-", "-", "-", "no", "1, x", "0"]


@pytest.mark.quick
def test_inspect(saehub, checkpoint):
    said = saehub("inspect", checkpoint)
    assert said.code == 0
    for line in ("architecture          relu", "d_sae                 24", "W_enc  float32 [8, 24]", "site  resid_post.2"):
        assert line in said.out, line
    assert "missing: model: which language model it was trained on" in said.err
    data = saehub("inspect", checkpoint, "--json").data
    assert data["schema"] == 1 and data["checkpoint"]["tensors"]["b_dec"] == {"dtype": "float32", "shape": [8]}


@pytest.mark.quick
def test_verify(saehub, checkpoint):
    said = saehub("verify", checkpoint)
    assert said.code == 0 and said.err.endswith("verified\n")
    assert [line.split("  ")[0] for line in said.out.splitlines()[2:]] == ["header", "tensors", "probe file", "probe replay", "site"]
    assert "not verified" in said.out  # the site: nobody gave the model
    report = saehub("verify", checkpoint, "--json").data["report"]
    assert report["ok"] is True and set(report["checks"][0]) == {"name", "status", "detail", "fix"}


@pytest.mark.quick
def test_a_changed_tensor_is_code_1(saehub, checkpoint, tmp_path):
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    data = bytearray((damaged / "sae.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "sae.safetensors").write_bytes(data)
    said = saehub("verify", damaged)
    assert said.code == 1 and "NOT verified" in said.err and "failed" in said.out
    assert saehub("verify", damaged, "--json").code == 1


@pytest.mark.quick
@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_what_is_not_there_is_code_2(saehub, tmp_path, verb):
    said = saehub(verb, tmp_path / "nothing")
    assert said.code == 2 and str(tmp_path / "nothing") in said.err


@pytest.mark.quick
def test_a_folder_in_no_format_is_told_so(saehub, tmp_path):
    said = saehub("inspect", tmp_path)
    assert said.code in (2, 4) and "format" in said.err


# ---------------------------------------------------------------- convert


@pytest.fixture()
def converted(monkeypatch):
    """`convert` replaced by a certificate with the outcome that the test sets; its arguments are kept."""
    import saehub.checkpoint.convert as module
    from saehub.checkpoint.certificate import Certificate

    seen = SimpleNamespace(outcome="verified by the target's library", given=None)

    def convert(*args, **kwargs):
        seen.given = args, kwargs
        certificate = Certificate(seen.outcome, {"path": "src", "format": "saehub"}, {"path": "dst", "format": "saelens"}, reason="because")
        if seen.outcome == "refused":
            raise module.Refused("saelens cannot say this SAE", certificate, why="matryoshka groups", fix="formats that can: saehub")
        return certificate

    monkeypatch.setattr(module, "convert", convert)
    return seen


@pytest.mark.quick
@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        ("verified by the target's library", 0),
        ("verified against the published equation", 0),
        ("unverified", 0),
        ("lossy", 0),
        ("inconclusive", 1),
        ("refused", 1),
    ],
)
def test_convert_exits_by_its_outcome(saehub, converted, outcome, code):
    converted.outcome = outcome
    said = saehub("convert", "src", "dst", "--to", "saelens")
    assert said.code == code
    if outcome == "refused":
        assert "error: saelens cannot say this SAE" in said.err and "formats that can: saehub" in said.err
        data = saehub("convert", "src", "dst", "--to", "saelens", "--json").data
        assert data["error"]["certificate"]["outcome"] == "refused"
    else:
        assert said.out.startswith(f"src (saehub) -> dst (saelens): {outcome}\n")
        assert "dst/conversion.json" in said.err
        assert saehub("convert", "src", "dst", "--to", "saelens", "--json").data["certificate"]["outcome"] == outcome


@pytest.mark.quick
def test_convert_hands_its_options_on(saehub, converted):
    saehub(
        "convert",
        "src",
        "dst",
        "--to",
        "saelens",
        "--from",
        "sparsify",
        "--model",
        "gpt2",
        "--allow-lossy",
        "--keep-original",
        "--no-verify",
    )
    args, kwargs = converted.given
    assert [str(arg) for arg in args] == ["src", "dst", "saelens"]
    assert kwargs == {"from_": "sparsify", "model": "gpt2", "allow_lossy": True, "keep_original": True, "verify": False}


@pytest.mark.quick
def test_convert_to_a_format_that_nobody_has(saehub, checkpoint, tmp_path):
    said = saehub("convert", checkpoint, tmp_path / "dst", "--to", "saelense")
    assert said.code == 2 and "did you mean" in said.err


def test_convert_to_our_own_format_really_works(saehub, checkpoint, tmp_path):
    said = saehub("convert", checkpoint, tmp_path / "dst", "--to", "saehub", "--json")
    assert said.code == 0, said.err
    certificate = json.loads((tmp_path / "dst" / "conversion.json").read_text())
    assert certificate["passed"] is True and said.data["certificate"]["support"]["unexplained"] == 0
    assert saehub("verify", tmp_path / "dst").code == 0


# ---------------------------------------------------------------- eval


@pytest.fixture()
def evaluated(monkeypatch, fake_run, tmp_path):
    """`saehub.pipeline.single.evaluate` replaced by one that returns invented rows."""
    from saehub.pipeline import single
    from saehub.pipeline.run import RunResult

    seen = SimpleNamespace(given=None, rows=fake_run.measurements()[:3])

    def evaluate(checkpoint, evaluator, *, listeners=(), out=None, **what):
        seen.given = checkpoint, evaluator, out, what
        return RunResult(tmp_path / "run", tuple(seen.rows), {}, 1.0)

    monkeypatch.setattr(single, "evaluate", evaluate)
    return seen


@pytest.mark.quick
def test_eval_prints_the_table(saehub, evaluated, tmp_path):
    said = saehub(
        "eval",
        "ckpt",
        "--with",
        "native/core",
        "--data",
        "builtin/python-code",
        "--data",
        "mine=x.txt",
        "--set",
        "dead_rate=1e-4",
        "--set",
        "baselines=false",
        "--tokens",
        "500",
    )
    assert said.code == 0 and "0.1293 ± 0.0021" in said.out
    checkpoint, evaluator, out, what = evaluated.given
    assert (checkpoint, evaluator, out) == ("ckpt", "native/core", None)
    assert what == {
        "model": None,
        "data": ("builtin/python-code", "mine=x.txt"),
        "tokens": 500,
        "with_": {"dead_rate": 1e-4, "baselines": False},
    }
    data = saehub("eval", "ckpt", "--with", "native/core", "--json").data
    assert set(data) == {"schema", "run_dir", "measurements"} and len(data["measurements"]) == 3


@pytest.mark.quick
def test_eval_with_a_failed_row_is_code_4(saehub, evaluated, fake_run):
    evaluated.rows = [fake_run.measurement("fvu", "in_sample", None, status="failed", reason="NaN")]
    said = saehub("eval", "ckpt", "--with", "native/core")
    assert said.code == 4 and "failed [1]" in said.out and "[1] NaN" in said.out


@pytest.mark.quick
@pytest.mark.parametrize("setting", ["dead_rate", "=3", "x=[1,"])
def test_eval_with_a_setting_that_cannot_be_read(saehub, evaluated, setting):
    said = saehub("eval", "ckpt", "--with", "native/core", "--set", setting)
    assert said.code == 2 and f"--set {setting}" in said.err
