"""A learner worker with sharded weights: what it trains, publishes, saves and goes on from."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM

from skyrl_async.config import Config
from skyrl_async.learner.lora_merge import MergedWeight
from skyrl_async.learner.policy import PolicySource, load_tokenizer
from skyrl_async.learner.tiny_policy import build_tiny_model, build_tiny_tokenizer
from skyrl_async.runtime.learner_build import _gathered, merged_parameters
from skyrl_async.runtime.learner_worker import LearnerWorker
from skyrl_async.weight_sync.publisher import PublishStats
from skyrl_async.weight_sync.snapshot import WeightSnapshot
from tests.learner.test_sharding import moe_model
from tests.records import random_batch

STEPS = 3


def tied_model():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    torch.manual_seed(2)
    return Qwen3ForCausalLM(config).eval()


MODELS = {"plain": build_tiny_model, "moe": moe_model, "tied": tied_model}


class Recording:
    """Keeps copies of what is published, by version."""

    def __init__(self) -> None:
        self.versions: dict[int, dict[str, torch.Tensor]] = {}

    def publish(self, snapshot: WeightSnapshot) -> None:
        tensors = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
        self.versions[snapshot.policy_version] = tensors
        snapshot.release()

    def check(self) -> None: ...

    def take_stats(self) -> PublishStats:
        return PublishStats()

    def close(self) -> None: ...


def present_weights(worker: LearnerWorker) -> dict[str, torch.Tensor]:
    """Gather the whole weights in the training thread; all ranks call it."""
    weights = {}
    for name, weight in merged_parameters(worker._learner.model):
        value = _gathered(weight)
        weights[name] = value.clone() if isinstance(weight, MergedWeight) else value
    return weights


def _run(
    rank: int, num_ranks: int, port: int, folder: str, model: str, changes: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    config = Config.model_validate(
        {
            "model": {"path": f"{folder}/model"},
            "learner": {"num_ranks": num_ranks, "shard_ranks": changes.pop("shard_ranks", None)},
            **changes,
        }
    )
    worker = LearnerWorker(config, rank=rank, store_address=("127.0.0.1", port))
    worker.start()
    published = Recording()
    if rank == 0:
        worker._publisher = published
    expected = {}
    for version in range(1, STEPS + 1):
        worker.step(random_batch(version, train_version=version - 1))
        expected[version] = present_weights(worker)
    worker.save_policy(Path(folder) / "policy")
    if rank == 0:
        if worker._gatherer is not None:
            with worker._gatherer._changed:
                done = worker._gatherer._changed.wait_for(
                    lambda: worker._gatherer._last == STEPS, 20
                )
            assert done
        assert STEPS in published.versions
        for version, tensors in published.versions.items():
            if version == 0:
                continue
            assert tensors.keys() == expected[version].keys()
            for name, tensor in tensors.items():
                assert torch.equal(tensor, expected[version][name].float()), (version, name)
        torch.save(expected[STEPS], f"{folder}/expected.pt")
    worker._ranks.sum_(torch.zeros(1))
    worker.close()


def run(folder: Path, port: int, model: str, *, num_ranks: int = 2, **changes: Any) -> None:
    made = MODELS[model]()
    made.save_pretrained(folder / "model")
    build_tiny_tokenizer().save_pretrained(folder / "model")
    mp.start_processes(
        _run,
        args=(num_ranks, port, str(folder), model, changes),
        nprocs=num_ranks,
        start_method="fork",
    )
    expected = torch.load(folder / "expected.pt")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "policy")
    load_tokenizer(PolicySource(path=str(folder / "policy")))
    start = dict(made.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    changed = [n for n, p in loaded.named_parameters() if not torch.equal(p, start[n])]
    assert changed, "training changed the saved policy"


@pytest.mark.parametrize("model", MODELS)
def test_published_and_saved_weights_are_bit_equal_to_their_step(tmp_path, free_port, model):
    run(tmp_path, free_port, model)


def test_replicas_of_shards_publish_once(tmp_path, free_port):
    run(tmp_path, free_port, "plain", num_ranks=4, shard_ranks=2)


@pytest.mark.parametrize("shard_ranks", [1, 2])
def test_merged_adapters_are_published_and_saved(tmp_path, free_port, shard_ranks):
    run(
        tmp_path,
        free_port,
        "tied",
        lora={"rank": 4, "alpha": 8},
        kl={"coefficient": 0.1},
        shard_ranks=shard_ranks,
    )
    assert (tmp_path / "policy" / "adapter" / "adapter_model.safetensors").is_file()
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = PeftModel.from_pretrained(base, tmp_path / "policy" / "adapter").merge_and_unload()
    saved = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "policy").named_parameters())
    for name, parameter in adapted.named_parameters():
        assert torch.allclose(parameter, saved[name], atol=1e-6), name


def test_without_adapters_the_library_for_them_is_not_loaded(tmp_path):
    """It is an extra, and slow to load."""
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from skyrl_async.config import Config\n"
        "from skyrl_async.runtime.learner_worker import LearnerWorker\n"
        "worker = LearnerWorker(Config()); worker.start()\n"
        "from pathlib import Path; worker.save_policy(Path(sys.argv[1])); worker.close()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "policy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "policy" / "model.safetensors").is_file()
