"""The page: well formed, whole by itself, true to the run folder, safe from its words; and the run card beside it."""

from __future__ import annotations

import dataclasses
import json
import re
from xml.etree import ElementTree

import pytest

from saehub.report import build, card, pictures, table
from saehub.report.run_folder import RunFolder

pytestmark = pytest.mark.quick
HOSTILE = "<script>alert(1)</script>\"'>& {{ 7*7 }} [red]x[/red] \x1b[31m | `c` \u202egnp"


def parse(page: str) -> ElementTree.Element:
    """The page as XML: every tag is closed, every entity known."""
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))


def text(tree: ElementTree.Element) -> str:
    return " ".join("".join(tree.itertext()).split())


@pytest.fixture()
def page(fake_run, tmp_path):
    run = fake_run.write(tmp_path / "topk-llama-1a2b", ("native-k32", "native-k64"))
    return build.write_report(run).read_text(encoding="utf-8")


def test_it_is_well_formed_and_loads_nothing(page):
    tree = parse(page)
    tags = {element.tag.rpartition("}")[2] for element in tree.iter()}
    assert not tags & {"script", "link", "iframe", "img", "object", "embed", "form", "base"}
    attributes = [(name, value) for element in tree.iter() for name, value in element.attrib.items()]
    assert not [name for name, _ in attributes if name.startswith("on")]
    outside = [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]
    assert outside == []
    style = "".join(element.text or "" for element in tree.iter("style"))
    assert "url(" not in style and "@import" not in style
    assert re.findall(r"https?://[^\s\"<]+", page) == ["http://www.w3.org/2000/svg"] * page.count("<svg ")


def test_headline_numbers_are_text_in_both_columns(page):
    tree = parse(page)
    glance = next(table for table in tree.iter("table") if table.get("class") == "glance")
    rows = [[" ".join("".join(cell.itertext()).split()) for cell in row] for row in glance.iter("tr")]
    assert rows[0][1:] == ["fvu ↓", "ce_recovered_zero ↑", "l0", "dead_share@1e-04 ↓"] or "fraction of variance" in rows[0][1]
    assert rows[1] == ["in-sample", "out-of-sample"] * 4
    assert rows[2][1:3] == ["0.1293 ± 0.0021", "0.2103 ± 0.0051"]
    assert rows[3][1:3] == ["0.1493 ± 0.0021", "0.2303 ± 0.0051"]


def test_an_sae_stands_beside_its_controls_where_they_were_measured(fake_run):
    rows = fake_run.measurements() + [fake_run.measurement("ce_recovered_zero_identity", "in_sample", 1.0, 0.0), fake_run.measurement("fvu_identity", "in_sample", 0.0, 0.0)]
    found = build.controls(table.groups(rows))
    assert [arrow for _, arrow, _ in found["columns"]] == ["↓", "↑"]
    lines = {words: [cell.text.partition(" ")[0] for cell in cells] for _, words, cells in found["lines"]}
    assert lines == {"the SAE": ["0.1293", "0.2103", "0.9634", "0.9424"], "PCA, same k": ["0.3142", "0.3642", "", ""], "identity": ["0", "", "1.000", ""]}
    assert build.controls(table.groups([row for row in rows if not row.metric.startswith("fvu_")])) == {}


def test_one_sae_gets_tiles(fake_run, tmp_path):
    tree = parse(build.write_report(fake_run.write(tmp_path / "r")).read_text(encoding="utf-8"))
    tiles = [" ".join("".join(tile.itertext()).split()) for tile in tree.iter("div") if tile.get("class") == "tile"]
    assert len(tiles) == 4
    assert "0.1293 ± 0.0021in-sample 0.2103 ± 0.0051out-of-sample" in tiles[0].replace("\n", "")


