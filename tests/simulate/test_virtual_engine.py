import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.simulate.virtual_engine import EngineTimes, VirtualEngine

STEP = EngineTimes(decode_step_s=1.0, recomputes_kv=False)


def submit(engine, key, tokens, *, at, context=0, new=0):
    return engine.submit(key, num_tokens=tokens, context_tokens=context, new_tokens=new, time_s=at)


def test_sequences_decode_together_and_each_ends_after_its_tokens():
    engine = VirtualEngine(STEP)
    assert submit(engine, "a", 3, at=0.0) == []
    assert submit(engine, "b", 5, at=1.0) == []
    assert engine.next_finish_s() == 3.0
    assert [(f.key, f.time_s) for f in engine.advance(10.0)] == [("a", 3.0), ("b", 6.0)]
    totals = engine.take_totals()
    assert (totals.decode_steps, totals.generated_tokens, totals.finished) == (6.0, 8.0, 2)
    assert (totals.decode_s, totals.idle_s) == (6.0, 4.0)


def test_a_step_takes_longer_with_more_sequences():
    # Two sequences: 1 + 0.5 * 2 = 2 s a step; one: 1.5 s.
    engine = VirtualEngine(EngineTimes(decode_step_s=1.0, decode_step_s_per_sequence=0.5))
    submit(engine, "a", 2, at=0.0)
    submit(engine, "b", 4, at=0.0)
    assert [(f.key, f.time_s) for f in engine.advance(20.0)] == [("a", 4.0), ("b", 7.0)]


def test_sequences_beyond_the_limit_wait_for_a_place():
    engine = VirtualEngine(EngineTimes(decode_step_s=1.0, max_concurrent=1))
    submit(engine, "a", 2, at=0.0)
    submit(engine, "b", 3, at=0.0)
    assert (engine.num_running, engine.num_waiting) == (1, 1)
    assert [(f.key, f.time_s) for f in engine.advance(9.0)] == [("a", 2.0), ("b", 5.0)]


def test_new_context_holds_all_sequences_up():
    engine = VirtualEngine(EngineTimes(decode_step_s=1.0, prefill_s_per_token=0.1))
    submit(engine, "a", 2, at=0.0)
    submit(engine, "b", 2, at=1.0, context=30, new=20)
    assert [(f.key, f.time_s) for f in engine.advance(9.0)] == [("a", 4.0), ("b", 5.0)]
    assert engine.take_totals().prefill_s == pytest.approx(2.0)


def test_tokens_carry_the_version_that_sampled_them():
    engine = VirtualEngine(STEP)
    submit(engine, "a", 5, at=0.0)
    engine.swap(3, time_s=1.5)  # the second token is being computed: still of version 0
    engine.swap(4, time_s=4.0)
    [finished] = engine.advance(5.0)
    assert finished.segments == ((0, 2), (3, 2), (4, 1))


def test_a_swap_stalls_and_recomputes_the_contexts_of_running_sequences():
    times = EngineTimes(decode_step_s=1.0, prefill_s_per_token=0.1, swap_stall_s=0.5)
    engine = VirtualEngine(times)
    submit(engine, "a", 4, at=0.0, context=10, new=0)
    engine.swap(1, time_s=2.0)
    # 2 s decoded, 0.5 s stall, (10 + 2) * 0.1 s again, 2 s to go.
    assert [f.time_s for f in engine.advance(20.0)] == [pytest.approx(5.7)]
    assert engine.take_totals().reprefilled_tokens == 12


def test_a_swap_recomputes_nothing_of_what_has_ended():
    engine = VirtualEngine(EngineTimes(decode_step_s=1.0, prefill_s_per_token=0.1))
    submit(engine, "ended", 1, at=0.0, context=50, new=0)
    submit(engine, "running", 4, at=0.0, context=10, new=0)
    engine.swap(1, time_s=2.0)
    assert engine.take_totals().reprefilled_tokens == 12


