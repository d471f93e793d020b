"""Preflight: each fault planted in an extractor's rows, in the settings or in a checkpoint's site is named, with its fix; and a sound recipe passes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from saehub.api import ModelSpec, Rows
from saehub.checkpoint.config import SAEConfig
from saehub.checkpoint.sae import SAE
from saehub.data.tokens import TokenDataset, TokenPolicy, build
from saehub.errors import StageFailed
from saehub.preflight import tensor
from saehub.preflight.checks import Check, Sample, check_site, check_stream
from saehub.preflight.order import Order, first_block, measure
from saehub.preflight.scan import scan
from saehub.recipe.schema import SourceEntry
from saehub.testing.saes import fit_to
from saehub.testing.stage import Stage
from saehub.testing.toys import tiny_model, tiny_text

SITE, CONTEXT, BOS = "resid_post.0", 16, 256
SETTINGS = {"dtype": "float32", "normalize": "sqrt_d", "context": CONTEXT, "block": 128 * CONTEXT, "batch": 256}


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    torch.set_num_threads(1)
    return Stage(tmp_path_factory.mktemp("preflight"))


@pytest.fixture
def asked(stage):
    """Checks by name of rows that are `edit`ed before the site's checks see them."""
    draw = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, 256, (8, CONTEXT), generator=draw)
    tokens_BT[:, 0] = BOS

    def ask(edit=lambda x: x, site: str = SITE, read: str | None = None, order: Order | None = None, **settings) -> dict[str, Check]:
        x_ND = edit(stage.reference(read or site, tokens_BT))
        keep_N = (tokens_BT != BOS).flatten()
        rows = Rows({site: x_ND}, keep_N, tokens_BT.flatten(), torch.arange(CONTEXT).repeat(8), torch.arange(8).repeat_interleave(CONTEXT))
        sample = Sample(rows, tokens_BT, SETTINGS | settings, order)
        return {check.name.removeprefix(f"{site}: "): check for check in [*check_site(site, sample, stage.model), *check_stream(sample, stage.model)]}

    return ask


def failed(checks: dict[str, Check]) -> dict[str, Check]:
    return {name: check for name, check in checks.items() if check.status == "failed"}


@pytest.mark.parametrize("site", ["resid_pre.1", "resid_mid.0", "resid_post.0", "resid_post.1", "mlp_out.0", "attn_z.1", "model.layers.0.mlp.down_proj:in", "embed"])
def test_sound_rows_pass_everything(asked, site):
    checks = asked(site=site)
    assert not failed(checks), failed(checks)
    assert checks["same as a plain hook"].status == "ok" and checks["splicing back"].status == "ok"


@pytest.mark.parametrize(
    "site, read, words",
    [
        ("resid_post.0", "resid_post.1", "the layer is wrong"),
        ("resid_post.1", "resid_post.0", "the layer is wrong"),
        ("resid_pre.1", "resid_post.1", "before and after a block are confused"),
        ("resid_post.0", "resid_mid.0", "before and after a block are confused"),
        ("mlp_out.0", "attn_out.0", "another tensor of the block"),
    ],
)
def test_another_tensor_is_recognised(asked, stage, site, read, words):
    found = failed(asked(site=site, read=read))
    line = found["same as a plain hook"]
    assert words in line.detail and line.fix
    if "confused" in words or "layer" in words:
        told = line.detail.split("the rows are ")[1].split(",")[0].split(" = ")[0]
        tokens_BT = torch.randint(0, 256, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
        assert tensor.apart(stage.reference(told, tokens_BT), stage.reference(read, tokens_BT)) < 1e-5  # resid_pre.1 is resid_post.0
    assert "splicing back" in found  # logits change, too


def test_the_same_tensor_by_another_name_is_no_fault(asked):
    assert not failed(asked(site="resid_pre.1", read="resid_post.0"))


def test_centred_weights_and_scaled_rows_are_named(asked):
    centred = failed(asked(lambda x: x - x.mean(1, keepdim=True)))
    assert "TransformerLens" in centred["same as a plain hook"].detail and "no_processing" in centred["same as a plain hook"].fix
    scaled = failed(asked(lambda x: 0.25 * x))
    assert "0.25 times" in scaled["same as a plain hook"].detail and "extract.normalize" in scaled["same as a plain hook"].fix
    noisy = failed(asked(lambda x: x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))))
    assert "equal to no neighbour" in noisy["same as a plain hook"].detail


