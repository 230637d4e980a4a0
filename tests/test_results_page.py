import json
import shutil

import pytest

from benchmarks.results_page import CLAIMS, PAGE, RESULTS, page


def test_the_page_says_what_the_results_say():
    assert PAGE.read_text() == page(), "run python benchmarks/results_page.py"


def test_a_new_figure_or_a_missed_target_changes_the_page(tmp_path):
    shutil.copytree(RESULTS, tmp_path / "results")
    changed = tmp_path / "results" / "async_vs_sync.json"
    result = json.loads(changed.read_text())
    changed.write_text(json.dumps({**result, "speedup": 1.23, "misses": ["speedup 1.23 < 2"]}))
    new = page(tmp_path / "results")
    assert "1.2 x (ideal" in new and "1.2 x (ideal" not in page()
    assert "speedup 1.23 < 2" in new
    changed.unlink()
    with pytest.raises(FileNotFoundError):
        page(tmp_path / "results")


def test_every_claim_names_the_command_that_repeats_it():
    for claim in CLAIMS:
        command = json.loads((RESULTS / f"{claim.source}.json").read_text())["command"]
        script = command.split()[1]
        assert (RESULTS.parents[1] / script).is_file(), command
