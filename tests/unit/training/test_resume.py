"""What a resumed run is compared with."""

from megatron_sstoken.training.resume import objective_of
from megatron_sstoken.validate.run import plan_run


def test_weights_are_told_as_they_are_used(settings):
    """What the settings leave out is what it is by default, so that saying it is no change."""

    def weights(**changes):
        return objective_of(plan_run(settings(**changes), 1), {})["weights"]

    assert weights() == {"method": "none", "alpha": None, "divisor": "selected"}
    assert weights(weights__method="power") == weights(weights__method="power", weights__alpha=1.0)
    assert weights(weights__method="power", weights__alpha=0.3)["alpha"] == 0.3