def test_numbers_that_cannot_be_trained_on(asked):
    nan = failed(asked(lambda x: x.index_fill(0, torch.tensor([5]), float("nan"))))
    assert set(nan) == {"finite"} and "1 of 120" in nan["finite"].detail  # the rest would only repeat it
    constant = failed(asked(lambda x: x[:1].expand_as(x).clone()))
    assert "every row is the same" in constant["varies"].detail and constant["varies"].fix
    some = asked(lambda x: torch.cat([x[:, :-2], torch.ones(len(x), 2)], 1))["varies"]
    assert some.status == "warning" and "2 of 32" in some.detail


@pytest.mark.parametrize("dtype, number, fix", [("bfloat16", 3.4e38, "float32"), ("float16", 7e4, "bfloat16")])
def test_overflow_of_the_streams_dtype(asked, dtype, number, fix):
    def plant(x):
        x = x.clone()
        x[3, 0] = number
        return x

    line = failed(asked(plant, dtype=dtype))["dtype"]
    assert f"overflow {dtype}" in line.detail and fix in line.fix
    assert asked(plant)["dtype"].status == "ok"  # float32 holds both


def test_digits_lost_to_a_large_coordinate(asked):
    line = asked(lambda x: torch.cat([x[:, 1:], 4000 + x[:, :1]], 1), dtype="bfloat16")["dtype"]
    assert line.status == "warning" and "rounding" in line.detail


def test_sinks_and_norms(asked):
    sink = asked(lambda x: x * torch.where(torch.arange(len(x)) % CONTEXT == 1, 50.0, 1.0)[:, None])["norms"]
    assert sink.status == "warning" and "exclude" in sink.fix and "square norm" in sink.detail
    assert asked(lambda x: 100 * x, normalize="none")["normalisation"].status == "warning"
    assert asked(lambda x: 100 * x)["normalisation"].status == "ok"


def delivered(pieces: int, text: int, rule: str, batch: int = 256) -> Order:
    """`pieces` sequences of CONTEXT rows out of a text of `text`, in one of three orders."""
    draw = np.random.default_rng(0)
    place_P = np.arange(pieces) if rule != "random" else draw.permutation(text)[:pieces]
    piece_N = np.arange(pieces).repeat(CONTEXT)
    if rule != "as it stands":
        piece_N = draw.permutation(piece_N)
    return measure(piece_N, place_P[piece_N], text, batch)


def test_rows_in_the_order_of_the_text_are_caught_and_a_random_order_is_what_chance_gives(asked):
    found = delivered(200, 5_000, "random")
    assert found.same_expected == pytest.approx((CONTEXT - 1) / (200 * CONTEXT - 1)) and found.beside_expected == 2 / 5_000
    assert found.same == pytest.approx(found.same_expected, abs=0.006) and not found.ordered()
    assert asked(order=found)["shuffled"].status == "ok"

    still = delivered(200, 5_000, "as it stands")
    assert still.same == pytest.approx(1 - 1 / CONTEXT, abs=0.01) and still.in_batch == CONTEXT
    line = failed(asked(order=still))["shuffled"]
    assert "in a random order" in line.detail and line.fix

    neighbours = delivered(200, 5_000, "shuffled within")  # a block of consecutive pieces of text, its rows shuffled
    assert neighbours.same == pytest.approx(neighbours.same_expected, abs=0.006)
    assert neighbours.beside == pytest.approx(2 / 200, abs=0.006) and failed(asked(order=neighbours))["shuffled"]


def test_a_block_of_few_sequences_is_warned_of(asked):
    few = asked(order=delivered(8, 5_000, "random", batch=64))["shuffled"]
    assert few.status == "warning" and "8 sequences" in few.detail and few.fix.startswith("extract.block")
    short = asked(order=delivered(8, 8, "random", batch=64))["shuffled"]
    assert short.status == "warning" and "whole training text is 8 sequences" in short.detail and short.fix.startswith("data.train")
    assert asked()["shuffled"].status == "skipped"


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    """A token dataset of several hundred sequences, many of each document."""
    folder = tmp_path_factory.mktemp("long")
    tiny_model(folder / "model")
    (folder / "text.txt").write_text("\n\n".join(tiny_text(40, words=200)))
    policy = TokenPolicy(context=CONTEXT, bos="sequence", exclude=("bos",))
    return build([(SourceEntry(str(folder / "text.txt")), 1.0)], ModelSpec(str(folder / "model")), policy, folder / "tokens", rows=9_000, calibration=100, seed=1)


