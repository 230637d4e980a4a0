"""Continuous batching as arithmetic: what an engine does by a given time, on any clock.

All running sequences get one token per decode step, which takes ``a + b * sequences`` seconds. New
context and swaps cost seconds in which no step is made. So between two events every sequence
advances at the same rate, and the engine is one number, the decode steps done so far: a sequence
that starts at step ``s`` with ``n`` tokens ends at step ``s + n``, and its token ``i`` is of the
version that was loaded last when step ``s + i`` began.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

_ROUNDING_S = 1e-9

Segments = tuple[tuple[int, int], ...]
"""``(policy version, tokens)`` in the order in which they were sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTimes:
    """How fast one engine is.

    Attributes:
        decode_step_s: of a decode step without sequences.
        decode_step_s_per_sequence: that each sequence adds.
        prefill_s_per_token: for each new context token.
        swap_stall_s: of exchanging weights.
        max_concurrent: sequences decoded at once; further ones wait.
        recomputes_kv: a swap computes the contexts of running sequences again.

    Raises:
        ValueError: if a time is negative or not finite, or nothing may run.
    """

    decode_step_s: float = 0.0
    decode_step_s_per_sequence: float = 0.0
    prefill_s_per_token: float = 0.0
    swap_stall_s: float = 0.0
    max_concurrent: int = 256
    recomputes_kv: bool = True

    def __post_init__(self) -> None:
        times = (
            self.decode_step_s,
            self.decode_step_s_per_sequence,
            self.prefill_s_per_token,
            self.swap_stall_s,
        )
        if not all(math.isfinite(time) and time >= 0 for time in times):
            raise ValueError(f"times of an engine must be finite and >= 0, got {times}")
        if self.max_concurrent < 1:
            raise ValueError(f"max_concurrent must be >= 1, got {self.max_concurrent}")

    def step_s(self, num_sequences: int) -> float:
        """Return the seconds of a decode step of so many sequences."""
        return self.decode_step_s + self.decode_step_s_per_sequence * num_sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A sequence that is done, or was taken out.

    Attributes:
        key: as it was submitted.
        time_s: when.
        segments: what was sampled, by policy version.
    """

    key: Hashable
    time_s: float
    segments: Segments


@dataclass(slots=True, kw_only=True)
class EngineTotals:
    """Seconds and tokens since the previous :meth:`VirtualEngine.take_totals`."""

    decode_steps: float = 0.0
    generated_tokens: float = 0.0
    prefilled_tokens: int = 0
    reprefilled_tokens: float = 0.0
    num_swaps: int = 0
    finished: int = 0
    decode_s: float = 0.0
    prefill_s: float = 0.0
    swap_s: float = 0.0
    idle_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class _Sequence:
    key: Hashable
    num_tokens: int
    context_tokens: int
    new_tokens: int
    start_step: float = -1.0
    live: bool = True


@dataclass(slots=True)
class _Debt:
    """Seconds of work other than decoding that come first."""

    prefill_s: float = 0.0
    swap_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.swap_s


@dataclass(slots=True)
class _Swaps:
    steps: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class VirtualEngine:
    """One engine; every method takes the time, which must not fall.

    ::

        engine = VirtualEngine(times, policy_version=0, time_s=0.0)
        engine.submit("a", num_tokens=10, context_tokens=5, new_tokens=5, time_s=0.0)
        time_s = engine.next_finish_s()
        [finished] = engine.advance(time_s)

    Args:
        times: how fast it is.
        policy_version: that it has at the start.
        time_s: at the start.
    """

    def __init__(self, times: EngineTimes, *, policy_version: int = 0, time_s: float = 0.0) -> None:
        self._times = times
        self._time_s = time_s
        self._step = 0.0
        self._debt = _Debt()
        self._running: list[tuple[float, int, _Sequence]] = []  # heap by last step
        self._waiting: deque[_Sequence] = deque()
        self._by_key: dict[Hashable, _Sequence] = {}
        self._num_running = 0
        self._context_tokens = 0
        self._start_steps = 0.0  # sum over the running sequences
        self._order = 0
        self._swaps = _Swaps([0.0], [policy_version])
        self._paused = False
        self._totals = EngineTotals()

    @property
    def policy_version(self) -> int:
        """Of the next token."""
        return self._swaps.versions[-1]

    @property
    def num_running(self) -> int:
        """Sequences that are decoded now."""
        return self._num_running

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for others to end."""
        return sum(sequence.live for sequence in self._waiting)

    @property
    def num_live(self) -> int:
        """Sequences that run or wait."""
        return len(self._by_key)

    def take_totals(self) -> EngineTotals:
        """Return what it did since the last call, up to the last ``advance``."""
        totals, self._totals = self._totals, EngineTotals()
        return totals

    def submit(
        self,
        key: Hashable,
        *,
        num_tokens: int,
        context_tokens: int,
        new_tokens: int,
        time_s: float,
    ) -> list[Finished]:
        """Take in a sequence; return those that are done by now.

        Args:
            key: names it; unique among those that are not done.
            num_tokens: that it will sample.
            context_tokens: before them.
            new_tokens: of these, to be computed.
            time_s: now.

        Raises:
            ValueError: if the key is in use, or nothing would be sampled.
        """
        if key in self._by_key:
            raise ValueError(f"sequence {key!r} is live already")
        if num_tokens < 1:
            raise ValueError(f"sequence {key!r} must sample at least one token, got {num_tokens}")
        done = self.advance(time_s)
        sequence = _Sequence(
            key=key, num_tokens=num_tokens, context_tokens=context_tokens, new_tokens=new_tokens
        )
        self._by_key[key] = sequence
        self._waiting.append(sequence)
        self._admit()
        return done + self.advance(time_s)

    def cancel(self, key: Hashable, *, time_s: float) -> tuple[list[Finished], Finished | None]:
        """Take a sequence out; return those done by now, and it with what it has (or None)."""
        done = self.advance(time_s)
        sequence = self._by_key.get(key)
        if sequence is None:
            return done, None
        sequence.live = False
        del self._by_key[key]
        count = 0
        if sequence.start_step >= 0:
            count = min(sequence.num_tokens, int(self._step - sequence.start_step))
            self._leave(sequence)
        segments = self._segments(sequence.start_step, count)
        self._admit()
        return done, Finished(key=key, time_s=self._time_s, segments=segments)

    def swap(self, policy_version: int, *, time_s: float) -> list[Finished]:
        """Exchange the weights; return the sequences that are done by now.

        Raises:
            ValueError: if the version does not increase.
        """
        if policy_version <= self.policy_version:
            raise ValueError(
                f"policy_version must increase: the engine has {self.policy_version}, got "
                f"{policy_version}"
            )
        done = self.advance(time_s)
        self._debt.swap_s += self._times.swap_stall_s
        self._totals.num_swaps += 1
        if self._times.recomputes_kv:
            sampled = self._num_running * self._step - self._start_steps
            tokens = self._context_tokens + max(0.0, sampled)
            self._debt.swap_s += tokens * self._times.prefill_s_per_token
            self._totals.reprefilled_tokens += tokens
        # A token that is being computed is still of the old version.
        self._swaps.steps.append(self._step)
        self._swaps.versions.append(policy_version)
        return done

    def stall(self, seconds: float) -> None:
        """Make no step for so long from now on, because something else needs the processor."""
        self._debt.prefill_s += seconds

    def pause(self, *, time_s: float) -> list[Finished]:
        """Stand still until :meth:`resume`; return the sequences that are done by now."""
        done = self.advance(time_s)
        self._paused = True
        return done

    def resume(self, *, time_s: float) -> None:
        """Go on after :meth:`pause`."""
        self.advance(time_s)
        self._paused = False

    def next_finish_s(self) -> float | None:
        """Return when the next sequence is done, if nothing happens before; None without one."""
        self._drop_cancelled()
        if not self._running or self._paused:
            return None
        left = max(0.0, self._running[0][0] - self._step)
        return self._time_s + self._debt.total_s + left * self._times.step_s(self._num_running)

    def advance(self, time_s: float) -> list[Finished]:
        """Compute until ``time_s``; return the sequences that end, in their order."""
        done: list[Finished] = []
        while not self._paused:
            self._drop_cancelled()
            if not self._running:
                break
            span = time_s - self._time_s
            if self._debt.total_s:
                self._pay(min(span, self._debt.total_s))
                if self._debt.total_s:
                    return done
                continue
            step_s = self._times.step_s(self._num_running)
            need_s = max(0.0, self._running[0][0] - self._step) * step_s
            if need_s > span + _ROUNDING_S:
                self._decode(span, span / step_s)
                return done
            self._decode(min(need_s, max(span, 0.0)), self._running[0][0] - self._step)
            done.append(self._finish())
        if time_s > self._time_s:
            self._totals.idle_s += time_s - self._time_s
            self._time_s = time_s
        return done

    def _pay(self, span_s: float) -> None:
        """Spend time on what comes before decoding: swaps first."""
        swap_s = min(span_s, self._debt.swap_s)
        prefill_s = min(span_s - swap_s, self._debt.prefill_s)
        self._debt.swap_s -= swap_s
        self._debt.prefill_s -= prefill_s
        if self._debt.total_s < _ROUNDING_S:
            self._debt = _Debt()
        self._totals.swap_s += swap_s
        self._totals.prefill_s += prefill_s
        self._time_s += span_s

    def _decode(self, span_s: float, steps: float) -> None:
        self._step += steps
        self._time_s += span_s
        self._totals.decode_s += span_s
        self._totals.decode_steps += steps
        self._totals.generated_tokens += steps * self._num_running

    def _finish(self) -> Finished:
        _, _, sequence = heapq.heappop(self._running)
        del self._by_key[sequence.key]
        self._leave(sequence)
        self._totals.finished += 1
        segments = self._segments(sequence.start_step, sequence.num_tokens)
        self._admit()
        return Finished(key=sequence.key, time_s=self._time_s, segments=segments)

    def _leave(self, sequence: _Sequence) -> None:
        self._num_running -= 1
        self._context_tokens -= sequence.context_tokens
        self._start_steps -= sequence.start_step

    def _admit(self) -> None:
        while self._waiting and self._num_running < self._times.max_concurrent:
            sequence = self._waiting.popleft()
            if not sequence.live:
                continue
            sequence.start_step = self._step
            self._num_running += 1
            self._context_tokens += sequence.context_tokens
            self._start_steps += self._step
            self._totals.prefilled_tokens += sequence.new_tokens
            self._debt.prefill_s += sequence.new_tokens * self._times.prefill_s_per_token
            self._order += 1
            last = self._step + sequence.num_tokens
            heapq.heappush(self._running, (last, self._order, sequence))

    def _drop_cancelled(self) -> None:
        while self._running and not self._running[0][2].live:
            heapq.heappop(self._running)

    def _segments(self, start_step: float, count: int) -> Segments:
        """Return which version sampled how many of the tokens from ``start_step`` on."""
        steps, versions = self._swaps.steps, self._swaps.versions
        index = max(0, bisect_right(steps, start_step) - 1)
        out: list[tuple[int, int]] = []
        sampled = 0
        while sampled < count:
            end = count
            if index + 1 < len(steps):
                end = min(count, max(0, math.ceil(steps[index + 1] - start_step)))
            if end > sampled:
                out.append((versions[index], end - sampled))
                sampled = end
            index += 1
        return tuple(out)
