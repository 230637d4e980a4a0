"""The keys of the learner group: what they become, and what is refused before a run."""

import pytest

from skyrl_async.config_loading import ConfigError, load_config
from skyrl_async.learner.sharding import ShardingSettings
from skyrl_async.runtime.settings import learner_settings


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["learner.num_ranks=4", "learner.shard_ranks=3"], "must divide learner.num_ranks=4"),
        (["learner.num_ranks=3", "learner.sequence_ranks=2"], "must divide learner.num_ranks=3"),
        (["learner.sequence_ranks=2"], "must divide learner.num_ranks=1"),
        (
            ["learner.num_ranks=2", "learner.sequence_ranks=2", "algorithm=ppo"],
            "needs all tokens of a sequence on one rank",
        ),
        (["learner.num_ranks=2", "algorithm=vcpo"], "set learner.shard_ranks=1"),
        (["algorithm=vcpo", "learner.compute_dtype=bfloat16"], "set learner.compute_dtype=float32"),
        (["learner.offload=true"], "learner.device=cpu has everything in host memory"),
        (["learner.attention=flash"], "needs learner.device=cuda"),
        (["learner.attention=varlen"], "needs learner.device=cuda"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(overrides, says):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert any(says in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize(
    ("overrides", "shard_ranks"),
    [
        ([], 1),
        (["learner.num_ranks=4"], 4),
        (["learner.num_ranks=4", "learner.shard_ranks=2"], 2),
        (["learner.num_ranks=2", "learner.shard_ranks=1", "algorithm=vcpo"], 1),
        (["learner.device=cuda", "learner.offload=true", "learner.attention=flash"], 1),
    ],
)
def test_what_can_work_is_taken(overrides, shard_ranks):
    assert load_config(None, overrides).learner.num_shard_ranks == shard_ranks


def test_every_key_of_the_memory_arrives():
    config = load_config(
        None,
        [
            *("learner.compute_dtype=bfloat16", "learner.float32_head=true"),
            *("learner.activation_checkpointing=true", "learner.device=cuda"),
            "learner.offload=true",
        ],
    )
    assert learner_settings(config).sharding == ShardingSettings(
        compute_dtype="bfloat16", float32_head=True, activation_checkpointing=True, offload=True
    )
