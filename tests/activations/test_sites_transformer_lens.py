"""The names that we print for TransformerLens, against what its bridge caches under them, for every site of four families."""

import shutil
from pathlib import Path

import pytest
import torch

import saehub.builtin
from saehub.activations import taps
from saehub.api import ModelSpec
from saehub.data.model import ModelHandle
from saehub.sites import FAMILIES, Site


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "gemma2", "qwen3"])
def test_the_bridge_holds_the_same_tensors_under_the_printed_names(models, tmp_path, kind):
    models(kind).save_pretrained(tmp_path)
    for file in Path(saehub.builtin.model_dir("tiny-llama")).glob("tokenizer*"):  # the bridge wants one; no text is used
        shutil.copy(file, tmp_path)
    handle = ModelHandle.load(ModelSpec(str(tmp_path), device="cpu", attention="eager"))
    ids_BT = torch.arange(5, 45).reshape(2, 20)
    bridge = handle.bridge()
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(ids_BT)
    torch.testing.assert_close(logits, handle.hf(ids_BT).logits, rtol=1e-5, atol=1e-5)
    for name in FAMILIES[handle.shape.family][1]:
        site = Site(name, None if name == "embed" else 1)
        ours_BTD = taps.read(handle.hf, ids_BT, {0: site.tap(handle.shape)})[0]
        theirs_BTD = cache[site.names(handle.shape)["transformer_lens"]].reshape(ours_BTD.shape)
        torch.testing.assert_close(ours_BTD, theirs_BTD, rtol=1e-5, atol=1e-5 * float(ours_BTD.abs().max()))
