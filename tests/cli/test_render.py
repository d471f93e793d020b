"""Tables as they are printed, character by character; words from files never become markup."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from saehub.api import Measurement, ModelShape, ModelSpec
from saehub.cli import render
from saehub.pipeline.plan import Stage

pytestmark = pytest.mark.quick


def golden(name: str) -> str:
    """The table as it was looked at and found good; a change is looked at again before it is written there."""
    return (Path(__file__).parent / "golden" / f"{name}.txt").read_text(encoding="utf-8")


def test_results_table(home, capsys, fake_run):
    """lm-eval style: metric, direction, value ± standard error by dataset, n; caveats below."""
    render.results(fake_run.measurements())
    assert capsys.readouterr().out == golden("results")


def test_plan_table(home, capsys):
    stages = (
        Stage(
            "tokens/train",
            "tokens",
            "aaaaaaaaaaaa",
            Path(),
            cached=True,
            detail={"source": "builtin/python-docs (train)", "rows": 1_000_000, "share": [1.0]},
        ),
        Stage(
            "train/a",
            "train",
            "bbbbbbbbbbbb",
            Path(),
            "native/topk",
            partial=True,
            detail={
                "site": "resid_post.2",
                "rows": 999_424,
                "steps": 488,
                "batch": 2048,
                "d_in": 160,
                "d_sae": 1280,
                "memory": 173_000_000,
                "resume_step": 1234,
            },
        ),
        Stage("evaluate/x/y", "evaluate", "cccccccccccc", Path(), "x/y", detail={"datasets": ["in_sample", "out_of_sample"]}),
        Stage("export/z/a", "export", "dddddddddddd", Path(), "z/z", missing=("z_lib",)),
    )
    totals = {
        "bytes_per_token": 640,
        "activation_bytes": 640_000_000,
        "store": "spool",
        "train_memory": 173_000_000,
        "block_memory": 168_000_000,
        "model_memory": 12_700_000,
        "peak_memory": 353_700_000,
        "disk_free": 77_000_000_000,
    }
    shape = ModelShape("llama", 6, 160, 432, 5, 32, 4096, 256)
    render.plan(
        SimpleNamespace(
            stages=stages,
            totals=totals,
            model=ModelSpec("builtin/tiny-llama"),
            shape=shape,
            run_dir=Path("/runs/topk-llama-1a2b"),
            warnings=(),
        )
    )
    assert capsys.readouterr().out == golden("plan")


def test_nothing_measured(home, capsys):
    render.results([])
    assert capsys.readouterr().out == "no measurements\n"


def test_several_evaluators_are_named_in_a_column(home, capsys):
    rows = [Measurement("fvu", 0.5, ("a",), maker, "d/1", site="resid_post.2", dataset="in_sample", n=9) for maker in ("p/q", "r/s")]
    render.results(rows)
    out = capsys.readouterr().out
    assert out.splitlines()[1].endswith("evaluator")
    assert [line.split()[-1] for line in out.splitlines()[3:]] == ["p/q", "r/s"]


def test_words_from_files_are_no_markup(home, capsys):
    hostile = "[red]x[/red] :smile: \x1b[2J"
    rows = [Measurement(hostile, 0.5, (hostile,), hostile, "d/1", site=hostile, dataset=hostile, n=9, note=hostile, unit_of_n=hostile)]
    render.results(rows)
    render.table((hostile,), [(hostile,)], title=hostile)
    render.facts([(hostile, hostile)], title=hostile)
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[red]x[/red] :smile: \\x1b[2J" in out


def test_a_pipe_gets_whole_lines_without_trailing_blanks(home, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS")
    render.table(("a", "b"), [("x" * 90, "y" * 90)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2] == "x" * 90 + "   " + "y" * 90
    assert all(line == line.rstrip() for line in lines)


def test_only_one_module_imports_rich():
    import saehub

    root = Path(saehub.__file__).parent
    users = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if "import rich" in path.read_text(encoding="utf-8") or "from rich" in path.read_text(encoding="utf-8")
    ]
    assert users == ["cli/render.py"]


@pytest.mark.parametrize(
    ("detail", "text"),
    [
        ({"rows": 1_500_000, "memory": 173_000_000}, "1,500,000 rows · memory 173 MB"),
        ({"source": "a + b", "share": [0.7, 0.3]}, "a + b · shares 0.7, 0.3"),
        ({"target_site": "mlp_out.3", "site": "mlp_in.3"}, "→ mlp_out.3 · mlp_in.3"),
        (
            {"new_thing": 3, "empty": None, "yes": True, "no": False, "names": ["x", "y"], "inner": {"rows": 2}},
            "new thing 3 · yes · names x, y · 2 rows",
        ),
        ({"from": "hf://x", "site": None}, "from hf://x"),
        ({}, ""),
    ],
)
def test_details_of_a_stage(detail, text):
    assert render.detail(detail) == text


def test_several_saes_end_with_a_glance(home, capsys, fake_run):
    render.results(fake_run.measurements("a") + fake_run.measurements("b", 0.02))
    heading, names, _, *rows = capsys.readouterr().out.splitlines()[-7:]
    assert heading == "at a glance"
    assert names.split() == "SAE dataset fvu ↓ ce_recovered_zero ↑ l0 dead_share@1e-04 ↓".split()
    assert [row.split("  ")[0] for row in rows] == ["a", "", "b", ""]
    assert rows[0].split() == "a in-sample 0.1293 ± 0.0021 0.9634 ± 0.0012 32.00 ± 0 0.0133 ± 0.0011".split()
    assert rows[3].split() == "out-of-sample 0.2303 ± 0.0051 0.9224 ± 0.0022 32.00 ± 0 0.0133 ± 0.0011".split()


def test_a_narrow_terminal_loses_no_digit(home, capsys, monkeypatch, fake_run):
    """Cells fold; they are never cut, for half a number is a wrong number."""
    monkeypatch.setenv("COLUMNS", "60")
    render.results(fake_run.measurements("a") + fake_run.measurements("b", 0.02))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60
    monkeypatch.setenv("COLUMNS", "200")
    render.results(fake_run.measurements("a") + fake_run.measurements("b", 0.02))
    assert sorted(filter(str.isdigit, capsys.readouterr().out)) == sorted(filter(str.isdigit, out))


def test_a_pair_ends_with_its_stability_beside_both_nulls(home, capsys):
    def pair(metric: str, value: float) -> Measurement:
        return Measurement(metric, value, ("a", "b"), "native/stability", "d/1", site="resid_post.2", stderr=0.01, n=64)

    render.results([pair("shared_share", 0.4), pair("shared_share_random", 0.0), pair("shared_share_init", 0.1), pair("pw_mcc", 0.6)])
    heading, names, _, shared, mcc = capsys.readouterr().out.splitlines()[-5:]
    assert heading.startswith("stability") and names.split()[:5] == ["SAEs", "these", "SAEs", "random", "before"]
    assert [word for word in shared.split() if word.startswith("0.")] == ["0.400", "0.010", "0.000", "0.010", "0.100", "0.010"]
    assert "PW-MCC" in mcc and mcc.count("not measured") == 2
