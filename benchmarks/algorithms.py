"""What each policy loss and correction costs, against the plain PPO loss in the same run.

The plain PPO loss is the one that papers and libraries write: the smaller of two products, with
autograd for its gradient. ``pass`` is what a microbatch costs above the decoder: the head of the
built-in policy (64 words), logprobs and entropy, corrections, the loss, and the gradient back to
the hidden states. ``bare`` is the loss function and its gradient, or the correction, alone. Times
are medians over rounds in which all losses take turns; memory is the peak of the resident set
during one larger call, above what it was before.

    python benchmarks/algorithms.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from measuring import peak_bytes, seconds
from report import finish, parse_args
from torch import Tensor

from skyrl_async.algorithms.catalogue import losses
from skyrl_async.algorithms.composition import CorrectionSettings, correct
from skyrl_async.algorithms.tokens import LossTokens, TokenLoss
from skyrl_async.config_algorithm import BEHAVIOR_LOSSES
from skyrl_async.learner.algorithm_settings import AlgorithmSettings
from skyrl_async.learner.logprobs import TokenOutputs
from skyrl_async.learner.loss_batch import LossBatch
from skyrl_async.learner.objective import objective
from skyrl_async.learner.packing import Microbatch
from skyrl_async.learner.targets import make_targets

LIMIT = 1.3
WIDTH, VOCABULARY, SEQUENCE_TOKENS = 64, 64, 128
CORRECTIONS = {
    "token weight": CorrectionSettings(),
    "sequence weight": CorrectionSettings(weight="sequence"),
    "icepop": CorrectionSettings(token_mask=(0.5, 5.0)),
    "sequence mask": CorrectionSettings(sequence_mask=(0.1, 10.0)),
    "veto": CorrectionSettings(veto_below=1e-4),
    "k3 rejection": CorrectionSettings(k3_limit=0.01, k_level="sequence_mean"),
    "opsm": CorrectionSettings(opsm_delta=0.5),
    "m2": CorrectionSettings(m2_limit=0.04),
    "normalized": CorrectionSettings(normalize_weights=True),
}
CORRECTED = "ppo_clip + "
"""Before the name of a correction."""
PREFIX = {"pass": "", "bare": "bare_"}
"""Of the figures' names, by what was measured."""
UNBOUND = "m2po, a third rejected"
"""The bare cost of ``m2po`` depends on the data; no limit is claimed for this one."""


def plain_ppo(tokens: LossTokens, *, clip_low: float = 0.2, clip_high: float = 0.28) -> TokenLoss:
    """Return the loss of PPO as it is written."""
    ratio = (tokens.current_logprobs - tokens.proximal_logprobs).exp()
    plain = ratio * tokens.advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * tokens.advantages
    return TokenLoss(loss=-torch.minimum(plain, clipped), clipped=(clipped < plain).detach())


