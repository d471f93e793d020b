"""`native/core` keeps what every evaluator promises."""

from saehub.testing import check_evaluator


def test_native_core_conforms(stage):
    check_evaluator("native/core", stage=stage).raise_if_failed()


def test_the_saes_of_every_kind_are_measured(stage):
    from saehub.testing.saes import random_sae

    saes = {"gated": random_sae("gated", d_in=32), "norm": random_sae("relu", d_in=32, norm_in="layer_norm", norm_out="layer_norm")}
    check_evaluator("native/core", {"loss_sequences": 8, "baselines": False}, saes=saes, stage=stage).raise_if_failed()
