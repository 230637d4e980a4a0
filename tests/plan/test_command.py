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
        (("--sweep", "staleness=a"), "must be integers"),
        (("--recommend",), "say how many with --gpus"),
        (("--gpus", "1"), "too few"),
        (("--reply-tokens", "gauss:1"), "is no distribution"),
        (("--staleness", "-1"), "max_staleness must be >= 0"),
        (("--calibrate", "/nowhere"), "cannot be measured"),
    ],
)
def test_a_wrong_argument_ends_with_2_and_the_reason(arguments, reason, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*FIGURES, *arguments])
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err
