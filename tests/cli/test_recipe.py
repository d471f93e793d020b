"""`saehub recipe …` on the recipes in the box and on bad ones; the pipeline itself is replaced where a run would train."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.quick
BAD = """\
saehub: 1
name: bad
model: {name: builtin/tiny-llama}
data:
  train: {source: builtin/python-docs, tokens: 1e5, contxt: 128}
extract: {sites: [resid_post.2]}
train:
  - {id: a, uses: native/topkk, with: {k: 32}}
"""
GOOD = BAD.replace(", contxt: 128", "").replace("topkk", "topk")


@pytest.fixture()
def bad(tmp_path) -> Path:
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)
    return path


@pytest.fixture()
def good(tmp_path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def test_ls(saehub):
    said = saehub("recipe", "ls")
    assert said.code == 0
    assert any(line.startswith("topk-llama ") and "built-in" in line for line in said.out.splitlines())
    assert "saehub recipe run NAME" in said.err
    entries = saehub("recipe", "ls", "--json").data["recipes"]
    assert {"topk-llama", "topk-llama-3.1-8b"} <= {entry["name"] for entry in entries}
    assert all(set(entry) == {"name", "path", "description", "origin"} for entry in entries)


def test_show_is_the_file(saehub):
    from saehub.recipe import library

    said = saehub("recipe", "show", "topk-llama")
    assert said.out == Path(library.find("topk-llama")).read_text()
    assert said.err == ""


def test_show_as_json_is_what_it_means(saehub):
    data = saehub("recipe", "show", "topk-llama", "--json", "--set", "train.native-k32.with.k=64").data
    assert data["schema"] == 1
    assert data["recipe"]["train"][0]["with"]["k"] == 64
    assert data["recipe"]["extract"]["dtype"] == "float32"  # a default that the file does not name
    said = saehub("recipe", "show", "topk-llama", "--set", "seed=1")
    assert said.code == 2 and "--json" in said.err


def test_cp_keeps_the_comments_and_overwrites_nothing(saehub, tmp_path):
    said = saehub("recipe", "cp", "topk-llama", tmp_path / "mine")
    copy = tmp_path / "mine.yaml"
    assert said.code == 0 and said.out == f"{copy}\n"
    assert copy.read_text() == saehub("recipe", "show", "topk-llama").out
    said = saehub("recipe", "cp", "topk-llama", copy)
    assert said.code == 2 and "exists" in said.err and "--force" in said.err
    assert saehub("recipe", "cp", "topk-llama", copy, "--force").code == 0
    assert saehub("recipe", "cp", "topk-llama", tmp_path).out == f"{tmp_path / 'topk-llama.yaml'}\n"
    said = saehub("recipe", "cp", "topk-llama", tmp_path / "no" / "where.yaml")
    assert said.code == 2 and "mkdir -p" in said.err
    assert saehub("recipe", "check", copy).code == 0


def test_check_reports_all_problems_at_their_places(saehub, bad):
    said = saehub("recipe", "check", bad)
    assert said.code == 2
    lines = said.out.splitlines()
    assert lines[0] == f"{bad}:5:53: data.train: unknown key 'contxt'; did you mean 'context'?"
    assert lines[1:3] == ["    5 |   train: {source: builtin/python-docs, tokens: 1e5, contxt: 128}", "      |" + " " * 53 + "^"]
    assert "did you mean 'native/topk'?" in said.out
    assert said.err == f"2 problems in {bad}\n"
    data = saehub("recipe", "check", bad, "--json").data
    assert (data["ok"], data["exit_code"]) == (False, 2)
    assert [(item["line"], item["column"], item["severity"]) for item in data["problems"]] == [(5, 53, "error"), (8, 19, "error")]


def test_check_reports_what_a_plan_would_say_beside_what_the_types_say(saehub, tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text(GOOD.replace("resid_post.2", "resid_post.20").replace("{k: 32}", "{k: 32, lr: no}"))
    said = saehub("recipe", "check", path)
    assert said.code == 2 and f"{path}:6:19: extract.sites.0: site 'resid_post.20': the model has no layer 20" in said.out
    assert f"{path}:8:50: train.a.with.lr: should be a number, got 'no'" in said.out and said.err == f"2 problems in {path}\n"
    path.write_text(GOOD.replace("{k: 32}", "{k: 0, nonsense: 3}"))
    for verb in ("check", "plan"):
        said = saehub("recipe", verb, path)
        assert f"{path}:8:42: train.a.with.k: k is 0; it must be at least 1" in said.out + said.err
        assert f"{path}:8:45: train.a.with: unknown key 'nonsense' of native/topk" in said.out + said.err
    path.write_text(GOOD.replace("tokens: 1e5", "tokens: 0"))  # what comes of a fault is not told beside it
    assert saehub("recipe", "check", path).err == f"1 problem in {path}\n"
    path.write_text(GOOD.replace("{k: 32}", "{k: 3200}"))
    said = saehub("recipe", "check", path)
    assert said.code == 2 and "k is 3200, the dictionary has 1280 latents" in said.out


def test_check_leaves_a_model_that_is_elsewhere_to_the_plan(saehub, tmp_path):
    path = tmp_path / "hub.yaml"
    path.write_text(GOOD.replace("builtin/tiny-llama", "someone/something"))
    assert saehub("recipe", "check", path).code == 0
    assert "is not on this machine" in saehub("recipe", "plan", path).err


def test_check_of_a_good_one(saehub, good):
    said = saehub("recipe", "check", good)
    assert (said.code, said.out, said.err) == (0, "bad: ok\n", f"next: saehub recipe plan {good}\n")
    assert saehub("recipe", "check", good, "--json").data == {"schema": 1, "recipe": "bad", "ok": True, "exit_code": 0, "problems": []}


@pytest.mark.parametrize("verb", ["check", "plan", "run", "show"])
def test_a_name_that_is_no_recipe(saehub, verb):
    said = saehub("recipe", verb, "topk-lama")
    assert said.code == 2
    assert "did you mean 'topk-llama'?" in said.err and said.out == ""


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_bad_recipe_is_refused_with_all_its_problems(saehub, bad, verb):
    said = saehub("recipe", verb, bad)
    assert said.code == 2
    assert f"{bad}:5:53" in said.err and f"{bad}:8:19" in said.err and "error: 2 problems in" in said.err
    assert said.out == ""


def test_a_bad_set_says_which(saehub, good):
    said = saehub("recipe", "check", good, "--set", "train.b.with.k=3")
    assert said.code == 2
    assert "--set train.b.with.k=3" in said.out


def test_the_fix_of_a_bad_set_is_about_that_set(saehub, good, bad):
    for option in ("train.nope.with.k=3", "foo", "train.a.with.k=x y"):
        said = saehub("recipe", "plan", good, "--set", option)
        assert said.code == 2 and "edit it" not in said.err
        assert said.err.endswith(f"fix: correct --set {option}\n".replace("train.a.with.k=x y", "'train.a.with.k=x y'"))
    assert f"fix: correct --set foo; edit it, then: saehub recipe check {bad}" in saehub("recipe", "run", bad, "--set", "foo").err


def test_the_text_of_an_evaluation_is_the_same_for_every_seed(saehub):
    """Else runs over seeds are measured on other sequences, and nothing of them is comparable."""
    plans = [saehub("recipe", "plan", "topk-llama", "--set", f"seed={seed}", "--json").data["plan"]["stages"] for seed in (0, 1)]
    same = {a["id"] for a, b in zip(*plans, strict=True) if a["key"] == b["key"]}
    assert same == {stage["id"] for stage in plans[0] if stage["kind"] == "tokens"} - {"tokens/train"} and len(same) == 2


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_what_only_a_plan_can_see_has_its_place_too(saehub, tmp_path, verb):
    path = tmp_path / "wide.yaml"
    path.write_text(GOOD.replace("k: 32", "k: 320, expansion: 1"))
    said = saehub("recipe", verb, path)
    assert said.code == 2
    assert f"{path}:8:" in said.err and "160" in said.err and "Traceback" not in said.err


# ---------------------------------------------------------------- missing libraries


@pytest.fixture()
def no_sae_lens(monkeypatch):
    """An installation without SAELens."""
    from saehub import plugins

    installed = plugins._installed
    monkeypatch.setattr(plugins, "_installed", lambda module: False if module.startswith("sae_lens") else installed(module))


@pytest.fixture()
def wants_sae_lens(tmp_path, no_sae_lens):
    from saehub.plugins import catalog

    if not catalog().find("exporter", "saelens/saelens").component.requires:
        pytest.fail("the saelens exporter should need sae_lens")
    path = tmp_path / "wants.yaml"
    path.write_text(GOOD + "export:\n  - {uses: saelens}\n")
    return path


@pytest.mark.parametrize("verb", ["check", "plan", "run"])
def test_a_missing_library_is_code_3_with_the_command(saehub, wants_sae_lens, verb):
    said = saehub("recipe", verb, wants_sae_lens)
    assert said.code == 3
    assert "pip install 'saehub[saelens]'" in said.out + said.err
    assert "sae_lens" in said.out + said.err


def test_a_missing_library_in_json(saehub, wants_sae_lens):
    data = saehub("recipe", "plan", wants_sae_lens, "--json").data
    assert data["runnable"] is False
    assert data["missing"] == [
        {
            "component": "saelens/saelens",
            "what": "saelens/saelens needs sae_lens, which is not installed",
            "fix": "pip install 'saehub[saelens]'",
        }
    ]
    data = saehub("recipe", "check", wants_sae_lens, "--json").data
    assert (data["ok"], data["exit_code"], [item["severity"] for item in data["problems"]]) == (False, 3, ["missing"])


# ---------------------------------------------------------------- plan


def test_plan_of_the_default_recipe(saehub, home):
    said = saehub("recipe", "plan", "topk-llama")
    assert said.code == 0, said.err
    for words in (
        "train/native-k32",
        "native/topk",
        "1,464 steps",
        "1,280 latents",
        "evaluate/native/core/native-k32",
        "export/saelens/native-k32",
        "run folder",
        str(home / "runs" / "topk-llama-"),
    ):
        assert words in said.out, words
    assert "next: saehub recipe run topk-llama" in said.err
    assert not home.exists()


def test_plan_as_json(saehub, tmp_path):
    data = saehub("recipe", "plan", "topk-llama", "--json", "--out", tmp_path / "here", "--set", "train.native-k32.with.k=16").data
    assert data["runnable"] is True and data["missing"] == []
    plan = data["plan"]
    assert plan["run_dir"] == str(tmp_path / "here")
    assert {"id", "kind", "key", "component", "cached", "partial", "detail", "where"} <= set(plan["stages"][0])
    dry = saehub(
        "recipe", "run", "topk-llama", "--dry-run", "--json", "--out", tmp_path / "here", "--set", "train.native-k32.with.k=16"
    ).data
    assert [stage["key"] for stage in dry["plan"]["stages"]] == [stage["key"] for stage in plan["stages"]]


def test_next_command_is_quoted(saehub, good):
    said = saehub("recipe", "plan", good, "--set", "description=two words")
    assert f"next: saehub recipe run {good} --set 'description=two words'" in said.err


# ---------------------------------------------------------------- run


@pytest.fixture()
def fake_pipeline(monkeypatch, fake_run, tmp_path):
    """`run(plan, listeners, recipe_text=)` that tells two events, writes an invented run and returns it."""
    from saehub.pipeline import run as module
    from saehub.pipeline.events import Event

    seen = SimpleNamespace(text=None, error=None)

    def run(plan, listeners=(), *, recipe_text=None, command=None):
        seen.text = recipe_text
        for listener in listeners:
            listener(Event("stage_started", "train/a", {}, 10.0))
            listener(
                Event(
                    "progress",
                    "train/a",
                    {"done": 5, "total": 10, "unit": "steps", "rows": 1000, "metrics": {"loss": 0.5, "lr": float("nan")}},
                    20.0,
                )
            )
            listener(Event("stage_finished", "train/a", {"seconds": 12.0}, 22.0))
        fake_run.write(plan.run_dir)
        (plan.run_dir / "report.html").write_text("")
        if seen.error:
            raise seen.error
        return module.RunResult(
            plan.run_dir, tuple(fake_run.measurements()), {"native-k32": plan.run_dir / "checkpoints" / "native-k32"}, 12.5
        )

    monkeypatch.setattr(module, "run", run)
    return seen


def test_run_ends_with_the_results_on_stdout(saehub, good, tmp_path, fake_pipeline):
    said = saehub("recipe", "run", good, "--out", tmp_path / "r")
    assert said.code == 0
    assert said.out.startswith("native-k32 · resid_post.2")
    assert "0.1293 ± 0.0021" in said.out
    assert said.err.splitlines() == [
        f"run folder: {tmp_path / 'r'}",
        "train/a: started",
        "train/a: done in 12 s",
        "",
        "",
        "done in 12 s",
        f"report:  {tmp_path / 'r' / 'report.html'}",
        f"SAE:     saehub.load('{tmp_path / 'r' / 'checkpoints' / 'native-k32'}')",
        f"look:    saehub runs show {tmp_path / 'r'}",
    ]
    assert fake_pipeline.text == GOOD


def test_what_set_changed_stands_below_the_text(saehub, good, tmp_path, fake_pipeline):
    saehub("recipe", "run", good, "--out", tmp_path / "r", "--set", "seed=3", "--set", "description=two words")
    assert fake_pipeline.text == GOOD + "\n# Run with:\n#   --set seed=3\n#   --set 'description=two words'\n"


def test_run_as_json_is_lines(saehub, good, tmp_path, fake_pipeline):
    said = saehub("recipe", "run", good, "--out", tmp_path / "r", "--json")
    assert said.code == 0 and said.err == ""
    *events, summary = said.lines
    assert [event["kind"] for event in events] == ["stage_started", "progress", "stage_finished"]
    assert events[1] == {
        "kind": "progress",
        "stage": "train/a",
        "t": 20.0,
        "data": {"done": 5, "total": 10, "unit": "steps", "rows": 1000, "metrics": {"loss": 0.5, "lr": None}},
    }
    assert set(summary) == {"schema", "kind", "status", "run_dir", "report", "seconds", "checkpoints", "measurements"}
    assert (summary["kind"], summary["status"]) == ("summary", "finished")
    assert {"metric", "value", "stderr", "n", "dataset", "definition"} <= set(summary["measurements"][0])


def test_a_failed_stage_is_code_4_and_names_what_is_kept(saehub, good, tmp_path, fake_pipeline):
    from saehub.errors import Interrupted, StageFailed

    fake_pipeline.error = StageFailed("the loss is NaN", where="train/a", fix="a lower lr")
    said = saehub("recipe", "run", good, "--out", tmp_path / "r")
    assert said.code == 4 and "fvu" in said.out, "what was measured is printed, whatever else failed"
    assert f"what is finished is kept and reported: {tmp_path / 'r' / 'report.html'}" in said.err
    assert said.err.endswith("error: the loss is NaN\nwhere: train/a\n  fix: a lower lr\n")
    said = saehub("recipe", "run", good, "--out", tmp_path / "r2", "--json")
    assert said.code == 4 and "error" in said.out
    fake_pipeline.error = Interrupted("stopped; the state is saved", fix="the same command goes on")
    said = saehub("recipe", "run", good, "--out", tmp_path / "r3")
    assert said.code == 130 and "is kept and reported" not in said.err


def test_a_file_that_is_no_recipe_is_told_once(saehub, tmp_path):
    path = tmp_path / "saehub.json"
    path.write_text('{"format": "saehub", "d_in": 8, "d_sae": 24}')
    said = saehub("recipe", "check", path)
    assert said.code == 2 and "this is no recipe" in said.out and said.err == f"1 problem in {path}\n"


def test_what_comes_next_can_be_pasted(saehub, tmp_path):
    folder = tmp_path / "my recipes"
    folder.mkdir()
    said = saehub("recipe", "cp", "topk-llama", folder / "my own.yaml")
    assert said.err == f"next: saehub recipe check '{folder / 'my own.yaml'}'\n"
    assert saehub("recipe", "check", folder / "my own.yaml").err == f"next: saehub recipe plan '{folder / 'my own.yaml'}'\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["model=builtin/tiny-llama"], "= write {name: builtin/tiny-llama}"),
        (["evaluate=[native/core]"], "= write {uses: native/core}"),
        (["saes=[{id: q, load: hf://foo}]"], "'hf://foo' is not a hub id"),
        (["train.a.sweep={kk: [1]}"], "'kk' cannot be swept"),
        (["train.a.target_site=resid_post.3"], "'resid_post.3' is not among extract.sites"),
        (["train.a.with.batch=0"], "batch is 0; it must be at least 1"),
    ],
)
def test_one_mistake_is_one_problem(saehub, good, options, words):
    said = saehub("recipe", "check", good, *(word for option in options for word in ("--set", option)))
    assert said.code == 2 and words in said.out and said.err == f"1 problem in {good}\n", said.out