class Pass:
    """Forward and backward over one batch of ``num_tokens`` random tokens."""

    def __init__(self, num_tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._hidden = torch.randn(num_tokens, WIDTH, generator=generator).requires_grad_()
        self._head = torch.randn(VOCABULARY, WIDTH, generator=generator) / WIDTH**0.5
        self._targets = torch.randint(VOCABULARY, (num_tokens,), generator=generator)
        with torch.no_grad():
            logprobs = self._outputs().logprobs
        noise = 0.1 * torch.randn(2, num_tokens, generator=generator)
        self._proximal = logprobs + noise[0]
        num_sequences = num_tokens // SEQUENCE_TOKENS
        ids = torch.arange(num_tokens) // SEQUENCE_TOKENS
        self._batch = LossBatch(
            behavior_logprobs=self._proximal + noise[1],
            policy_versions=torch.zeros(num_tokens, dtype=torch.int64),
            advantages=torch.randn(num_tokens, generator=generator),
            sequence_ids=ids,
            prompt_ids=ids // 16,
            turn_ids=torch.zeros(num_tokens, dtype=torch.int64),
            rewards=torch.zeros(num_sequences),
            truncated=torch.zeros(num_sequences, dtype=torch.bool),
        )
        self._microbatch = _microbatch(num_tokens, self._batch)
        self.tokens = LossTokens(
            current_logprobs=logprobs.requires_grad_(),
            proximal_logprobs=self._proximal,
            behavior_logprobs=self._batch.behavior_logprobs,
            advantages=self._batch.advantages,
            sequence_ids=ids,
            num_sequences=num_sequences,
        )

    def _outputs(self) -> TokenOutputs:
        all_logprobs = torch.log_softmax(self._hidden @ self._head.T, -1)
        logprobs = all_logprobs.gather(-1, self._targets[:, None])[:, 0]
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
        return TokenOutputs(logprobs=logprobs, entropy=entropy)

    def run(self, settings: AlgorithmSettings) -> None:
        """Do what the learner does above the decoder."""
        self._hidden.grad = None
        targets = make_targets(self._batch, settings, proximal_logprobs=self._proximal)
        objective(
            self._outputs(),
            self._microbatch,
            self._batch,
            targets,
            proximal_logprobs=self._proximal,
            settings=settings,
        ).total.backward()

    def bare(self, name: str, settings: AlgorithmSettings) -> None:
        """Compute only the loss function and its gradient, or the correction."""
        tokens = self.tokens
        if name.startswith(CORRECTED):
            correct(
                tokens.proximal_logprobs - tokens.behavior_logprobs,
                advantages=tokens.advantages,
                sequence_ids=tokens.sequence_ids,
                num_sequences=tokens.num_sequences,
                settings=settings.correction,
            )
            return
        tokens.current_logprobs.grad = None
        settings.loss(tokens, **settings.loss_options).loss.sum().backward()


def _microbatch(num_tokens: int, batch: LossBatch) -> Microbatch:
    zeros = torch.zeros(num_tokens, dtype=torch.int64)
    return Microbatch(
        token_ids=zeros[None],
        position_ids=zeros[None],
        subtree_ends=zeros[None],
        source=zeros,
        targets=zeros,
        index=torch.arange(num_tokens),
        behavior_logprobs=batch.behavior_logprobs,
        advantages=batch.advantages,
        policy_versions=zeros,
        prefix_versions=zeros,
        temperature=torch.ones(num_tokens),
    )


def subjects() -> dict[str, AlgorithmSettings]:
    """Return what is measured; the plain PPO loss, without importance weight, comes first."""
    none = CorrectionSettings(weight="none")
    plain = AlgorithmSettings(correction=none, loss=plain_ppo)
    named = {"plain PPO": plain}
    for name, function in losses().items():
        correction = none if name in BEHAVIOR_LOSSES else CorrectionSettings()
        named[name] = replace(plain, loss=function, correction=correction)
    named[UNBOUND] = replace(named["m2po"], loss_options={"limit": 0.004})
    for name, correction in CORRECTIONS.items():
        named[f"{CORRECTED}{name}"] = AlgorithmSettings(correction=correction)
    named["ppo_clip and squared log ratio"] = AlgorithmSettings(squared_log_ratio_coefficient=1e-3)
    return named


def calls(one: Pass, name: str, settings: AlgorithmSettings) -> dict[str, Callable[[], None]]:
    return {"pass": lambda: one.run(settings), "bare": lambda: one.bare(name, settings)}


def measure(*, rounds: int, num_tokens: int, memory_tokens: int) -> list[dict[str, Any]]:
    named = subjects()
    kinds = {name: ("pass",) if " and " in name else ("pass", "bare") for name in named}
    one, large = Pass(num_tokens), Pass(memory_tokens)
    times: dict[str, dict[str, list[float]]] = {n: {k: [] for k in kinds[n]} for n in named}
    for _ in range(rounds):
        for name, settings in named.items():
            for kind in kinds[name]:
                call = calls(one, name, settings)[kind]
                # The first call after another loss finds its memory cold.
                call()
                times[name][kind].append(seconds(call))
    large.run(AlgorithmSettings())
    memory = {
        name: {kind: peak_bytes(calls(large, name, s)[kind]) for kind in kinds[name]}
        for name, s in named.items()
    }
    middle = {n: {kind: statistics.median(v) for kind, v in t.items()} for n, t in times.items()}
    plain, *_ = named
    return [
        {"name": name}
        | {
            key: value
            for kind in kinds[name]
            for key, value in {
                f"{PREFIX[kind]}seconds_per_million_tokens": middle[name][kind] / num_tokens * 1e6,
                f"relative_{PREFIX[kind]}time": middle[name][kind] / middle[plain][kind],
                f"{PREFIX[kind]}megabytes_per_million_tokens": memory[name][kind] / memory_tokens,
                f"relative_{PREFIX[kind]}memory": memory[name][kind] / memory[plain][kind],
            }.items()
        }
        for name in named
    ]


def gradient_norms_s(num_sequences: int) -> float:
    """Return what the norm of each trajectory's gradient costs, per trajectory, built-in policy."""
    from skyrl_async.learner.tiny_policy import build_tiny_model

    model = build_tiny_model()
    ids = torch.randint(0, 60, (num_sequences, 24))

    def one_by_one() -> None:
        for row in ids:
            model.zero_grad(set_to_none=True)
            logits = model(row[None, :-1]).logits.log_softmax(-1)
            logits.gather(-1, row[None, 1:, None]).sum().backward()
            norms: list[Tensor] = [p.grad.square().sum() for p in model.parameters()]
            torch.stack(norms).sum()

    return seconds(one_by_one) / num_sequences


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print seconds and megabytes per million tokens, and both relative to the plain PPO loss."""
    print(f"{'':<30}{'pass':^34}{'bare':^34}")
    print(f"{'':<30}" + 2 * f"{'s':>8}{'relative':>9}{'MB':>8}{'relative':>9}")
    for row in rows:
        numbers = "".join(
            f"{row[f'{of}seconds_per_million_tokens']:>8.4f}{row[f'relative_{of}time']:>9.2f}"
            f"{row[f'{of}megabytes_per_million_tokens']:>8.0f}{row[f'relative_{of}memory']:>9.2f}"
            for of in PREFIX.values()
            if f"relative_{of}time" in row
        )
        print(f"{row['name']:<30}{numbers}")


def main() -> None:
    arguments = parse_args("The cost of every policy loss and correction.")
    started = time.perf_counter()
    torch.set_num_threads(1)
    quick = arguments.quick
    rows = measure(
        rounds=5 if quick else 21,
        num_tokens=16_384 if quick else 65_536,
        memory_tokens=262_144 if quick else 1_048_576,
    )
    norms_s = gradient_norms_s(8 if quick else 64)
    print_table(rows)
    print(f"gradient norm of one trajectory (VCPO's baseline): {1e3 * norms_s:.1f} ms each")
    misses = [
        f"{row['name']}: {name.replace('_', ' ')} {value:.2f} > {LIMIT}"
        for row in rows
        for name, value in row.items()
        if name.startswith("relative_") and value > LIMIT
        if not (row["name"] == UNBOUND and name.startswith("relative_bare"))
    ]
    figures = {"rows": rows, "gradient_norm_s_per_trajectory": norms_s}
    finish("algorithms", figures, misses, started, arguments.output)


if __name__ == "__main__":
    main()