def test_every_measurement_is_in_the_results_table(fake_run, page):
    tree = parse(page)
    tables = [table for table in tree.iter("table") if table.get("class") == "results"]
    cells = [
        " ".join("".join(cell.itertext()).split())
        for table in tables
        for cell in table.iter("td")
        if (cell.get("class") or "").startswith("right")
    ]
    expected = fake_run.measurements() + fake_run.measurements("native-k64", 0.02)
    assert len([cell for cell in cells if cell]) == len(expected)
    assert sum(cell.startswith("undecided") for cell in cells) == 4
    assert "undecided at this budget: N = 21,345" in text(tree)


def test_curves_and_histograms(page):
    drawn = [element for element in parse(page).iter("{http://www.w3.org/2000/svg}svg")]
    labels = [picture.get("aria-label") for picture in drawn]
    assert labels == [
        "FVU against L0 at resid_post.2",
        "CE recovered (zero-ablation) against L0 at resid_post.2",
        *(f"{title} during training" for _, title, _ in pictures.CURVES),
        "firing rates of native-k32",
        "firing rates of native-k64",
    ]
    lines = list(drawn[3].iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == 2
    assert "17 of 1,280 never fired (in-sample)" in page


def test_a_resumed_training_is_drawn_once(fake_run, tmp_path):
    """What was done again after a kill replaces what had been told: x rises along the curve."""
    run = fake_run.write(tmp_path / "r")
    events = fake_run.events(("native-k32",))
    progress = [event for event in events if event["kind"] == "progress"]
    told = progress[:60] + [events[0]] + progress[40:]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in told))
    points = pictures.trainings(RunFolder(run))["train/native-k32"]
    assert [at for at, _ in points] == [event["data"]["rows"] for event in progress]


def test_how_to_load_it(fake_run, page, tmp_path):
    code = [element.text for element in parse(page).iter("code")]
    assert any(f'saehub.load("{tmp_path}/topk-llama-1a2b/checkpoints/native-k32")' in snippet for snippet in code)
    (table,) = [table for table in parse(page).iter("table") if table.get("class") == "plain"]
    rows = [[cell.text for cell in row] for row in table.iter("tr")]
    assert rows[1] == ["saelens", "native-k32", "exports/saelens/native-k32", "verified by the target's library"]
    (others,) = [table for table in parse(page).iter("table") if table.get("class") == "others"]
    assert [row[1].text for row in others.iter("tr")][1:] == ["checkpoints/native-k64"]  # the code stands there once


def test_what_one_reads_first_stands_first_and_full_tables_are_folded_where_there_are_several(page):
    order = ["At a glance", "Sparsity against fidelity", "Training", "Feature density", "All results", "Use it", "How it was made"]
    headings = [heading.text for heading in parse(page).iter("h2")]
    assert [name for name in headings if name in order] == order
    folded = [details for details in parse(page).iter("details") if details.find(".//table[@class='results']") is not None]
    assert [details.find("summary").text.split(" ")[0] for details in folded] == ["native-k32", "native-k64"] and not any(details.get("open") for details in folded)


def test_an_export_without_a_certificate_is_not_called_verified(fake_run, tmp_path):
    run = fake_run.write(tmp_path / "r")
    fake_run.dump(
        run / "run_card.json",
        {
            **fake_run.card(),
            "exports": {"saelens/native-k32": {"outcome": "inconclusive", "reason": "only 3 % of the rows activate any latent"}},
        },
    )
    assert card.certificate(RunFolder(run), "saelens/native-k32") == "inconclusive: only 3 % of the rows activate any latent"
    assert card.certificate(RunFolder(run), "sparsify/native-k32") == "not verified"


