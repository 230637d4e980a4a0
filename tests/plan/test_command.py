import json

import pytest

from skyrl_async.plan.command import main

FIGURES = (
    *("--decode-step-s", "0.01", "--step-s", "0.5", "--publish-s", "0.2", "--report-s", "0"),
    *("--turns", "fixed:1", "--reply-tokens", "fixed:10", "--latency-s", "fixed:0.3"),
    *("--groups-per-step", "4", "--group-size", "4", "--steps", "20", "--staleness", "0"),
)


def planned(capsys, *arguments):
    main([*FIGURES, *arguments])
    return capsys.readouterr().out


def test_given_figures_make_a_forecast(capsys):
    [row] = json.loads(planned(capsys, "--json"))
    # As in the simulation's own test: 0.1 + 0.3 + 0.5 + 0.2 s a step of 16 trajectories.
    assert row["steps_per_s"] == pytest.approx(1 / 1.1)
    assert row["trajectories_per_s"] == pytest.approx(16 / 1.1)
    assert (row["engines"], row["max_staleness"]) == (1, 0)


def test_a_sweep_gives_a_row_for_every_combination(capsys):
    rows = json.loads(
        planned(capsys, "--json", "--sweep", "staleness=0,1", "--sweep", "engines=1,2")
    )
    assert [(r["max_staleness"], r["engines"]) for r in rows] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert rows[2]["steps_per_s"] > rows[0]["steps_per_s"]


def test_the_table_names_what_it_shows(capsys):
    lines = planned(capsys, "--sweep", "staleness=0,1").splitlines()
    assert len(lines) == 3
    assert lines[0].split()[:3] == ["engines", "K", "tokens/s"]
    assert lines[1].split()[:4] == ["1", "0", "145", "145"]


def test_a_split_is_recommended(capsys):
    gpus = ("--gpus", "8", "--recommend", "--colocated", "--step-s-per-token", "0.01")
    rows = json.loads(planned(capsys, "--json", *gpus, "--staleness", "2", "--max-concurrent", "8"))
    best, *others = rows
    assert all(best["trained_tokens_per_s"] >= r["trained_tokens_per_s"] for r in others)
    assert all(r["engines"] + r["learner_gpus"] == 8 for r in rows if not r["colocated"])
    assert sum(r["colocated"] for r in rows) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--sweep", "speed=1"), "give NAME=V1,V2"),
        (("--sweep", "staleness=a"), "got 'a'; give an integer of at least 0"),
        (("--sweep", "group_size=4,0"), "got '0'; give an integer of at least 1"),
        (("--recommend",), "say how many with --gpus"),
        (("--colocated",), "--colocated divides GPUs; say how many with --gpus"),
        (("--gpus", "0"), "argument --gpus: got '0'; give an integer of at least 1"),
        (("--gpus", "1"), "too few"),
        (("--gpus", "4", "--engines", "4"), "give --engines of at most 3, or --recommend"),
        (("--gpus", "4", "--scaling", "2"), "scaling must be in (0.5, 1], got 2.0"),
        (("--reply-tokens", "gauss:1"), "argument --reply-tokens: 'gauss:1' is no distribution"),
        (("--latency-s", "trace:/nowhere,seconds"), "cannot read numbers from /nowhere"),
        (("--staleness", "-1"), "--staleness: got '-1'; give an integer of at least 0"),
        (("--publish-s", "nan"), "--publish-s: got 'nan'; give a finite number of at least 0"),
        (("--prompt-tokens", "many"), "--prompt-tokens: got 'many'; give a finite number"),
        (("--max-tokens", "0"), "--max-tokens: got '0'; give an integer of at least 1"),
        (("--max-times-sampled", "2", "--rule", "pace"), "take the rule mask or drop"),
        (("--rule", "old"), "argument --rule: invalid choice: 'old' (choose from 'mask', "),
        (("--speed", "3"), "unknown arguments: --speed 3; --help lists the options"),
        (("--calibrate", "/nowhere"), "cannot be measured: it has no config.yaml; give"),
    ],
)
def test_a_wrong_argument_ends_with_2_and_the_reason_in_one_line(arguments, reason, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*FIGURES, *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.startswith("python -m skyrl_async.plan: ") and said.count("\n") == 1
