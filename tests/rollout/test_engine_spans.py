"""What engines put on the timeline."""

import asyncio
import time

import pytest

from skyrl_async.rollout.embedded_engine import EmbeddedEngine
from skyrl_async.rollout.engine_meter import EngineMeter
from skyrl_async.rollout.pool_meter import BusySpans
from skyrl_async.types import Sampling
from tests.fakes import FakeClock
from tests.rollout.embedded_engine_cases import rough_model, weights_of


class ListLane:
    """Keeps what is recorded."""

    def __init__(self) -> None:
        self.spans: list[tuple] = []
        self.flows: list[tuple] = []

    def span(self, name, start_s, end_s, args=None):
        self.spans.append((name, start_s, end_s, args))

    def flow(self, stage, *, policy_version, time_s, engine=""):
        self.flows.append((stage, policy_version, time_s))


def step(meter: EngineMeter, clock: FakeClock, seconds: float, *, reprefilled: int = 0) -> None:
    meter.work_starts()
    clock.now += seconds
    meter.step_ends(generated=3, prefilled=1, reprefilled=reprefilled, running=True)


def test_uninterrupted_decoding_is_one_span():
    clock, lane = FakeClock(), ListLane()
    clock.now = 100.0
    meter = EngineMeter(clock=clock, lane=lane)
    meter.wakes()
    step(meter, clock, 0.25)
    clock.now += 0.125  # episodes
    step(meter, clock, 0.25)
    meter.work_starts()
    clock.now += 0.5
    meter.swap_ends(7)
    step(meter, clock, 0.25, reprefilled=9)
    step(meter, clock, 0.25)
    step(meter, clock, 0.5, reprefilled=2)  # of a request that had no room before
    meter.becomes_idle()

    assert lane.spans == [
        ("decode", 100.0, 100.625, {"steps": 2, "tokens": 6, "prefilled": 2}),
        ("swap", 100.625, 101.125, {"policy_version": 7}),
        ("recompute", 101.125, 101.375, {"tokens": 9}),
        ("decode", 101.375, 101.625, {"steps": 1, "tokens": 3, "prefilled": 1}),
        ("recompute", 101.625, 102.125, {"tokens": 2}),
    ]
    assert lane.flows == [("loaded", 7, 101.125)]


def test_a_long_stretch_is_written_in_pieces_of_a_second():
    clock, lane = FakeClock(), ListLane()
    meter = EngineMeter(clock=clock, lane=lane)
    meter.wakes()
    for _ in range(10):
        step(meter, clock, 0.25)
    assert [end - start for _, start, end, _ in lane.spans] == [1.0, 1.0]
    assert [args["steps"] for *_, args in lane.spans] == [4, 4]


def test_a_pause_is_a_span_and_idleness_is_none():
    clock, lane = FakeClock(), ListLane()
    meter = EngineMeter(clock=clock, lane=lane)
    start = clock.now
    for paused in (False, True):
        meter.becomes_idle(paused=paused)
        clock.now += 2
        meter.wakes()
    assert lane.spans == [("paused", start + 2, start + 4, None)]


def test_a_server_is_busy_from_its_first_request_to_its_last(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lane = ListLane()
    busy = BusySpans(lane)
    busy.request_starts()
    now[0] += 0.25
    busy.request_starts()
    now[0] += 0.25
    busy.request_ends(1)
    now[0] += 0.25
    busy.request_ends(0)
    now[0] += 0.25
    assert lane.spans == [("decode", 10.0, 10.75, {"requests": 2})]
    busy.request_starts()
    now[0] += 1.5
    busy.request_ends(3)  # others go on, but a second is long enough for one span
    now[0] += 0.25
    busy.request_ends(0)
    assert lane.spans[1:] == [
        ("decode", 11.0, 12.5, {"requests": 1}),
        ("decode", 12.5, 12.75, {"requests": 1}),
    ]


def test_an_engine_says_how_long_a_request_waited_for_its_place():
    async def body():
        lane = ListLane()
        model = rough_model()
        engine = EmbeddedEngine(model, max_concurrent=1, context_length=64, lane=lane)
        runner = asyncio.create_task(engine.run())
        sampling = Sampling(max_tokens=20)
        started_s = time.monotonic()
        first, second = await asyncio.gather(
            *(engine.generate([5, 6], sampling, request_id=f"{i}") for i in range(2))
        )
        seconds = time.monotonic() - started_s
        await engine.load_weights(weights_of(rough_model()), policy_version=4)
        runner.cancel()
        await asyncio.gather(runner, return_exceptions=True)
        return first, second, seconds, lane

    first, second, seconds, lane = asyncio.run(body())

    assert first.queued_s == 0
    assert 0 < second.queued_s < seconds
    assert second.queued_s == pytest.approx(seconds / 2, rel=0.6)
    tokens = sum(args["tokens"] for name, *_, args in lane.spans if name == "decode")
    assert tokens == len(first.token_ids) + len(second.token_ids)
    assert [args for name, *_, args in lane.spans if name == "swap"] == [{"policy_version": 4}]
    assert [flow[:2] for flow in lane.flows] == [("loaded", 4)]
