"""The extractor in; proof that it keeps its promises and delivers the network's own numbers out."""

from __future__ import annotations

import torch

from saehub.testing import check_extractor
from saehub_example.extract import BarsExtractor
from saehub_example.extract_config import BarsConfig


def test_promises_of_an_extractor():
    check_extractor("example/bars", {"images": 50}, sites=["conv.0", "conv.1"]).raise_if_failed()


def test_a_row_is_the_convolution_written_out():
    session = BarsExtractor(config := BarsConfig(images=4)).open(None, None, ["conv.0"], lm_batch=4)
    image, kernel = session._image(2)[0], session.kernels[0][:, 0]
    windows = image.unfold(0, 3, 1).unfold(1, 3, 1)  # [size - 2, size - 2, 3, 3]
    expected = torch.einsum("ijab,fab->fij", windows, kernel).relu().mean((1, 2))
    assert torch.allclose(session.rows(0).acts["conv.0"][2], expected, rtol=1e-5)
    assert config.describe()["widths"] == {"conv.0": 8, "conv.1": 16}
