"""`saehub inspect`, `verify`, `convert`, `eval` on a small real checkpoint, whole and damaged; long jobs are replaced."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from saehub.cli.checkpoint import words
from saehub.errors import Caution


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
    assert said.code == 0 and said.err.endswith("verified: header, tensors, probe file, probe replay; not verified: site\n")
    assert [line.split("  ")[0] for line in said.out.splitlines()[2:]] == ["header", "tensors", "probe file", "probe replay", "site"]
    assert "not verified" in said.out  # the site: nobody gave the model
    report = saehub("verify", checkpoint, "--json").data["report"]
    assert report["ok"] is True and set(report["checks"][0]) == {"name", "status", "detail", "fix"}


@pytest.mark.quick
def test_a_changed_tensor_is_code_1(saehub, checkpoint, tmp_path):
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
    assert said.code == 1 and "in no format that is known here" in said.err


@pytest.mark.quick
@pytest.mark.parametrize("name", ["sae.safetensors", "probe.safetensors"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_inspect_notices_files_that_do_not_fit_the_header(saehub, checkpoint, tmp_path, name, how):
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    file = damaged / name
    file.write_bytes(file.read_bytes()[:-100]) if how == "cut" else file.unlink()
    said = saehub("inspect", damaged)
    assert said.code == 1 and "architecture          relu" in said.out
    assert f"damaged: {file} {'is cut short' if how == 'cut' else 'does not exist'}" in said.err and "fix: restore" in said.err
    data = saehub("inspect", damaged, "--json")
    assert data.code == 1 and len(data.data["checkpoint"]["damaged"]) == 1 and str(file) in data.data["checkpoint"]["damaged"][0]


@pytest.mark.quick
def test_the_missing_or_broken_file_is_named(saehub, checkpoint, tmp_path):
    """A folder that is nearly a checkpoint is told what it lacks, in every format that could be meant, by every command."""
    native, foreign, broken, model = (tmp_path / name for name in ("native", "foreign", "broken", "model"))
    shutil.copytree(checkpoint, native)
    (native / "saehub.json").unlink()
    for folder, files in ((foreign, ["sae_weights.safetensors"]), (broken, ["sae_weights.safetensors", "cfg.json"]), (model, ["config.json"])):
        folder.mkdir()
        for file in files:
            (folder / file).write_text("{")
    for verb, *more in (["inspect"], ["verify"], ["convert", tmp_path / "dst", "--to", "saelens"]):
        for folder, words in (
            (native, "saehub.json of the format saehub is missing"),
            (foreign, "cfg.json of the format saelens/saelens is missing"),
            (broken, "cfg.json cannot be read as JSON"),
        ):
            said = saehub(verb, folder, *more, "--json")
            assert said.code == 1 and words in " ".join(said.out.split()), (verb, folder.name)
    assert "in no format that is known here" in saehub("inspect", model).err, "a config.json alone tells no format"


@pytest.mark.quick
def test_the_checkpoint_inside_a_run_folder_is_named(saehub, checkpoint, tmp_path):
    inside = tmp_path / "run" / "checkpoints" / "a"
    shutil.copytree(checkpoint, inside)
    for verb in (["inspect"], ["eval", "--with", "native/core"]):
        said = saehub(verb[0], tmp_path / "run", *verb[1:])
        assert said.code == 1 and f"fix: name one of those inside it: {inside}" in said.err


@pytest.mark.quick
def test_a_folder_that_cannot_be_written_is_nobodys_bug(saehub, checkpoint, tmp_path):
    (tmp_path / "file").touch()
    said = saehub("convert", checkpoint, tmp_path / "file" / "dst", "--to", "saehub", "--no-verify")
    assert said.code == 2 and f"{tmp_path / 'file' / 'dst'} cannot be written" in said.err


@pytest.mark.quick
def test_a_site_that_cannot_be_proved_though_the_model_was_given_is_code_1(saehub, checkpoint, tmp_path):
    import saehub as package
    from saehub.checkpoint.format import save

    save(package.load(checkpoint), tmp_path / "bare")
    said = saehub("verify", tmp_path / "bare")
    assert said.code == 0 and said.err.endswith("verified: header, tensors; not verified: probe replay, site\n")
    assert "--to saehub --model MODEL adds a probe" in said.err
    for folder in (checkpoint, tmp_path / "bare"):  # a probe without tokens; no probe
        asked = saehub("verify", folder, "--model", "builtin/tiny-llama")
        assert asked.code == 1 and "inconclusive" in asked.out and asked.err.endswith("NOT verified: site\n")
        assert "saehub eval PATH --with native/core --model MODEL" in asked.err


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
        "--strict",
    )
    args, kwargs = converted.given
    assert [str(arg) for arg in args] == ["src", "dst", "saelens"]
    assert kwargs == {"from_": "sparsify", "model": "gpt2", "allow_lossy": True, "keep_original": True, "verify": False, "strict": True}


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


def card_of(path) -> str:
    """The model card that `--push` would send."""
    from saehub.checkpoint.card import card
    from saehub.checkpoint.inspect import inspect

    return card(inspect(str(path)), path, "hf://me/mine")


@pytest.mark.quick
def test_a_source_that_was_changed_after_its_own_conversion_is_told(saehub, checkpoint, tmp_path):
    import saehub as package
    from saehub.checkpoint.format import save

    copy, again = tmp_path / "copy", tmp_path / "again"
    assert saehub("convert", checkpoint, copy, "--to", "saehub", "--no-verify").code == 0
    assert "caution" not in saehub("convert", copy, again, "--to", "saehub", "--no-verify").err
    sae = package.load(copy)
    sae.b_enc.data += 0.1
    save(sae, copy, overwrite=True)
    words = "conversion.json speaks of other tensors"
    with pytest.warns(Caution, match=f"copy: {words}"):
        said = saehub("convert", copy, tmp_path / "third", "--to", "saehub", "--no-verify", "--json")
    assert said.code == 0 and words in said.data["certificate"]["cautions"][0]
    assert words in saehub("verify", tmp_path / "third").out
    with pytest.warns(Caution):
        assert f"  caution: the source's own {words}" in saehub("convert", copy, tmp_path / "fourth", "--to", "saehub", "--no-verify").out
    said = saehub("convert", copy, tmp_path / "fifth", "--to", "saehub", "--no-verify", "--strict")
    assert said.code == 1 and words in said.err and not (tmp_path / "fifth").exists()
    assert saehub("convert", checkpoint, tmp_path / "sixth", "--to", "saehub", "--no-verify", "--strict").code == 0
    assert f"Caution: the source's own {words}" in card_of(tmp_path / "third")
    verified = saehub("verify", copy)
    assert verified.code == 1 and words in verified.out and verified.err.endswith("NOT verified: certificate\n")


@pytest.mark.quick
def test_the_wrong_format_is_blamed_on_the_flag(saehub, checkpoint, tmp_path):
    said = saehub("convert", checkpoint, tmp_path / "dst", "--to", "saelens", "--from", "dictionary_learning")
    assert said.code == 2 and "is not in the format 'dictionary_learning' that was asked for" in said.err
    assert "its files are those of saehub" in said.err and "--from" in said.err


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
    assert (checkpoint, evaluator, out) == ("ckpt", "native/core", None) and what.pop("command").startswith("saehub eval ckpt --with")
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


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--with", "native/topk"], "error: 'native/topk' is a trainer, not an evaluator"),
        (["--with", "native/stability"], "error: native/stability compares SAEs, and saehub eval measures one"),
        (["--with", "native/core", "--set", "foo=3"], "--set foo=3: unknown key 'foo' of native/core"),
        (["--with", "native/core", "--set", "dead_rate=x"], "--set dead_rate=x: should be a number, got 'x'"),
        (["--with", "native/core", "--data", "ok=builtin/python-docs", "--data", "x=no.txt"], "--data x=no.txt: source 'no.txt': no such file"),
        (["--with", "native/core", "--model", "./no"], "--model ./no: there is no model './no'"),
        (["--with", "native/core", "--model", "gpt2"], "--model gpt2: model 'gpt2' is not on this machine"),
    ],
)
def test_eval_speaks_of_its_own_options(saehub, checkpoint, options, words):
    given = [] if "--model" in options else ["--model", "builtin/tiny-llama"]
    given += [] if "--data" in options else ["--data", "builtin/python-docs"]
    said = saehub("eval", checkpoint, *options, *given)
    assert said.code == 2 and words in said.err, said.err
    assert "recipe" not in said.err.partition("fix:")[0] and ":33:" not in said.err and "|" not in said.err


@pytest.mark.quick
@pytest.mark.parametrize(("accepts", "context"), [(64, 64), (4096, 128)])
def test_eval_takes_no_more_context_than_the_model_accepts(checkpoint, tmp_path, accepts, context):
    """A checkpoint that names no context: nothing on the command line could name a shorter one."""
    from saehub.pipeline.single import recipe_for

    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 99}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": accepts, **sizes}))
    found = recipe_for(str(checkpoint), "native/core", model=str(tmp_path / "model"), data=["builtin/python-docs"])
    assert found["data"]["train"]["context"] == context
