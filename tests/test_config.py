import pytest
from pydantic import ValidationError

from skyrl_async.config import Config
from skyrl_async.config_keys import KEYS, SECTIONS, describe_config, keys_of, limit
from skyrl_async.types import BYTES_PER_TOKEN, RECORD_OVERHEAD_BYTES


def messages(values: dict) -> str:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate(values)
    return "\n".join(error["msg"] for error in caught.value.errors())


def test_defaults_are_valid_and_frozen():
    config = Config()
    with pytest.raises(ValidationError):
        config.seed = 1
    with pytest.raises(ValidationError):
        config.staleness.max = 1


def test_every_key_and_section_says_what_it_is():
    for path, field in KEYS.items():
        assert field.description and field.description.endswith("."), path
    for path, field in SECTIONS.items():
        assert (field.annotation.__doc__ or "").endswith("."), path


def test_reference_text_names_every_key_with_default_and_limit():
    text = describe_config()
    assert "  staleness.max=2  (an integer >= 0)" in text
    assert "  runtime=ray  (one of ray, local)" in text
    assert "  run.dir=null  (text or null)" in text
    assert "  optimizer.beta1=0.9  (a number >= 0 and < 1)" in text
    assert "  optimizer.eps=1e-08  (a finite number > 0)" in text
    high = "(a number >= 1 and <= 10000 or null; a higher limit would reject nothing)"
    assert f"  correction.token_high=null  {high}" in text
    for path, field in KEYS.items():
        assert f"  {path}=" in text
        assert f"({limit(field)})" in text
        assert field.description in text


def test_keys_of_lists_a_section_and_the_top():
    assert keys_of("staleness") == ["max", "rule"]
    assert {"seed", "runtime", "learner"} <= set(keys_of(""))


def test_largest_group_follows_from_group_size_and_context():
    config = Config.model_validate({"rollout": {"group_size": 4}, "engine": {"context_length": 64}})
    assert config.largest_group_bytes == 4 * (RECORD_OVERHEAD_BYTES + 64 * BYTES_PER_TOKEN)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"engine": {"kind": "sglang"}}, ["engine.urls=[]", "engine.python=null", "one of them"]),
        (
            {"engine": {"kind": "sglang", "python": "p", "urls": ["http://a:1"]}},
            ["engine.urls=['http://a:1']", "engine.python=p", "one of them"],
        ),
        (
            {"engine": {"kind": "sglang", "urls": ["http://a:1", "http://a:1"]}},
            ["engine.urls=", "named twice"],
        ),
        ({"engine": {"python": "p"}}, ["engine.python=p", "set engine.kind=sglang"]),
        (
            {
                "engine": {"kind": "sglang", "python": "p", "weight_load": "direct"},
                "weight_sync": {"transport": "disk"},
            },
            ["weight_sync.transport=disk", "engine.weight_load=direct", "collective"],
        ),
        ({"sampling": {"top_p": 0.9}}, ["sampling.top_p=0.9", "needs 1"]),
        ({"sampling": {"top_k": 5}}, ["sampling.top_k=5", "needs 1 and 0"]),
        (
            {"sampling": {"max_tokens": 128}},
            ["sampling.max_tokens=128", "below engine.context_length=128"],
        ),
        (
            {"staleness": {"rule": "pace"}, "replay": {"max_times_sampled": 2}},
            ["replay.max_times_sampled=2", "set 1 or staleness.rule=mask"],
        ),
        (
            {"staleness": {"rule": "pace"}, "replay": {"selector": "uniform"}},
            ["replay.selector=uniform", "set fifo or staleness.rule=mask"],
        ),
        (
            {"replay": {"capacity_bytes": 1000}},
            ["replay.capacity_bytes=1000", "must exceed 557056", "engine.context_length=128"],
        ),
        (
            {"replay": {"capacity_groups": 3}},
            ["replay.capacity_groups=3", "at least learner.groups_per_step=16"],
        ),
        (
            {"learner": {"num_minibatches": 300}},
            ["learner.num_minibatches=300", "only 256 trajectories"],
        ),
        ({"model": {"hidden_size": 60}}, ["model.hidden_size=60", "twice that number"]),
        (
            {"model": {"hidden_size": 63, "num_heads": 3}},
            ["model.num_heads=3", "heads must be even"],
        ),
        (
            {"runtime": "local", "learner": {"num_ranks": 2}},
            ["learner.num_ranks=2", "set 1 or runtime=ray"],
        ),
        (
            {"runtime": "local", "cluster": {"address": "auto"}},
            ["cluster.address=auto", "set runtime=ray"],
        ),
        (
            {"evaluation": {"num_tasks": 0}, "run": {"stop_at_eval_reward": 0.9}},
            ["run.stop_at_eval_reward=0.9", "evaluation.num_tasks=0 never evaluates"],
        ),
    ],
)
def test_values_that_cannot_work_together_are_refused_with_a_remedy(values, parts):
    text = messages(values)
    for part in parts:
        assert part in text


def test_buffer_must_be_larger_than_a_batch_of_the_largest_groups():
    needed = 16 * Config().largest_group_bytes
    messages({"replay": {"capacity_bytes": needed}})
    Config.model_validate({"replay": {"capacity_bytes": needed + 1}})


def test_sizes_of_the_built_in_policy_do_not_matter_with_a_model_of_ones_own():
    config = Config.model_validate({"model": {"path": "some/model", "hidden_size": 61}})
    assert config.model.hidden_size == 61


def test_all_problems_across_sections_come_together():
    text = messages(
        {"replay": {"capacity_bytes": 1, "capacity_groups": 1}, "sampling": {"top_k": 1}}
    )
    for path in ("replay.capacity_bytes", "replay.capacity_groups", "sampling.top_k"):
        assert path in text


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0, -1])
def test_learning_rate_must_be_finite_and_positive(value):
    with pytest.raises(ValidationError):
        Config.model_validate({"optimizer": {"learning_rate": value}})
