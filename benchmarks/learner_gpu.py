"""One learner step of real model shapes on one GPU: how near to the card's limit it comes.

Weights are random, of the shapes of Qwen3-1.7B (all weights trained) and Qwen3-8B (adapters). A
step takes heavy-tailed trajectories that are packed into rows of 32 k tokens, in bfloat16 with
activation checkpointing. ``mfu`` counts the model's floating-point operations, without those that
checkpointing repeats, against the rate of a large matrix product on the same card in the same run.
``padded_speedup`` is against a step of plain ``transformers`` on the same sequences, padded.

``--device cpu --quick`` runs the same code on small shapes; its figures mean nothing.

    python benchmarks/learner_gpu.py --output benchmarks/results/learner_gpu.json
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from report import argument_parser, finish
from torch import Tensor

from skyrl_async.algorithms.advantages import estimate
from skyrl_async.learner.algorithm_settings import AlgorithmSettings
from skyrl_async.learner.attention import resolve_attention
from skyrl_async.learner.learner import Learner, LearnerSettings
from skyrl_async.learner.lora import LoraSettings, add_adapter, fill_adapter
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.learner.sequences import make_sequences
from skyrl_async.learner.sharding import ShardingSettings
from skyrl_async.metrics.ledger import TimeLedger
from skyrl_async.types import (
    FinishReason,
    Generation,
    SampledBatch,
    SampledGroup,
    Trajectory,
    TrajectoryGroup,
    TrajectoryStatus,
    Turn,
)

MIN_MFU = 0.5
MIN_SPEEDUP = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model, by the sizes of its configuration, and how it is trained."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    lora_rank: int = 0


FULL = Shape(
    name="qwen3-1.7b",
    hidden_size=2048,
    intermediate_size=6144,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151_936,
    tied=True,
)
ADAPTED = Shape(
    name="qwen3-8b-lora",
    hidden_size=4096,
    intermediate_size=12_288,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151_936,
    tied=False,
    lora_rank=32,
)
SMALL = Shape(
    name="small",
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=512,
    tied=True,
)
SMALL_ADAPTED = replace(SMALL, name="small-lora", tied=False, lora_rank=4)


def make_model(shape: Shape, *, device: str, dtype: torch.dtype) -> Any:
    """Return a Qwen3 model with random weights on the device."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=65_536,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3ForCausalLM(config).to(dtype).eval()


def make_batch(
    *, num_tokens: int, longest: int, vocab_size: int, version: int, seed: int
) -> SampledBatch:
    """Return groups of four trajectories with lengths that fall off from ``longest``."""
    rng = np.random.default_rng(seed)
    members: list[Trajectory] = []
    tokens = 0
    while tokens < num_tokens or len(members) % 4:
        length = int(min(longest, max(64, rng.lognormal(np.log(longest / 5), 0.9))))
        if not members:
            length = longest
        prompt = length // 4
        reply = length - prompt
        generation = Generation(
            token_ids=rng.integers(0, vocab_size, reply).astype(np.int32),
            logprobs=np.full(reply, -np.log(vocab_size), np.float32),
            policy_versions=np.full(reply, version, np.int32),
            temperature=1.0,
            finish_reason=FinishReason.STOP,
        )
        turn = Turn(
            observation_token_ids=rng.integers(0, vocab_size, prompt).astype(np.int32),
            generation=generation,
        )
        reward = float(rng.integers(0, 2))
        members.append(
            Trajectory.from_turns([turn], reward=reward, status=TrajectoryStatus.TERMINATED)
        )
        tokens += length
    groups = [
        SampledGroup(
            group=TrajectoryGroup(
                group_id=number, task_id=str(number), trajectories=tuple(members[i : i + 4])
            ),
            min_trainable_version=0,
        )
        for number, i in enumerate(range(0, len(members), 4))
    ]
    return SampledBatch(lease_id=version, train_version=version, groups=tuple(groups))