def test_a_paused_engine_stands_still():
    engine = VirtualEngine(STEP)
    submit(engine, "a", 3, at=0.0)
    engine.pause(time_s=1.0)
    assert engine.next_finish_s() is None
    engine.resume(time_s=5.0)
    assert [f.time_s for f in engine.advance(9.0)] == [7.0]


def test_a_cancelled_sequence_keeps_what_it_has_and_frees_its_place():
    engine = VirtualEngine(EngineTimes(decode_step_s=1.0, max_concurrent=1))
    submit(engine, "a", 9, at=0.0)
    submit(engine, "b", 1, at=0.0)
    _, taken = engine.cancel("a", time_s=3.0)
    assert taken.segments == ((0, 3),)
    assert engine.cancel("unknown", time_s=3.0) == ([], None)
    assert [(f.key, f.time_s) for f in engine.advance(9.0)] == [("b", 4.0)]


def test_an_engine_without_cost_answers_at_once():
    engine = VirtualEngine(EngineTimes())
    [finished] = submit(engine, "a", 1000, at=2.0, context=5, new=5)
    assert (finished.time_s, finished.segments) == (2.0, ((0, 1000),))


def test_wrong_use_is_refused():
    engine = VirtualEngine(STEP)
    submit(engine, "a", 3, at=0.0)
    with pytest.raises(ValueError, match="live already"):
        submit(engine, "a", 3, at=0.0)
    with pytest.raises(ValueError, match="at least one token"):
        submit(engine, "b", 0, at=0.0)
    with pytest.raises(ValueError, match="must increase"):
        engine.swap(0, time_s=0.0)
    with pytest.raises(ValueError, match=">= 0"):
        EngineTimes(decode_step_s=-1.0)


def decoded_one_step_at_a_time(arrivals, *, limit):
    """Return when each sequence ends and its tokens' versions, one decode step after the other."""
    waiting = sorted(arrivals, key=lambda a: a[0])
    queue, running, ends = [], {}, {}
    for step in range(10_000):
        queue += [key for at, key, _ in waiting if at == step]
        lengths = {key: tokens for _, key, tokens in waiting}
        while queue and len(running) < limit:
            key = queue.pop(0)
            running[key] = lengths[key]
        for key in list(running):
            running[key] -= 1
            if not running[key]:
                del running[key]
                ends[key] = step + 1
        if len(ends) == len(arrivals):
            return ends
    raise AssertionError("too many steps")


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), min_size=1, max_size=12),
    limit=st.integers(1, 5),
    swaps=st.lists(st.integers(1, 30), max_size=3, unique=True),
)
def test_the_arithmetic_equals_a_loop_over_decode_steps(arrivals, limit, swaps):
    named = [(at, number, tokens) for number, (at, tokens) in enumerate(arrivals)]
    engine = VirtualEngine(
        EngineTimes(decode_step_s=1.0, max_concurrent=limit, recomputes_kv=False)
    )
    events = [(at, 1, key, tokens) for at, key, tokens in named]
    events += [(at, 0, 0, 0) for at in swaps]
    finished, versions = [], [(0, 0)]
    for at, kind, key, tokens in sorted(events):
        if kind == 0:
            versions.append((at, len(versions)))
            finished += engine.swap(len(versions) - 1, time_s=float(at))
        else:
            finished += submit(engine, key, tokens, at=float(at))
    finished += engine.advance(1000.0)
    ends = decoded_one_step_at_a_time(named, limit=limit)
    assert {f.key: round(f.time_s, 6) for f in finished} == ends
    for done in finished:
        tokens = arrivals[done.key][1]
        start = ends[done.key] - tokens
        expected = [max(v for at, v in versions if at <= start + i) for i in range(tokens)]
        sampled = [version for version, count in done.segments for _ in range(count)]
        assert sampled == expected
    assert math.isclose(engine.take_totals().generated_tokens, sum(t for _, t in arrivals))