def test_hostile_words_stay_words(fake_run, tmp_path):
    """Names from recipes, models, libraries and errors reach the page as text, whatever they hold."""
    run = fake_run.write(tmp_path / "r")
    facts = fake_run.card()
    facts |= {"recipe": HOSTILE, "description": HOSTILE, "warnings": [HOSTILE], "errors": [{"what": HOSTILE}]}
    facts["model"]["name"] = HOSTILE
    facts["saes"] = {HOSTILE: facts["saes"]["native-k32"]}
    facts["data"][HOSTILE] = facts["data"]["train"]
    fake_run.dump(run / "run_card.json", facts)
    rows = [
        dataclasses.replace(
            row,
            subjects=(HOSTILE,),
            site=HOSTILE,
            metric=f"{row.metric}{HOSTILE}",
            dataset=HOSTILE,
            note=HOSTILE,
            definition=HOSTILE,
            version=HOSTILE,
            unit_of_n=HOSTILE,
        )
        for row in fake_run.measurements()[:3] + [fake_run.measurements()[13]]
    ]
    fake_run.dump(run / "results.json", {"measurements": [row.to_json() for row in rows]})
    events = [{**event, "stage": f"train/{HOSTILE}"} for event in fake_run.events(("a",))]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    page = build.write_report(run).read_text(encoding="utf-8")
    tree = parse(page)
    assert not list(tree.iter("script"))
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page
    assert "{{ 7*7 }}" in page and "49" not in (tree.find("head/title").text or "")
    assert text(tree).count("<script>alert(1)</script>") > 10
    markdown = (run / "run_card.md").read_text(encoding="utf-8")
    assert "<script" not in markdown and "\x1b" not in markdown
    for line in markdown.splitlines():
        if line.startswith("| ") and line.count("|") - line.count("\\|") not in (3, 6, 7):
            raise AssertionError(f"a name broke the table: {line}")


@pytest.mark.parametrize("missing", ["results.json", "run_card.json", "events.jsonl", "recipe.lock", None])
def test_what_is_not_there_is_left_out(fake_run, tmp_path, missing):
    run = fake_run.write(tmp_path / "r")
    for name in [missing] if missing else ["results.json", "run_card.json", "events.jsonl", "recipe.lock"]:
        (run / name).unlink()
    tree = parse(build.write_report(run).read_text(encoding="utf-8"))
    if missing in ("results.json", None):
        assert "Nothing was measured" in text(tree)


def test_a_failed_run_says_so(fake_run, tmp_path):
    run = fake_run.write(tmp_path / "r")
    fake_run.dump(run / "run_card.json", {**fake_run.card(), "status": "failed", "errors": [{"what": "the loss is NaN at step 4"}]})
    events = [event for event in fake_run.events(("native-k32",)) if event["kind"] != "run_finished"]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    page = text(parse(build.write_report(run).read_text(encoding="utf-8")))
    assert "Failed: the loss is NaN at step 4" in page
    assert "● failed" in page or "failed" in page


# ---------------------------------------------------------------- run card


def test_run_card_has_the_minimum(fake_run, tmp_path):
    """notes: model id and hash, site, sizes, dtype, normalisation, BOS and masking, mixture, stream hash, tokens, machine, time, probe."""
    run = fake_run.write(tmp_path / "r")
    build.write_report(run)
    markdown = (run / "run_card.md").read_text(encoding="utf-8")
    for words in (
        "builtin/tiny-llama", "ab" * 32, r"resid\_post.2", "160 → 1,280 latents → 160", "topk k 32", "float32", r"sqrt\_d", "| BOS | sequence |", "| excluded tokens | bos, pad |",
        "builtin/python-docs (train, weight 1)", "ff" * 32, "999,424", "16.3k tokens/s", "2 min 11 s", "recipe.lock", "77" * 32, "Linux-6.1-x86", "0.1293 ± 0.0021 | 0.2103 ± 0.0051",
        "saehub.fvu/1", "k 32, expansion 8",
    ):  # fmt: skip
        assert words in markdown, words


