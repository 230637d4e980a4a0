"""What the comparison with other trainers makes of their runs."""

import sys

import pytest

from benchmarks.peers.peer_task import StepClock, rewards
from benchmarks.peers.run import OURS, misses, row, run_peer
from skyrl_async.environments.largest_digit import LargestDigit

PEER = """
import argparse, json
parser = argparse.ArgumentParser()
parser.add_argument("reward", type=float)
parser.add_argument("prompt")
for name in ("tasks", "steps", "seed", "threads", "max-seconds"):
    parser.add_argument("--" + name)
args = parser.parse_args()
with open(args.tasks) as file:
    rows = json.load(file)
ends = [0.5 * (i + 1) for i in range(int(args.steps))]
steps = [{"time_s": end, "reward": args.reward if end > 2 else 0.0} for end in ends]
print("some progress")
first = json.loads(args.prompt)
print(json.dumps({"first_prompt_token_ids": first, "steps": steps, "tasks": len(rows)}))
"""
FIRST_PROMPT = "[3, 35, 37, 7, 13, 8, 55, 4]"


@pytest.fixture
def run(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(PEER)

    def call(reward=1.0, prompt=FIRST_PROMPT, steps=20):
        return run_peer(
            *(sys.executable, script, str(reward), prompt), seed=0, steps=steps, folder=tmp_path
        )

    return call


def test_a_peers_steps_become_figures(run):
    result = run()
    assert result["trajectories_per_s"] == pytest.approx(256 / 0.5)
    assert result["seconds_to_reward_0_9"] == 2.5
    assert result["seconds_to_reward_0_9_over_8_steps"] == 6.0
    assert result["reward_last_10_steps"] == 1.0
    assert result["tasks"] == 16 * 20


def test_a_peer_that_does_not_learn_has_no_time(run):
    assert run(reward=0.8)["seconds_to_reward_0_9"] is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": "[3, 35, 37, 7, 13, 8, 55]"}, "none of ours"),
        ({"steps": 5}, "only 5 steps"),
        ({"reward": "no number"}, "invalid float value"),
    ],
)
def test_a_run_that_cannot_be_compared_is_refused(run, wrong, message):
    with pytest.raises(RuntimeError, match=message):
        run(**wrong)


def test_a_row_has_medians_and_counts_the_seeds_that_got_there(run):
    learned, not_learned = run(), run(reward=0.8)
    result = row([learned, not_learned, learned])
    assert result["seconds_to_reward_0_9_over_8_steps"] == 6.0
    assert result["seeds_at_0_9_over_8_steps"] == 2
    assert row([learned, not_learned])["seconds_to_reward_0_9_over_8_steps"] is None


def test_a_faster_trainer_is_a_miss(run):
    ours = row([run()])
    slower = {**ours, "trajectories_per_s": 1.0, "seconds_to_reward_0_9_over_8_steps": None}
    rows = {OURS: ours, "slow": slower, "broken": {"error": "no CUDA"}}
    assert misses(rows) == []
    faster = {**ours, "trajectories_per_s": 1e6, "seconds_to_reward_0_9_over_8_steps": 1.0}
    assert [miss.partition(":")[0] for miss in misses({**rows, "fast": faster})] == ["fast"] * 2
    never = {**rows, OURS: {**ours, "seconds_to_reward_0_9_over_8_steps": None}}
    assert len(misses({**never, "as fast": ours})) == 2


@pytest.mark.parametrize("reply", ["7", "is 7", "7 9", "9 7", "-7", "17", "", "yes"])
def test_peers_grade_as_our_environment_does(reply):
    environment = LargestDigit()
    for seed in range(40):
        question, _ = environment.reset(seed=seed)
        answer = max(int(word) for word in question.split() if word.isdecimal())
        _, reward, *_ = environment.step(reply)
        assert rewards([reply], [answer]) == [reward], question


def test_the_clock_stops_at_its_limit():
    patient, spent = StepClock(max_seconds=1e9), StepClock(max_seconds=0)
    for clock in (patient, spent):
        clock.start()
        clock.step(0.25)
    assert spent.over and not patient.over
    assert [step["reward"] for step in patient.steps] == [0.25]
    assert patient.steps[0]["time_s"] >= 0
