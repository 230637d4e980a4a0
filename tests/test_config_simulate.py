import pytest

from skyrl_async.config_loading import load_config
from skyrl_async.preflight import describe_run

BOTH = ("simulate.engine=true", "simulate.learner=true")


def test_nothing_is_simulated_by_default():
    simulate = load_config(None).simulate
    assert (simulate.engine, simulate.learner, simulate.parts) == (False, False, ())


def test_a_dry_run_says_what_is_simulated():
    text = describe_run(load_config(None, BOTH))
    assert "only simulated: engines and learner" in text
    assert "simulated" not in describe_run(load_config(None))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("simulate.reply_tokens=gauss:1",), "is no distribution"),
        ((*BOTH, "engine.kind=sglang", "engine.python=p"), "set engine.kind=embedded"),
        ((*BOTH, "learner.num_ranks=2"), "set learner.num_ranks=1"),
        ((*BOTH, "guard.enabled=true"), "set guard.enabled=false"),
        ((*BOTH, "lora.rank=2", "lora.publish=adapter"), "set lora.publish=merged"),
        (("simulate.load_s=40",), "must be below weight_sync.timeout_s=30"),
        (("simulate.step_s=-1",), "simulate.step_s"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(overrides, reason):
    with pytest.raises(ValueError, match=reason):
        load_config(None, overrides)
