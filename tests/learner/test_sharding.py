"""Sharded policies: initial weights, empty ranks, and what a step leaves in memory."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from skyrl_async.learner.initial_weights import tensor_files, weight_reader
from skyrl_async.learner.learner import Learner, LearnerSettings
from skyrl_async.learner.logprobs import PolicyModule
from skyrl_async.learner.optimizer import OptimizerSettings
from skyrl_async.learner.policy import PolicySource, load_model, skeleton
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.learner.sharding import ShardingSettings, local_rows, prepare
from skyrl_async.learner.tiny_policy import build_tiny_model
from tests.records import random_batch
from tests.weight_sync.test_collective import listeners_of_this_process


def moe_model():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    return Qwen3MoeForCausalLM(config).eval()


def start(target, free_port: int, *args: object, num_ranks: int) -> None:
    mp.start_processes(
        target, args=(num_ranks, free_port, *args), nprocs=num_ranks, start_method="fork"
    )


def join(rank: int, num_ranks: int, port: int, **options: int) -> RankGroup:
    torch.set_num_threads(1)
    store = ("127.0.0.1", port)
    return RankGroup(rank=rank, num_ranks=num_ranks, store_address=store, **options)


def _load(rank: int, num_ranks: int, port: int, folder: str) -> None:
    ranks = join(rank, num_ranks, port, shard_ranks=num_ranks)
    source = PolicySource(path=f"{folder}/model")
    module = PolicyModule(skeleton(source))
    assert all(p.is_meta for p in module.parameters())
    names = prepare(
        module,
        ShardingSettings(),
        ranks,
        fill=weight_reader(source, ranks),
        names=lambda name: name.removeprefix("model."),
    )
    assert names
    whole = load_model(source)
    for name, expected in whole.named_parameters():
        parameter = module.model.get_parameter(name)
        assert isinstance(parameter, DTensor)
        rows, first = local_rows(parameter)
        assert torch.equal(rows, expected[first : first + len(rows)]), name
        assert torch.equal(parameter.full_tensor(), expected), name
    for name, expected in whole.named_buffers():
        assert torch.equal(module.model.get_buffer(name), expected), name
    own = sum(local_rows(p)[0].numel() for p in module.parameters())
    torch.save(own, f"{folder}/{rank}.pt")
    ranks.close()


@pytest.mark.parametrize("make", [build_tiny_model, moe_model])
@pytest.mark.parametrize("max_shard_size", ["1GB", "40KB"])
def test_every_rank_reads_its_own_rows(tmp_path: Path, free_port, make, max_shard_size):
    model = make()
    model.save_pretrained(tmp_path / "model", max_shard_size=max_shard_size)
    start(_load, free_port, str(tmp_path), num_ranks=2)
    total = sum(p.numel() for p in model.parameters())
    assert sum(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)) == total


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path):
    build_tiny_model(hidden_size=16, num_heads=2).save_pretrained(tmp_path)
    source = PolicySource(path=str(tmp_path))
    fill = weight_reader(source, RankGroup())
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \[64, 16\]"):
        fill([("lm_head.weight", torch.zeros(3, 16))])


def test_an_unknown_tensor_is_refused(tmp_path: Path):
    build_tiny_model(hidden_size=16, num_heads=2).save_pretrained(tmp_path)
    fill = weight_reader(PolicySource(path=str(tmp_path)), RankGroup())
    with pytest.raises(ValueError, match="no parameter nonsense"):
        fill([("nonsense", torch.zeros(3, 16))])


def test_a_broken_index_is_refused(tmp_path: Path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="is broken"):
        tensor_files(tmp_path)


@pytest.mark.parametrize("options", [{"shard_ranks": 3}, {"sequence_ranks": 0}])
def test_ranks_that_cannot_be_divided_are_refused(options):
    with pytest.raises(ValueError, match="must divide the 1 ranks"):
        RankGroup(**options)


def test_a_module_without_weights_needs_something_to_fill_them():
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="nothing to fill them with"):
        prepare(module, ShardingSettings(), RankGroup())


def step(model, **sharding) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    settings = LearnerSettings(
        sharding=ShardingSettings(**sharding), optimizer=OptimizerSettings(max_grad_norm=1e9)
    )
    ranks = RankGroup()
    learner = Learner(model, settings, ranks=ranks)
    result = learner.step(random_batch(0, train_version=0))
    weights = {
        name: p.full_tensor() if isinstance(p, DTensor) else p
        for name, p in zip(
            [n for n, _ in model.named_parameters()], learner.trainer.parameters, strict=True
        )
    }
    weights = {name: p.detach().clone() for name, p in weights.items()}
    ranks.close()
    return weights, dict(result.metrics)


def test_activation_checkpointing_changes_no_number():
    plain, metrics = step(build_tiny_model(hidden_size=16, num_heads=2))
    model = build_tiny_model(hidden_size=16, num_heads=2)
    runs = []
    attention = model.model.layers[0].self_attn
    attention.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    again, metrics_again = step(model, activation_checkpointing=True)
    assert metrics == metrics_again
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    # Of each minibatch: a pass of its own or none, the forward pass, and the one of the backward.
    assert sum(runs) == 4


@pytest.mark.parametrize("float32_head", [False, True])
def test_bfloat16_computes_about_the_same_step_from_float32_weights(float32_head):
    _, metrics = step(build_tiny_model(hidden_size=16, num_heads=2))
    low, metrics_low = step(
        build_tiny_model(hidden_size=16, num_heads=2),
        compute_dtype="bfloat16",
        float32_head=float32_head,
    )
    assert all(tensor.dtype is torch.float32 for tensor in low.values())
    assert metrics_low["policy/grad_norm"] == pytest.approx(metrics["policy/grad_norm"], rel=0.05)
    assert metrics_low["policy/grad_norm"] != metrics["policy/grad_norm"]


def test_a_float32_head_keeps_the_logprobs_closer_to_float32():
    from skyrl_async.learner.logprobs import token_logprobs
    from skyrl_async.learner.packing import pack
    from skyrl_async.learner.sequences import make_sequences
    from tests.learner.test_packing import GRPO

    sequences = make_sequences(random_batch(0, train_version=0).groups, advantage=GRPO)
    (microbatch,) = pack(sequences, tokens_per_microbatch=10**6)

    def logprobs(settings: ShardingSettings) -> torch.Tensor:
        ranks = RankGroup()
        module = PolicyModule(build_tiny_model(), float32_head=settings.float32_head)
        prepare(module, settings, ranks)
        with torch.no_grad():
            result = token_logprobs(module, microbatch)
        ranks.close()
        assert result.dtype is torch.float32
        return result

    exact = logprobs(ShardingSettings())
    low = logprobs(ShardingSettings(compute_dtype="bfloat16"))
    higher = logprobs(ShardingSettings(compute_dtype="bfloat16", float32_head=True))
    assert (higher - exact).abs().mean() < (low - exact).abs().mean() < 0.1


def _listen(rank: int, num_ranks: int, port: int, folder: str) -> None:
    ranks = join(rank, num_ranks, port, shard_ranks=num_ranks)
    ranks.mesh()
    ranks.new_shard_group()
    ranks.sum_(torch.zeros(1))
    torch.save({address for address, _ in listeners_of_this_process()}, f"{folder}/{rank}.pt")
    ranks.sum_(torch.zeros(1))
    ranks.close()


def test_ranks_on_one_machine_listen_on_loopback_only(tmp_path: Path, free_port):
    start(_listen, free_port, str(tmp_path), num_ranks=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == {"127.0.0.1"}
