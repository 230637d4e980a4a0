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
    [(delay_s, arrived)] = calls
    assert (delay_s, loads) == (3.0, [])
    arrived()
    assert loads == [(0, 1), (1, 1)]
    # The engines acknowledge after their stall; only then is the next one sent.
    delay_s, acknowledged = calls[1]
    assert (delay_s, len(calls)) == (0.5, 2)
    acknowledged()
    assert calls[2][0] == 3.0
    calls[2][1]()
    assert loads[2:] == [(0, 3), (1, 3)]
    calls[3][1]()
    assert len(calls) == 4