def model_flops(shape: Shape, lengths: Sequence[int]) -> float:
    """Return the operations of one forward and backward pass, causal attention counted half.

    Frozen weights need no gradient of their own: two passes' worth of products instead of three.
    """
    head = shape.head_dim
    attention = shape.hidden_size * head * (2 * shape.num_heads + 2 * shape.num_kv_heads)
    mlp = 3 * shape.hidden_size * shape.intermediate_size
    matrices = shape.num_layers * (attention + mlp)
    tokens = sum(lengths)
    loss_tokens = sum(length - length // 4 for length in lengths)
    linear = 2 * (matrices * tokens + shape.vocab_size * shape.hidden_size * loss_tokens)
    scores = 2 * shape.num_layers * shape.num_heads * head * sum(n * n for n in lengths)
    passes = 2 if shape.lora_rank else 3
    return passes * linear + 3 * scores


def matmul_flops_per_s(*, device: str, dtype: torch.dtype, size: int) -> float:
    """Return the rate of a square matrix product, the median of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [timed(lambda: a @ b, device=device) for _ in range(13)][3:]
    return 2 * size**3 / float(np.median(times))


def timed(work: Callable[[], Any], *, device: str) -> float:
    """Return the seconds that ``work`` takes on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_step(
    shape: Shape, *, device: str, num_tokens: int, longest: int, row_tokens: int, rounds: int
) -> dict[str, Any]:
    """Return time, phases, tokens and memory of learner steps."""
    bf16 = device == "cuda"
    frozen = torch.bfloat16 if bf16 and shape.lora_rank else torch.float32
    model = make_model(shape, device=device, dtype=frozen)
    if shape.lora_rank:
        add_adapter(model, LoraSettings(rank=shape.lora_rank, alpha=2 * shape.lora_rank))
        fill_adapter(model.named_parameters(), seed=0)
    compute = torch.bfloat16 if bf16 else torch.float32
    ranks = RankGroup(device=device)  # type: ignore[arg-type]
    ledger = TimeLedger("learner", parts=("prepare", "proximal", "train"))
    settings = LearnerSettings(
        algorithm=AlgorithmSettings(advantage="mean_centered"),
        sharding=ShardingSettings(
            compute_dtype="bfloat16" if bf16 else "float32", activation_checkpointing=True
        ),
        num_minibatches=1,
        tokens_per_microbatch=row_tokens,
        attention=resolve_attention("auto", device=device, dtype=compute),
    )
    learner = Learner(model, settings, ranks=ranks, ledger=ledger)
    times, lengths = [], []
    for number in range(rounds + 1):
        batch = make_batch(
            num_tokens=num_tokens,
            longest=longest,
            vocab_size=shape.vocab_size,
            version=learner.policy_version,
            seed=0,
        )
        lengths = [len(t.token_ids) for g in batch.groups for t in g.group.trajectories]
        if number == 1:
            ledger.take()
        times.append(timed(partial(learner.step, batch), device=device))
        assert learner.policy_version == number + 1, "the step was not finite"
    phases = measure_phases(learner, batch_sequences(batch), device=device)
    seconds = float(np.median(times[1:]))
    memory = torch.cuda.max_memory_allocated() if bf16 else 0
    ranks.close()
    return {
        "seconds_per_step": round(seconds, 4),
        "tokens_per_step": sum(lengths),
        "tokens_per_s": round(sum(lengths) / seconds, 1),
        "longest_trajectory_tokens": max(lengths),
        "flops_per_s": model_flops(shape, lengths) / seconds,
        "peak_memory_bytes": memory,
        "attention": settings.attention,
        **phases,
    }


def batch_sequences(batch: SampledBatch) -> list[Any]:
    """Return the batch's sequences with the advantages that the step gave them."""
    return make_sequences(batch.groups, advantage=partial(estimate, "mean_centered"))


def measure_phases(learner: Learner, sequences: list[Any], *, device: str) -> dict[str, float]:
    """Return the seconds of packing, forward, backward and optimizer of one step."""
    from skyrl_async.learner.logprobs import token_outputs
    from skyrl_async.learner.minibatches import make_minibatches

    made: list[Any] = []

    def pack_all() -> None:
        made.extend(
            make_minibatches(
                sequences,
                num_minibatches=1,
                seed=(0,),
                packing=learner.packing,
                trainer=learner.trainer,
            )
        )

    seconds = {"pack_s": timed(pack_all, device=device), "forward_s": 0.0, "backward_s": 0.0}
    learner.trainer.zero_grad()
    for microbatch in made[0].microbatches:
        losses: list[Tensor] = []

        def forward(microbatch: Any = microbatch, losses: list[Tensor] = losses) -> None:
            outputs = token_outputs(learner.trainer.module, microbatch)
            losses.append((outputs.logprobs * microbatch.advantages).mean())

        def backward(losses: list[Tensor] = losses) -> None:
            losses[0].backward()

        seconds["forward_s"] += timed(forward, device=device)
        seconds["backward_s"] += timed(backward, device=device)
    zero = torch.zeros((), dtype=torch.float64, device=device)
    seconds["optimizer_s"] = timed(lambda: learner.trainer.apply(zero), device=device)
    return {name: round(value, 4) for name, value in seconds.items()}


def measure_padded(
    shape: Shape, *, device: str, num_tokens: int, longest: int, row_tokens: int, rounds: int
) -> float:
    """Return the tokens per second of a plain ``transformers`` step, padded."""
    bf16 = device == "cuda"
    model = make_model(shape, device=device, dtype=torch.float32)
    model.train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    batch = make_batch(
        num_tokens=num_tokens, longest=longest, vocab_size=shape.vocab_size, version=0, seed=0
    )
    trajectories = [t.token_ids for g in batch.groups for t in g.group.trajectories]
    per_pass = max(1, row_tokens // longest)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(trajectories), per_pass):
            part = trajectories[start : start + per_pass]
            ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.int64, device=device)
            mask = torch.zeros_like(ids)
            for row, tokens in enumerate(part):
                ids[row, : len(tokens)] = torch.from_numpy(np.array(tokens)).to(device)
                mask[row, : len(tokens)] = 1
            with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
                labels = ids.masked_fill(mask == 0, -100)
                model(
                    input_ids=ids, attention_mask=mask, labels=labels, use_cache=False
                ).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    times = [timed(step, device=device) for _ in range(rounds + 1)][1:]
    return sum(map(len, trajectories)) / float(np.median(times))


def freed() -> None:
    """Give memory back before the next model."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    """Measure, print a table and finish with JSON."""
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    started = time.perf_counter()
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine has no GPU; use --device cpu --quick")
    shapes = (FULL, ADAPTED) if on_gpu else (SMALL, SMALL_ADAPTED)
    sizes = {
        "num_tokens": 131_072 if on_gpu else 2048,
        "longest": 32_768 if on_gpu else 256,
        "row_tokens": 32_768 if on_gpu else 512,
        "rounds": 1 if args.quick else 3,
    }
    peak = matmul_flops_per_s(
        device=args.device,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        size=8192 if on_gpu else 512,
    )
    figures: dict[str, Any] = {"device": args.device, "matmul_tflops": round(peak / 1e12, 2)}
    if on_gpu:
        figures["gpu"] = torch.cuda.get_device_name()
    misses = []
    for shape in shapes:
        row = measure_step(shape, device=args.device, **sizes)
        row["mfu"] = round(row.pop("flops_per_s") / peak, 3)
        figures[shape.name] = row
        print(f"{shape.name:<16}" + "  ".join(f"{k}={v}" for k, v in row.items()))
        freed()
        if on_gpu and row["mfu"] < MIN_MFU:
            misses.append(f"{shape.name}: mfu {row['mfu']} below {MIN_MFU}")
    padded = measure_padded(shapes[0], device=args.device, **sizes)
    speedup = round(figures[shapes[0].name]["tokens_per_s"] / padded, 2)
    figures |= {"padded_tokens_per_s": round(padded, 1), "padded_speedup": speedup}
    print(f"plain transformers, padded: {padded:,.0f} tokens/s; packed is {speedup} x as fast")
    if on_gpu and speedup < MIN_SPEEDUP:
        misses.append(f"padded_speedup {speedup} below {MIN_SPEEDUP}")
    finish("learner_gpu", figures, misses, started, args.output)


if __name__ == "__main__":
    main()