def test_the_streams_own_order_is_measured_and_without_its_shuffles_it_is_caught(long_text, monkeypatch):
    settings = dict(seed=3, lm_batch=8, batches_per_block=10, rows=8_000, batch=128)
    found = first_block(long_text, **settings)
    assert found.rows == found.pieces * (CONTEXT - 1) == 1200 and found.text > 500 and not found.ordered()
    assert found.same == pytest.approx(found.same_expected, abs=0.02)
    with monkeypatch.context() as patch:  # rows of a block as the language model gives them
        patch.setattr("saehub.activations.blocks.permutation", lambda n, *parts: np.arange(n))
        still = first_block(long_text, **settings)
    assert still.same > 0.9 and still.ordered()
    monkeypatch.setattr("saehub.data.tokens.permutation", lambda n, *parts: np.arange(n))  # sequences as the documents give them
    neighbours = first_block(TokenDataset.open(long_text.path), **settings)
    assert neighbours.beside > 5 * neighbours.beside_expected and neighbours.ordered()


def test_padding_among_the_rows():
    ids_N = torch.tensor([BOS, 7, 9, 9, 5, 9])
    sample = Sample(Rows({}, torch.tensor([False, True, True, True, True, False]), ids_N), ids_N[None], SETTINGS)
    model = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=9, bos_token_id=BOS))
    leak = check_stream(sample, model)[0]
    assert leak.status == "failed" and leak.detail.startswith("2 of") and "exclude" in leak.fix
    shared = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=9, eos_token_id=9))  # a token that text uses as well
    assert check_stream(sample, shared)[0].status == "ok"


def test_rows_of_files_are_asked_what_they_can_answer():
    x_ND = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    sample = Sample(Rows({"any": x_ND}, torch.ones(64, dtype=torch.bool)), None, {"dtype": "float32", "normalize": "none"})
    found = {check.name.removeprefix("any: "): check.status for check in [*check_site("any", sample, None), *check_stream(sample, None)]}
    assert found["finite"] == "ok" and found["the tensor"] == found["padding"] == found["shuffled"] == "skipped"


def test_files_are_looked_at_from_end_to_end(tmp_path):
    """4,000 rows in two files: more than one batch of them is read, and a broken row is named by the doctor's line."""
    from saehub.pipeline.plan import make_plan
    from saehub.plugins import catalog
    from saehub.preflight.run import for_recipe
    from saehub.recipe import check_text

    x_ND = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)).numpy()
    (tmp_path / "acts" / "resid_post.0").mkdir(parents=True)
    text = f"saehub: 1\nname: files\nextract: {{uses: native/files, with: {{path: {tmp_path}/acts}}, sites: [resid_post.0], calibration: 256}}\n"
    text += "train: [{id: a, uses: native/topk, with: {k: 2, width: 16, batch: 100}}]\n"

    def asked():
        for half in range(2):
            np.save(tmp_path / "acts" / "resid_post.0" / f"{half}.npy", x_ND[2000 * half : 2000 * (half + 1)])
        plan, problems = check_text(text, "files.yaml")
        assert plan is not None, problems
        return {check.name: check for check in for_recipe(make_plan(plan, catalog(), base=tmp_path / "home"))}

    assert asked()["resid_post.0: finite"].detail == "4,000 rows"
    x_ND[3210, 1] = np.inf
    (found,) = asked().values()
    assert found.status == "failed" and f"{tmp_path}/acts/resid_post.0/1.npy: row 1,210 of 'resid_post.0'" in found.detail


