"""The cells of a grid: their order, what they override, and what makes two of them the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyrl_async.sweep.grid import Block, Cell, Sweep, digest, read_sweep

FILE = """
config: task.yaml
overrides: [run.steps=5]
axes:
  method:
    plain: [algorithm=ppo_recomputed]
    capped: [algorithm=grpo, correction.weight_cap=2]
blocks:
  - {method: [plain, capped], lag: [0, 8], seed: [0]}
  - {method: [capped], lag: [8], seed: [0, 1], overrides: [run.steps=9]}
  - {lag: [0], seed: [0], method: [plain], }
"""


def test_a_file_becomes_cells_in_its_order(tmp_path: Path):
    path = tmp_path / "sweep.yaml"
    path.write_text(FILE)
    sweep = read_sweep(path)
    assert sweep.config == tmp_path / "task.yaml"
    cells = sweep.cells()
    assert [cell.label for cell in cells[:4]] == [
        "method=plain lag=0 seed=0",
        "method=plain lag=8 seed=0",
        "method=capped lag=0 seed=0",
        "method=capped lag=8 seed=0",
    ]
    assert cells[3].overrides == (
        *("run.steps=5", "algorithm=grpo", "correction.weight_cap=2"),
        *("lab.exact_lag=8", "staleness.max=8", "seed=0"),
    )
    assert cells[5] == Cell(
        axes={"method": "capped", "lag": 8, "seed": 1},
        overrides=(
            *("run.steps=5", "run.steps=9", "algorithm=grpo", "correction.weight_cap=2"),
            *("lab.exact_lag=8", "staleness.max=8", "seed=1"),
        ),
    )


def test_a_cell_of_two_blocks_comes_once():
    block = Block(values={"seed": [0, 1]})
    assert len(Sweep(blocks=(block, block)).cells()) == 2


def test_any_other_axis_is_a_key():
    block = Block(values={"optimizer.learning_rate": [0.5], "algorithm.whiten_advantages": [True]})
    (cell,) = Sweep(blocks=(block,)).cells()
    assert cell.overrides == ("optimizer.learning_rate=0.5", "algorithm.whiten_advantages=true")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("blocks: []", "needs blocks"),
        ("- 1", "needs blocks"),
        ("blocks: [{lag: 8}]", "axis lag needs a list"),
        ("blocks: [{lag: []}]", "axis lag has no value"),
        ("blocks: [{lag: [8], overrides: [1]}]", "must be texts"),
        ("blocks: [{lag: [8]}]\nseeds: [1]", "unknown seeds"),
        ("blocks: [", "sweep.yaml"),
    ],
)
def test_a_wrong_file_is_refused(text: str, words: str, tmp_path: Path):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_sweep(path)


def test_a_value_without_a_meaning_is_refused():
    sweep = Sweep(
        blocks=(Block(values={"method": ["mpo"]}),), axes={"method": {"m2po": ["algorithm=m2po"]}}
    )
    with pytest.raises(ValueError, match="method=mpo: one of m2po"):
        sweep.cells()


def test_the_digest_leaves_out_where_a_run_is():
    config = {"run": {"dir": "a", "name": "x", "resume": "never", "steps": 3}, "seed": 1}
    moved = {"seed": 1, "run": {"steps": 3, "dir": "b", "name": "y", "dashboard": True}}
    assert digest(config) == digest({**moved, "logging": {"console": "off"}})
    assert digest(config) != digest({**config, "seed": 2})
    assert digest(config) != digest({**config, "run": {**config["run"], "steps": 4}})
