import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.config import Config
from skyrl_async.metrics.waste import Waste, WasteFacts, largest_waste

FACTS = WasteFacts(engine_kind="embedded", staleness_max=2)
LEARNER = ("wait", "prepare", "proximal", "train", "step", "snapshot", "checkpoint")
ENGINE = ("generate", "swap", "wait_episodes", "idle")
ACTOR = ("generate", "environment", "wait_engine", "wait_group", "wait_admission", "other")


def shares(**largest: str) -> dict[str, dict[str, float]]:
    """Return fractions in which one part of each role has 0.41 and its work has the rest."""
    work = {"learner": "train", "engine": "generate", "actor": "generate"}
    found: dict[str, dict[str, float]] = {}
    for role, part in largest.items():
        found[role] = {part: 1.0} if part == work[role] else {part: 0.41, work[role]: 0.39}
        if role == "actor" and part != "generate":
            found[role] = {part: 0.9, "generate": 0.1}
    return found


def waste(fractions, **facts) -> Waste:
    base = {"engine_kind": "embedded", "staleness_max": 2}
    found = largest_waste(fractions, WasteFacts(**{**base, **facts}))
    assert found is not None
    return found


def test_a_learner_that_waits_for_busy_engines_wants_more_of_them():
    found = waste(shares(learner="wait", actor="generate"))
    assert (found.role, found.part, found.fraction) == ("learner", "wait", 0.41)
    assert found.text == (
        "the learner waits for data 41 % of the time: the slots are busy generating, so the "
        "engines are too slow for it; more rollout.num_actors, or a larger staleness.max"
    )
    assert found.knob == "rollout.num_actors"
    sglang = waste(shares(learner="wait", actor="generate"), engine_kind="sglang")
    assert sglang.knob == "engine.num_engines"


def test_a_learner_that_waits_while_filters_reject_most_is_told_which():
    dropped = {"zero_variance": 3000, "pass_rate": 200, "stale": 9000}
    found = waste(shares(learner="wait", actor="generate"), dropped=dropped, groups_used=192)
    assert found.knob == "filters.zero_variance"
    assert "filters reject them (zero_variance)" in found.text
    few = waste(shares(learner="wait", actor="generate"), dropped=dropped, groups_used=3200)
    assert few.knob == "rollout.num_actors"


@pytest.mark.parametrize(
    ("fractions", "facts", "knob", "words"),
    [
        (shares(learner="wait", actor="environment"), {}, "staleness.max", "environments"),
        (shares(learner="wait", actor="wait_group"), {}, "staleness.max", "slowest episode"),
        (shares(learner="wait", actor="wait_engine"), {}, "rollout.num_actors", "max_concurrent"),
        (shares(learner="wait", actor="other"), {}, "rollout.num_actors", "own work"),
        (shares(learner="wait", actor="wait_admission"), {}, "staleness.max", "admission"),
        (shares(learner="wait"), {}, "rollout.num_actors", "waits for data"),
        (
            shares(learner="wait", actor="generate"),
            {"staleness_max": 0},
            "staleness.max",
            "take turns",
        ),
        (shares(learner="prepare"), {}, "learner.tokens_per_microbatch", "prepares batches"),
        (shares(learner="proximal"), {}, "algorithm.proximal", "interpolated"),
        (shares(learner="step"), {}, "learner.num_minibatches", "updates the weights"),
        (shares(learner="snapshot"), {}, "learner.groups_per_step", "copies weights"),
        (shares(learner="checkpoint"), {}, "checkpoint.every_steps", "checkpoints"),
        (
            shares(engine="idle", learner="train", actor="wait_admission"),
            {},
            "learner.num_ranks",
            "the learner is busy",
        ),
        (shares(engine="idle", actor="environment"), {}, "staleness.max", "environments"),
        (shares(engine="idle", actor="generate"), {}, "staleness.max", "admission"),
        (shares(engine="idle"), {"staleness_max": 0}, "staleness.max", "take turns"),
        (shares(engine="wait_episodes"), {}, "rollout.num_actors", "in_process"),
        (shares(engine="swap"), {}, "engine.kv_after_swap", "keep"),
        (shares(engine="swap"), {"kv_after_swap": "keep"}, "learner.groups_per_step", "often"),
        (shares(engine="warmup"), {}, "learner.groups_per_step", "spend in warmup 41 %"),
    ],
)
def test_each_waste_has_its_reason_and_its_knob(fractions, facts, knob, words):
    found = waste(fractions, **facts)
    assert found.knob == knob and words in found.text and knob in found.text


def test_the_larger_one_of_learner_and_engines_counts_and_slots_are_only_the_reason():
    fractions = {
        "learner": {"wait": 0.3, "train": 0.7},
        "engine": {"idle": 0.5, "generate": 0.5},
        "actor": {"wait_admission": 0.95, "generate": 0.05},
    }
    found = waste(fractions)
    assert (found.role, found.part, found.fraction) == ("engine", "idle", 0.5)
    assert largest_waste({"actor": fractions["actor"]}, FACTS) is None


def test_little_waste_is_none():
    assert largest_waste({"learner": {"wait": 0.05, "train": 0.95}}, FACTS) is None
    assert largest_waste({}, FACTS) is None


def has_key(path: str) -> bool:
    section, _, key = path.partition(".")
    return key in type(getattr(Config(), section)).model_fields


part_shares = st.floats(0, 1, allow_nan=False)


@given(
    st.fixed_dictionaries(
        {
            "learner": st.dictionaries(st.sampled_from(LEARNER), part_shares),
            "engine": st.dictionaries(st.sampled_from(ENGINE), part_shares),
            "actor": st.dictionaries(st.sampled_from(ACTOR), part_shares),
        }
    ),
    st.sampled_from(["embedded", "sglang"]),
    st.integers(0, 3),
    st.sampled_from(["recompute", "keep"]),
)
def test_the_knob_is_a_key_of_the_configuration(fractions, kind, staleness, kv):
    facts = WasteFacts(engine_kind=kind, staleness_max=staleness, kv_after_swap=kv)
    found = largest_waste(fractions, facts)
    candidates = [
        share
        for role, work in (("learner", "train"), ("engine", "generate"))
        for part, share in fractions[role].items()
        if part != work
    ]
    if found is None:
        assert max(candidates, default=0) <= 0.05
        return
    assert found.fraction == max(candidates) > 0.05
    assert has_key(found.knob) and f"{100 * found.fraction:.0f} %" in found.text
    assert found.to_json()["text"] == found.text


def test_a_fraction_above_one_is_refused():
    with pytest.raises(ValueError, match=r"fraction=1.5 must be in 0..1"):
        Waste(role="learner", part="wait", fraction=1.5, text="", knob="")