def principal(x_ND: torch.Tensor, k: int) -> SAE:
    """A ReLU SAE that is the projection on the k first principal directions: ±v_i as two latents each."""
    mean_D = x_ND.mean(0)
    V_KD = torch.linalg.svd(x_ND - mean_D, full_matrices=False).Vh[:k]
    W_FD = torch.cat([V_KD, -V_KD])
    tensors = {"W_enc": W_FD.T.contiguous(), "b_enc": torch.zeros(2 * k), "W_dec": W_FD, "b_dec": mean_D}
    return SAE.build(SAEConfig("relu", x_ND.shape[1], 2 * k), tensors)


def test_the_site_scan_finds_a_mislabelled_sae(stage):
    tokens = stage.tokens("in_sample")
    tokens_BT, keep_BT = tokens.tokens(0, 16), tokens.keep(0, 16)
    sae = principal(stage.reference("resid_post.1", tokens.tokens(0, 24)), 24)
    right = scan("mine", sae, "resid_post.1", tokens_BT, keep_BT, stage.model)
    assert right.status == "ok" and right.detail.startswith("FVU")
    wrong = scan("mine", sae, "resid_pre.0", tokens_BT, keep_BT, stage.model)
    assert wrong.status == "warning" and "resid_post.1" in wrong.fix and "mislabelled" in wrong.detail
    narrow = scan("mine", fit_to(torch.randn(64, 20), d_sae=48, k=4), "resid_post.1", tokens_BT, keep_BT, stage.model)
    assert narrow.status == "failed" and "width 20, and resid_post.1 gives 32" in narrow.detail


RECIPE = """
saehub: 1
name: flight
model: {{name: {folder}/model, device: cpu}}
data: {{train: {{source: {folder}/text.txt, tokens: 2_000, context: 32}}}}
extract: {{sites: [{site}], lm_batch: 8, block: 4_096, calibration: 256, store: none, dtype: {dtype}}}
train: [{{id: a, uses: native/topk, with: {{k: 4, width: 48, batch: 128}}}}]
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe file; its model's embeddings are 1e5 times too large where asked, so that float16 overflows."""
    folder = tmp_path_factory.mktemp("flight")
    (folder / "text.txt").write_text("\n\n".join(tiny_text(120, words=60)))
    tiny_model(folder / "model")

    def write(site: str = SITE, dtype: str = "float32") -> Path:
        path = folder / f"{site}-{dtype}.yaml"
        path.write_text(RECIPE.format(folder=folder, site=site, dtype=dtype))
        return path

    return write


def test_doctor_checks_a_recipe_without_running_it(recipe, tmp_path, monkeypatch):
    from saehub.cli.main import cli

    monkeypatch.setenv("SAEHUB_HOME", str(tmp_path / "home"))
    told = CliRunner().invoke(cli, ["doctor", "--recipe", str(recipe()), "--json"], standalone_mode=False)
    data = json.loads(told.stdout)
    assert told.return_value == 0 and data["ok"] and {check["status"] for check in data["checks"]} <= {"ok", "warning", "skipped"}
    assert any(check["name"] == f"{SITE}: same as a plain hook" for check in data["checks"])
    assert not (tmp_path / "home" / "store").exists()  # nothing was run


def test_a_run_asks_before_it_trains_and_stops_where_a_check_fails(recipe, tmp_path, monkeypatch):
    from saehub.pipeline.plan import make_plan
    from saehub.pipeline.run import run
    from saehub.plugins import catalog
    from saehub.preflight import run as asking
    from saehub.recipe import check_text

    def go(base: Path):
        parsed, _ = check_text(recipe().read_text(), "flight.yaml")
        seen: list = []
        run(make_plan(parsed, catalog(), base=base), [seen.append])
        return [event.data.get("text", "") for event in seen if event.kind in ("log", "warning")]

    assert any(text.startswith("preflight: ") and "in order" in text for text in go(tmp_path / "a"))
    real = asking.read

    def centred(*arguments):
        sample = real(*arguments)
        sample.rows.acts[SITE] = sample.rows.acts[SITE] - sample.rows.acts[SITE].mean(1, keepdim=True)
        return sample

    monkeypatch.setattr(asking, "read", centred)
    with pytest.raises(StageFailed, match="preflight") as caught:
        go(tmp_path / "b")
    assert "centred" in caught.value.why and caught.value.fix
    assert not list((tmp_path / "b" / "store").glob("train/*/*/checkpoint"))