def test_what_nobody_measured_is_said(fake_run, tmp_path):
    run = RunFolder(fake_run.write(tmp_path / "r"))
    build.write_report(run.path)
    markdown = (run.path / "run_card.md").read_text(encoding="utf-8")
    assert "| peak memory | not measured |" in markdown
    assert "- feature absorption" in markdown
    assert "- stability over training seeds: no evaluator of this run does; native/stability, with a second seed" in markdown
    assert "redundancy" not in " ".join(card.not_measured(run))
    bare = RunFolder(
        fake_run.write(tmp_path / "bare", rows=[fake_run.measurement("fvu", "in_sample", None, status="not_measured", reason="no model")])
    )
    assert "reconstruction: FVU or explained variance: no model" in card.not_measured(bare)


def test_known_limits(fake_run, tmp_path):
    run = fake_run.write(tmp_path / "r")
    fake_run.dump(
        run / "run_card.json",
        {**fake_run.card(), "warnings": ["out_of_sample is in train"], "resume": "inexact", "resume_changes": ["threads: 2 -> 4"]},
    )
    limits = card.limits(RunFolder(run))
    assert limits[0] == "out_of_sample is in train"
    assert "threads: 2 -> 4" in limits[1] and "not bit-identical" in limits[1]
    assert "another training seed" in limits[2]


def test_the_card_is_a_model_card_of_the_hub_and_of_saelens(fake_run, tmp_path):
    """Front matter and directory entry are YAML with the keys that their readers use; numbers are those of the results."""
    import yaml

    run = fake_run.write(tmp_path / "r")
    facts = fake_run.card()
    facts["model"] |= {"name": "Qwen/Qwen3-0.6B", "shape": {"family": "llama", "n_layers": 6, "d_model": 160, "d_mlp": 640, "n_heads": 4, "d_head": 40, "vocab": 100, "context": 128}}
    facts["data"]["train"]["sources"] = [{"source": "HuggingFaceFW/fineweb", "split": "train", "weight": 1.0}, {"source": "mine.jsonl", "split": "all"}]
    fake_run.dump(run / "run_card.json", facts)
    markdown = build.card.markdown(RunFolder(run))
    _, head, _ = markdown.split("---\n", 2)
    said = yaml.safe_load(head)
    assert said["library_name"] == "saelens" and {"saehub", "topk", "sparse-autoencoder"} <= set(said["tags"])
    assert said["base_model"] == "Qwen/Qwen3-0.6B" and said["datasets"] == ["HuggingFaceFW/fineweb"]
    entry = yaml.safe_load(re.search(r"```yaml\n(.*?)```", markdown, re.DOTALL)[1])
    (release,) = entry.values()
    assert list(entry) == ["topk-llama"] and release["model"] == "Qwen/Qwen3-0.6B" and release["conversion_func"] is None and "repo_id" in release
    assert release["saes"] == [{"id": "blocks.2.hook_resid_post", "path": "exports/saelens/native-k32", "l0": 32.0, "variance_explained": 0.8712, "neuronpedia": None}]


def test_every_item_of_the_minimum_is_filled_or_says_why_not(fake_run, tmp_path):
    from saehub.report.hub import minimum

    known = dict(minimum(RunFolder(fake_run.write(tmp_path / "r"))))
    for name in ("model and revision", "tensor", "architecture and sizes", "dtype and normalisation", "BOS and masking", "data", "tokens trained", "hardware and cost"):
        assert known[name] and not known[name].startswith("not measured"), name
    assert "AMD EPYC, 2 cores" in known["hardware and cost"]
    assert known["verdict"] == "not measured: native/verdict was not run"
    assert known["feature absorption"].startswith("not measured: ")
    assert all(value.partition("not measured:")[2].strip() for value in known.values() if value.startswith("not measured"))
    empty = tmp_path / "empty"
    empty.mkdir()
    bare = dict(minimum(RunFolder(empty)))
    assert [name for name, value in bare.items() if not value.startswith("not measured: ")] in ([], ["model and revision"], ["hardware and cost"], ["model and revision", "hardware and cost"])
    assert "builtin/python-docs" in known["data"] and "heldout" not in known["data"]
