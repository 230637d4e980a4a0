"""Throughput and memory of the learner's forward and backward pass.

*Packing*: sequences of heavy-tailed lengths (the mean is a fifth of the longest) with one loss,
packed, and as ``transformers`` alone would do it, padded to the longest. ``padded_short`` pads each
microbatch only to its own longest. All have the same weights; loss and gradient must agree. The
ways take turns, and the times are medians. Padding is not counted as tokens.

*Logprobs*: the peak memory of logprobs and their gradient over a large vocabulary
(``logprob_memory.py``).

``mfu`` is the rate of the packed pass, by counted operations, over that of a large matrix product.

    python benchmarks/learner_throughput.py
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from logprob_memory import VOCABULARY, measure_logprobs
from measuring import peak_bytes, seconds
from report import finish, parse_args
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from skyrl_async.learner.attention import resolve_attention, use_attention
from skyrl_async.learner.logprobs import PolicyModule
from skyrl_async.learner.packing import Microbatch, pack, pair_cost_of
from skyrl_async.types import TrainSequence

MIN_SPEEDUP = 3.0
MAX_MEMORY_RATIO = 0.2
MAX_GRADIENT_ERROR = 1e-5
MEAN_OVER_MAX = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is measured; lengths in tokens.

    Attributes:
        device: ``cpu`` or ``cuda``.
        dtype: of the weights.
        hidden_size: of the model, Qwen3 with random weights.
        num_layers: of the model.
        vocabulary: of the model.
        num_sequences: in the batch.
        longest: length of the longest sequence.
        tokens_per_microbatch: of all ways; the longest sequence fits.
        rounds: how often each way is measured, after a first time that is not.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    hidden_size: int = 256
    num_layers: int = 4
    vocabulary: int = 8192
    num_sequences: int = 32
    longest: int = 1024
    tokens_per_microbatch: int = 4096
    rounds: int = 5


def setup(*, quick: bool) -> Setup:
    """Return sizes that suit this machine."""
    if torch.cuda.is_available():
        return Setup(
            device="cuda",
            dtype=torch.bfloat16,
            hidden_size=2048,
            num_layers=8 if quick else 24,
            vocabulary=VOCABULARY,
            longest=8192,
            tokens_per_microbatch=32_768,
        )
    if quick:
        return Setup(num_layers=2, num_sequences=16, longest=512, rounds=2)
    return Setup()


def build_model(of: Setup) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = of.hidden_size // 64
    config = Qwen3Config(
        vocab_size=of.vocabulary,
        hidden_size=of.hidden_size,
        intermediate_size=3 * of.hidden_size,
        num_hidden_layers=of.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
        max_position_embeddings=of.longest,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).to(of.device, of.dtype).eval()


def heavy_tailed_lengths(number: int, *, longest: int) -> list[int]:
    """Return lognormal lengths, raised to the power that gives the wanted mean over maximum."""
    draws = np.exp(np.random.default_rng(0).normal(size=number))
    low, high = 0.01, 20.0
    for _ in range(60):
        power = (low + high) / 2
        shares = (draws / draws.max()) ** power
        low, high = (power, high) if shares.mean() > MEAN_OVER_MAX else (low, power)
    return [max(4, round(longest * float(s))) for s in shares]


def make_sequences(of: Setup) -> list[TrainSequence]:
    """Return sequences without common beginnings, the last three quarters of each in the loss."""
    rng = np.random.default_rng(1)
    sequences = []
    for length in heavy_tailed_lengths(of.num_sequences, longest=of.longest):
        mask = np.arange(length) >= max(1, length // 4)
        sequences.append(
            TrainSequence(
                token_ids=rng.integers(0, of.vocabulary, length).astype(np.int32),
                loss_mask=mask,
                behavior_logprobs=np.where(mask, -9.0, 0.0).astype(np.float32),
                policy_versions=np.where(mask, 0, -1).astype(np.int32),
                temperature=1.0,
                advantages=(mask * rng.normal()).astype(np.float32),
                reward=0.0,
                group_id=0,
            )
        )
    return sequences


class Packed:
    """The learner's way."""

    def __init__(self, model: Any, sequences: list[TrainSequence], of: Setup) -> None:
        kind = resolve_attention("auto", device=of.device, dtype=of.dtype)
        use_attention(model, kind)
        self.parameters = list(model.parameters())
        self._policy = PolicyModule(model)
        self._of = of
        self._options: dict[str, Any] = {
            "tokens_per_microbatch": of.tokens_per_microbatch,
            "layout": "auto" if kind == "sdpa" else "flat",
            "pair_cost": pair_cost_of(model.config),
        }
        self._sequences = sequences
        self.layout = "tree" if self.microbatches()[0].segments is None else f"flat, {kind}"

    def microbatches(self) -> list[Microbatch]:
        """Pack; part of what is measured."""
        return pack(self._sequences, **self._options)

    def run(self) -> float:
        """Do one forward and backward pass over everything; return the loss."""
        total = 0.0
        number = sum(int(s.loss_mask.sum()) for s in self._sequences)
        for microbatch in self.microbatches():
            microbatch = microbatch.to(self._of.device)
            logprobs, _, _ = self._policy(microbatch)
            loss = -(logprobs * microbatch.advantages).sum() / number
            loss.backward()
            total += float(loss.detach())
        return total


