"""A wrapped extractor asked for inside another plugin's worker: it gets a worker of its own."""

from saehub.pipeline.components import Remote
from saehub.pipeline.evaluation import _extractor, _workers


def test_a_wrapped_extractor_stays_out_of_another_plugins_worker(monkeypatch):
    spec = {"extractor": {"address": "dictionary_learning/nnsight", "config": {}}}
    monkeypatch.setenv("SAEHUB_WORKER", "saelens")
    try:
        assert isinstance(_extractor(spec, None), Remote)
    finally:
        _workers().close()
        _workers.cache_clear()
    monkeypatch.setenv("SAEHUB_WORKER", "dictionary_learning")
    assert type(_extractor(spec, None)).__name__ == "NNsightExtractor"
