import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import skyrl_async

PACKAGE = Path(skyrl_async.__file__).parent
COMPONENTS = (
    *("environments", "rollout", "replay", "learner"),
    *("weight_sync", "algorithms", "metrics"),
)
ALONE = ("types", "config", "metrics.values")
CONFIG_PARTS = {
    *("config_section", "config_algorithm", "config_distillation", "config_engine", "config_inert"),
    *("config_lab", "config_logging", "config_lora", "config_learner", "config_optimizer"),
    "config_sft",
    *("config_simulate", "distribution"),
}
"""The configuration is several files, which import only each other."""

HEAVY = ("torch", "ray", "transformers", "sglang")

ALLOWED = {
    **{component: {"types", "config", "metrics.values"} for component in COMPONENTS},
    "coordination": {"types", "config", "metrics.values"},
}
"""What a folder may import of this package besides itself."""

ALLOWED["lab"] = {"types", "rollout"}  # wrappers around the parts of a rollout
ALLOWED["rollout"] |= {"environments.base"}
ALLOWED["learner"] |= {"algorithms"}  # advantages and losses are pure functions on tensors
# Where the run's metrics are recorded.
ALLOWED["coordination"] |= {"metrics.recorder", "metrics.ledger", "metrics.drawing"}
for _folder in ("rollout", "learner", "weight_sync", "coordination"):
    ALLOWED[_folder] |= {"metrics.trace"}  # where they say what they do, for the timeline
ALLOWED["environments"] |= {"distribution"}  # how slow a tool is
ALLOWED["simulate"] = {"types", "distribution", "rollout", "metrics.trace"}
ALLOWED["simulate"] |= {"learner.training_state"}  # a simulated learner has checkpoints too
ALLOWED["plan"] = {"types", "config", "config_loading", "distribution", "coordination", "replay"}
ALLOWED["plan"] |= {"simulate.step_times", "simulate.virtual_engine", "timeline.reader"}
ALLOWED["timeline"] = {"types", "metrics"}
ALLOWED["report"] = {"types", "config_keys", "metrics", "timeline", "sweep"}
ALLOWED["report"] |= {"checkpoint", "run_folder"}  # it reads what runs leave behind


def modules() -> list[tuple[str, Path]]:
    """Return all modules by dotted name within the package."""
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names.append((".".join(p for p in parts if p != "__init__"), path))
    return names


def imported(path: Path) -> Iterator[str]:
    """Yield all modules that a file imports anywhere in it, as full dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports must be absolute"
            assert node.module is not None
            own = node.module.split(".")[0] == PACKAGE.name
            for alias in node.names:
                # ``from skyrl_async.algorithms import advantages`` imports a module.
                target = PACKAGE.parent.joinpath(*node.module.split("."), alias.name)
                is_module = own and (target.is_dir() or target.with_suffix(".py").is_file())
                yield f"{node.module}.{alias.name}" if is_module else node.module


def imported_of_ours(path: Path) -> set[str]:
    prefix = f"{PACKAGE.name}."
    return {name.removeprefix(prefix) for name in imported(path) if name.startswith(prefix)}


def is_within(module: str, folder: str) -> bool:
    return module == folder or module.startswith(f"{folder}.")


def loaded_after(*statements: str) -> set[str]:
    """Return the top-level modules that a new process has after these imports."""
    code = "; ".join(("import json, sys", *statements, "print(json.dumps(sorted(sys.modules)))"))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_the_scan_sees_the_package():
    names = [name for name, _ in modules()]
    assert {"types", "config", "run", "learner.learner", "coordination.staleness"} <= set(names)
    assert "algorithms.advantages" in imported_of_ours(PACKAGE / "learner" / "learner.py")


@pytest.mark.parametrize("name", ALONE)
def test_basic_modules_import_only_types(name):
    parts = CONFIG_PARTS if name == "config" else set()
    paths = [path for module, path in modules() if is_within(module, name)]
    assert paths
    for path in paths:
        for module in imported_of_ours(path):
            assert is_within(module, "types") or module in parts, f"{path.name} imports {module}"


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_folder_imports_only_itself_and_what_is_allowed(folder):
    for name, path in modules():
        if not is_within(name, folder):
            continue
        for module in imported_of_ours(path):
            allowed = (folder, *ALLOWED[folder])
            assert any(is_within(module, a) for a in allowed), f"{name} imports {module}"


def test_only_ray_runtime_files_import_ray():
    for name, path in modules():
        uses_ray = any(is_within(module, "ray") for module in imported(path))
        assert not uses_ray or name.startswith("runtime.ray_"), f"{name} imports ray"


def test_every_module_of_coordination_loads_without_heavy_libraries():
    names = [f"{PACKAGE.name}.{n}" for n, _ in modules() if is_within(n, "coordination")]
    assert names
    loaded = loaded_after(*(f"import {name}" for name in names))
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "name",
    [
        "skyrl_async",
        "skyrl_async.config_loading",
        "skyrl_async.plan.command",
        "skyrl_async.preflight",
        "skyrl_async.run_folder",
        "skyrl_async.sweep.runner",
        "skyrl_async.report.writing",
    ],
)
def test_what_runs_before_the_configuration_is_valid_loads_no_heavy_library(name):
    loaded = loaded_after(f"import {name}")
    assert PACKAGE.name in loaded
    assert loaded.isdisjoint({*HEAVY, "gymnasium", "tensorboard"})


def test_checking_an_environment_loads_no_heavy_library():
    loaded = loaded_after(
        "from skyrl_async.environments.registry import check_environment",
        "check_environment('number_guess', {})",
    )
    assert loaded.isdisjoint(HEAVY)