class Padded:
    """What ``transformers`` does with a list of sequences.

    Args:
        model: causal LM.
        sequences: in this order.
        of: sizes.
        whole: pad to the longest of all, not of each microbatch.
    """

    def __init__(
        self, model: Any, sequences: list[TrainSequence], of: Setup, *, whole: bool
    ) -> None:
        self.parameters = list(model.parameters())
        self._model = model
        self._of = of
        self._sequences = sequences
        self._longest = of.longest if whole else 0

    def run(self) -> float:
        """Do one forward and backward pass over everything; return the loss."""
        total = 0.0
        number = sum(int(s.loss_mask.sum()) for s in self._sequences)
        rows = max(1, self._of.tokens_per_microbatch // self._of.longest)
        for start in range(0, len(self._sequences), rows):
            loss = self._loss(self._sequences[start : start + rows]) / number
            loss.backward()
            total += float(loss.detach())
        return total

    def _loss(self, rows: list[TrainSequence]) -> Tensor:
        def padded(name: str) -> Tensor:
            arrays = [torch.tensor(getattr(s, name)) for s in rows]
            arrays.append(torch.zeros(self._longest, dtype=arrays[0].dtype))
            return pad_sequence(arrays, batch_first=True)[:-1].to(self._of.device)

        ids, shares = padded("token_ids").long(), padded("advantages")
        lengths = torch.tensor([len(s.token_ids) for s in rows], device=ids.device)
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        logits = self._model(input_ids=ids, attention_mask=real, use_cache=False).logits
        logprobs = torch.log_softmax(logits[:, :-1].float(), -1)
        at_tokens = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
        return -(at_tokens * shares[:, 1:]).sum()


def measure_packing(of: Setup) -> dict[str, Any]:
    """Return tokens per second and peak memory of each way, and how they differ."""
    model, sequences = build_model(of), make_sequences(of)
    ways: dict[str, Any] = {
        "padded": Padded(copy.deepcopy(model), sequences, of, whole=True),
        "padded_short": Padded(copy.deepcopy(model), sequences, of, whole=False),
        "packed": Packed(model, sequences, of),
    }
    losses, norms, memory = {}, {}, {}
    for name, way in ways.items():
        # The first time, which also makes the gradients that later ones are added to.
        losses[name] = way.run()
        gradients = [p.grad.double().square().sum() for p in way.parameters]
        norms[name] = float(torch.stack(gradients).sum().sqrt())
        memory[name] = peak_bytes(way.run, of.device)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(of.rounds):
        for name, way in ways.items():
            times[name].append(seconds(way.run, of.device))
    middle = {name: statistics.median(t) for name, t in times.items()}
    num_tokens = sum(len(s.token_ids) for s in sequences)
    rate = matmul_rate(of)
    return {
        "num_tokens": num_tokens,
        "mean_over_max": num_tokens / len(sequences) / of.longest,
        "layout": ways["packed"].layout,
        "tokens_per_s": {name: num_tokens / t for name, t in middle.items()},
        "peak_bytes": memory,
        "loss_difference": abs(losses["packed"] - losses["padded"]),
        "relative_gradient_norm_difference": abs(norms["packed"] / norms["padded"] - 1),
        "packed_speedup": middle["padded"] / middle["packed"],
        "packed_speedup_over_padded_short": middle["padded_short"] / middle["packed"],
        "packed_memory_ratio": memory["packed"] / memory["padded"],
        "matmul_tflops": rate / 1e12,
        "mfu": operations(model, sequences) / middle["packed"] / rate,
    }


def operations(model: Any, sequences: list[TrainSequence]) -> float:
    """Return the floating-point operations of a pass: two per weight and token, three times over.

    Pairs of tokens that see each other count; the second computation of the logits does not.
    """
    config = model.config
    layers = sum(p.numel() for p in model.get_decoder().layers.parameters())
    head = model.get_output_embeddings().weight.numel()
    pair = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    lengths = [len(s.token_ids) for s in sequences]
    forward = sum(2 * layers * n + pair * n * (n + 1) / 2 for n in lengths)
    return 3 * (forward + 2 * head * sum(int(s.loss_mask.sum()) for s in sequences))


def matmul_rate(of: Setup) -> float:
    """Return the floating-point operations per second of a large matrix product."""
    size = 8192 if of.device == "cuda" else 1024
    a = torch.randn(size, size, device=of.device, dtype=of.dtype)
    best = min(seconds(lambda: a @ a, of.device) for _ in range(20))
    return 2 * size**3 / best


def main() -> None:
    arguments = parse_args("Throughput and memory of the learner's forward and backward pass.")
    started = time.perf_counter()
    torch.set_num_threads(1)
    of = setup(quick=arguments.quick)
    figures = {
        "device": of.device,
        **measure_packing(of),
        **measure_logprobs(quick=arguments.quick),
    }
    print(f"{'':<14}{'tokens/s':>10}{'peak MB':>10}")
    for name, rate in figures["tokens_per_s"].items():
        print(f"{name:<14}{rate:>10.0f}{figures['peak_bytes'][name] / 2**20:>10.0f}")
    print(f"\nlogprobs over {VOCABULARY} words")
    print(f"{'':<14}{'tokens':>10}{'seconds':>10}{'peak MB':>10}{'over logits':>13}")
    for row in figures["logprob_rows"]:
        print(
            f"{row['kind']:<14}{row['num_tokens']:>10}{row['seconds']:>10.1f}"
            f"{row['peak_bytes'] / 2**20:>10.0f}{row['peak_over_logits']:>13.2f}"
        )
    print(f"largest relative error of its gradients: {figures['logprob_gradient_error']:.1e}")
    misses = []
    if figures["packed_speedup"] < MIN_SPEEDUP:
        misses.append(f"packed_speedup {figures['packed_speedup']:.2f} < {MIN_SPEEDUP}")
    if figures["logprob_memory_ratio"] > MAX_MEMORY_RATIO:
        misses.append(
            f"logprob_memory_ratio {figures['logprob_memory_ratio']:.2f} > {MAX_MEMORY_RATIO}"
        )
    if figures["logprob_gradient_error"] > MAX_GRADIENT_ERROR:
        misses.append(f"logprob_gradient_error {figures['logprob_gradient_error']:.1e}")
    if figures["relative_gradient_norm_difference"] > (1e-4 if of.device == "cpu" else 0.05):
        misses.append(f"gradients differ: {figures['relative_gradient_norm_difference']:.1e}")
    finish("learner_throughput", figures, misses, started, arguments.output)


if __name__ == "__main__":
    main()
