import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from skyrl_async.config import Config
from skyrl_async.config_loading import load_config
from skyrl_async.preflight import describe_run, find_problems
from skyrl_async.run_folder import RunFolder

LAUNCHER = Path(__file__).resolve().parents[1] / "launchers" / "run.py"
CONFIGS = sorted((LAUNCHER.parent / "configs").glob("*.yaml"))
MAX_SECONDS_TO_REFUSE = 2.0
ATTEMPTS = 3


def load_launcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launcher_under_test", LAUNCHER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


launcher = load_launcher()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def command_line(*arguments: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    started_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(LAUNCHER), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env=environment,
    )
    return done, time.monotonic() - started_s


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run in this process; return stderr after checking that the input was refused."""
    assert launcher.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Nothing was started." in captured.err
    assert list(Path.cwd().iterdir()) == [], "a refused run must leave nothing behind"
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["stalness.max=1"], "did you mean staleness.max?"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["environment.name=number_gues"], "did you mean 'number_guess'?"),
        (["model.path=/nowhere/model"], "model.path=/nowhere/model: no such folder"),
        (["run.dir=/proc/run"], "run.dir=/proc/run: cannot be written"),
    ],
)
def test_bad_input_exits_with_2_in_under_two_seconds_from_any_folder(tmp_path, arguments, part):
    # Other processes share the machine, so one quick attempt is proof enough.
    for _ in range(ATTEMPTS):
        done, seconds = command_line(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stdout == ""
        assert part in done.stderr
        assert "Traceback" not in done.stderr
        if seconds < MAX_SECONDS_TO_REFUSE:
            return
    pytest.fail(f"refusing {arguments} took {seconds:.1f} s in each of {ATTEMPTS} attempts")


def test_a_real_run_makes_the_checks_of_a_dry_run_first(capsys):
    assert "unknown environment" in refused(capsys, "environment.name=nothing")


def test_all_problems_of_command_line_and_configuration_come_together(capsys):
    text = refused(capsys, "--dryrun", "stalness.max=1", "seed=x", "--config")
    assert text.startswith("4 problems in the configuration:")
    assert "--dryrun: unknown option; did you mean --dry-run?" in text
    assert "--config: needs a file" in text
    assert "did you mean staleness.max?" in text
    assert "seed='x' (command line): must be an integer" in text


def test_all_problems_outside_the_configuration_come_together(capsys):
    text = refused(
        capsys,
        "environment.name=nothing",
        "model.path=/nowhere/model",
        "run.dir=/proc/run",
        "--dry-run",
    )
    assert text.startswith("3 problems")
    for part in ("environment.name=nothing", "model.path=/nowhere/model", "run.dir=/proc/run"):
        assert part in text


def test_environment_options_are_checked(capsys):
    assert "low" in refused(capsys, "environment.options.lw=3")
    text = refused(capsys, "environment.options={low: 5, high: 2}")
    assert "low=5 must not be above option high=2" in text


def test_folder_in_use_and_finished_folder_are_refused(capsys, tmp_path):
    path = tmp_path / "run"
    with RunFolder.create(Config.model_validate({"run": {"dir": str(path)}})) as folder:
        assert launcher.main([f"run.dir={path}"]) == 2
        assert f"process {os.getpid()}" in capsys.readouterr().err
        folder.write_summary({"status": "finished"})
    for arguments in ([f"run.dir={path}"], [f"run.dir={path}", "--dry-run"]):
        assert launcher.main(arguments) == 2
        assert "holds a run already (summary.json)" in capsys.readouterr().err


def test_broken_model_folder_is_refused(capsys, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    assert "config.json is missing" in refused(capsys, f"model.path={folder}")
    (folder / "config.json").write_text("{")
    assert "config.json is broken" in refused(capsys, f"model.path={folder}")


def test_context_longer_than_the_models_positions_is_refused(tmp_path):
    from skyrl_async.learner.policy import save_policy
    from skyrl_async.learner.tiny_policy import build_tiny_model, build_tiny_tokenizer

    model = build_tiny_model(max_position_embeddings=64)
    save_policy(model, build_tiny_tokenizer(), tmp_path / "policy")
    path = str(tmp_path / "policy")
    fits = Config.model_validate({"model": {"path": path}, "engine": {"context_length": 64}})
    assert find_problems(fits, root=tmp_path) == []
    count = sum(p.numel() for p in model.parameters())
    assert f"{count / 1e6:.3g} M parameters" in describe_run(fits)
    too_long = Config.model_validate({"model": {"path": path}})
    assert find_problems(too_long, root=tmp_path) == [
        f"model.path={path}: engine.context_length=128 is more than the model's 64 positions; "
        "lower it"
    ]


@pytest.mark.parametrize(("width", "layers", "heads"), [(64, 2, 4), (128, 3, 2)])
def test_size_of_the_built_in_policy_is_told_exactly(width, layers, heads):
    from skyrl_async.learner.tiny_policy import build_tiny_model

    model = build_tiny_model(hidden_size=width, num_layers=layers, num_heads=heads)
    count = sum(p.numel() for p in model.parameters())
    sizes = {"hidden_size": width, "num_layers": layers, "num_heads": heads}
    config = Config.model_validate({"model": sizes})
    assert f"{count / 1e6:.3g} M parameters" in describe_run(config)
    assert f"about {16 * count / 2**20:.4g} MiB per learner rank" in describe_run(config)


def test_dry_run_says_what_would_run_and_starts_and_leaves_nothing(tmp_path):
    done, _ = command_line("--dry-run", "staleness.max=3", "run.max_seconds=60", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for part in (
        "240 steps of 16 groups x 16 = 256 trajectories, 2 optimizer steps each",
        "stops early at run.max_seconds=60",
        "number_guess(), at most 16 turns, inside the actor",
        "built-in, 0.0823 M parameters, float32",
        "on a local Ray: 1 learner rank, 1 rollout actor",
        "at most 3 versions, rule mask; at most 64 groups admitted and not released",
        "of KV cache per actor",
    ):
        assert part in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_printed_configuration_loads_back(tmp_path, capsys):
    assert launcher.main(["--print-config", "seed=5", "--staleness.max", "0"]) == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    config = load_config(file, [])
    assert (config.seed, config.staleness.max) == (5, 0)
    assert config == load_config(launcher.DEFAULT_CONFIG, ["seed=5", "staleness.max=0"])


def test_help_explains_options_exit_codes_and_every_key(capsys):
    for flag in ("--help", "-h"):
        assert launcher.main([flag]) == 0
        text = capsys.readouterr().out
        for part in ("--config FILE", "--dry-run", "130 interrupted", "staleness.max=2"):
            assert part in text


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_shipped_configuration_passes_all_checks(file, tmp_path):
    config = load_config(file, [])
    problems = find_problems(config, root=tmp_path)
    if config.engine.python is None:
        assert problems == []
        return
    (problem,) = problems
    assert f"engine.python={config.engine.python}: no such interpreter" in problem
    assert "launchers/sglang_cpu/install.sh .sglang" in problem
    found = load_config(file, [f"engine.python={sys.executable}"])
    assert find_problems(found, root=tmp_path) == []


def test_shipped_configurations_build_on_the_default_one():
    folder = LAUNCHER.parent / "configs"
    default = load_config(launcher.DEFAULT_CONFIG, [])
    hard = load_config(folder / "number_guess_hard_cpu.yaml", [])
    assert hard.environment.options == {"low": 1, "high": 15, "max_guesses": 4}
    assert hard.environment.in_process == default.environment.in_process is True
    sync = load_config(folder / "local_sync.yaml", [])
    assert (sync.runtime, sync.staleness.max, sync.learner) == ("local", 0, default.learner)


def test_output_that_nobody_reads_is_no_traceback(tmp_path):
    done = subprocess.run(
        f"{sys.executable} {LAUNCHER} --help | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert "Traceback" not in done.stderr
