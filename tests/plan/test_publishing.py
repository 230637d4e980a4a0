from skyrl_async.plan.publishing import VirtualPublisher


def test_one_version_is_on_its_way_and_the_newest_one_waits_for_its_arrival():
    calls, loads = [], []
    publisher = VirtualPublisher(
        num_engines=2,
        publish_s=3.0,
        stall_s=0.5,
        after=lambda delay_s, event: calls.append((delay_s, event)),
        load=lambda engine, version: loads.append((engine, version)),
    )
    publisher.publish(1)
    publisher.publish(2)
    publisher.publish(3)  # in place of 2
    assert ([delay_s for delay_s, _ in calls], loads) == ([3.0, 3.0], [])
    calls[0][1]()
    assert (loads, len(calls)) == ([(0, 1)], 2)
    calls[1][1]()
    assert loads == [(0, 1), (1, 1)]
    # The engines acknowledge after their stall; only then is the next one sent.
    delay_s, acknowledged = calls[2]
    assert (delay_s, len(calls)) == (0.5, 3)
    acknowledged()
    assert [delay_s for delay_s, _ in calls[3:]] == [3.0, 3.0]
    for _, arrived in calls[3:]:
        arrived()
    assert loads[2:] == [(0, 3), (1, 3)]
    calls[5][1]()
    assert len(calls) == 6


def test_with_a_spread_every_engine_gets_every_version_at_its_own_time():
    delays, loads = [], []

    def after(delay_s, event):
        delays.append(delay_s)
        event()

    publisher = VirtualPublisher(
        num_engines=50,
        publish_s=2.0,
        spread=0.5,
        stall_s=0.0,
        after=after,
        load=lambda engine, version: loads.append((engine, version)),
    )
    publisher.publish(1)
    *arrivals, acknowledged = delays
    assert loads == [(engine, 1) for engine in range(50)] and acknowledged == 0.0
    assert 1.0 <= min(arrivals) < 1.2 and 2.8 < max(arrivals) <= 3.0
    assert len(set(arrivals)) == 50
