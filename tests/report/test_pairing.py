"""Which SAEs of two runs belong together: by id, by the user's word, or by being the only ones that are alike."""

from __future__ import annotations

import json

import pytest

from saehub.api import Measurement
from saehub.errors import UsageError
from saehub.report.pairing import pair
from saehub.report.run_folder import RunFolder

pytestmark = pytest.mark.quick


def run(folder, **saes):
    """A run folder of SAEs, `id=(k, seed, trainer)`, with one number each."""
    folder.mkdir()
    rows = [vars(Measurement("fvu", 0.5, (name,), "native/core", "saehub.fvu/1")) for name in saes]
    card = {
        name: {
            "architecture": "topk", "kind": "autoencoder", "d_in": 8, "d_out": 8, "d_sae": 32, "trainer": trainer, "params": {"k": k},
            "config": {"k": k}, "provenance": {"site": "resid_post.1", "target_site": None, "trainer": {"seed": seed}},
        }
        for name, (k, seed, trainer) in saes.items()
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps({"measurements": rows}))
    (folder / "run_card.json").write_text(json.dumps({"saes": card}))
    return RunFolder(folder)


CASES = {
    "by sparsity": ({"a16": (16, 0, "native/topk"), "a32": (32, 0, "native/topk")}, {"b32": (32, 0, "native/topk"), "b16": (16, 0, "native/topk")}, {"a16": "b16", "a32": "b32"}),
    "by seed": ({"a0": (8, 0, "native/topk"), "a1": (8, 1, "native/topk")}, {"b1": (8, 1, "native/topk"), "b0": (8, 0, "native/topk")}, {"a0": "b0", "a1": "b1"}),
    "by trainer": ({"a": (8, 0, "native/topk"), "x": (8, 0, "other/topk")}, {"y": (8, 0, "other/topk"), "b": (8, 0, "native/topk")}, {"a": "b", "x": "y"}),
    "what is left": ({"same": (8, 0, "native/topk"), "x": (8, 0, "other/topk")}, {"same": (8, 0, "native/topk"), "y": (8, 0, "third/topk")}, {"x": "y"}),
    "same ids": ({"a": (8, 0, "native/topk"), "b": (16, 0, "native/topk")}, {"a": (16, 0, "native/topk"), "b": (8, 0, "native/topk")}, {}),
    "one each": ({"a": (8, 0, "native/topk")}, {"b": (64, 3, "other/topk")}, {"a": "b"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_saes_that_only_are_alike_are_paired(tmp_path, name):
    left, right, pairs = CASES[name]
    found, told = pair(run(tmp_path / "a", **left), run(tmp_path / "b", **right))
    assert found == pairs
    assert not [text for text in told if "not compared" in text]


def test_what_stays_open_is_said_with_the_option_that_settles_it(tmp_path):
    left = run(tmp_path / "a", x=(8, 0, "native/topk"), y=(8, 0, "native/topk"))
    right = run(tmp_path / "b", u=(8, 0, "native/topk"), v=(8, 0, "native/topk"))
    found, told = pair(left, right)
    assert found == {} and "not compared: x, y of the first run, u, v of the second" in told[0] and told[0].endswith("--map x=u")
    assert pair(left, right, ["x=v"])[0] == {"x": "v", "y": "u"}  # only one is left on either side


@pytest.mark.parametrize(
    ("mapped", "words"),
    [(["x"], "is no pair"), (["z=u"], "the first run has no SAE 'z'"), (["x=w"], "the second run has no SAE 'w'"), (["x=u", "y=u"], "u is already paired")],
)
def test_a_wrong_map_is_refused(tmp_path, mapped, words):
    left = run(tmp_path / "a", x=(8, 0, "native/topk"), y=(8, 0, "native/topk"))
    right = run(tmp_path / "b", u=(8, 0, "native/topk"), v=(8, 0, "native/topk"))
    with pytest.raises(UsageError, match=words):
        pair(left, right, mapped)
