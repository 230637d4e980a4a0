import math

import pytest
import torch

from skyrl_async.rollout.engine_meter import EngineMeter
from skyrl_async.rollout.sampler import sample_tokens
from skyrl_async.types import Sampling


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, -30.0])
    count = 40_000
    samplings = [Sampling(max_tokens=1, temperature=temperature)] * count
    token_ids, logprobs = sample_tokens(logits.expand(count, -1), samplings, generator=generator())
    expected = torch.softmax(logits / temperature, dim=0)
    frequencies = torch.bincount(torch.tensor(token_ids), minlength=5) / count
    # Six standard deviations of a binomial frequency.
    bound = 6 * (expected * (1 - expected) / count).sqrt() + 1e-9
    assert ((frequencies - expected).abs() <= bound).all()
    chosen = torch.log(expected)[torch.tensor(token_ids)]
    torch.testing.assert_close(torch.tensor(logprobs), chosen, atol=1e-5, rtol=0)


def test_top_k_and_top_p_limit_the_tokens_but_not_the_logprobs():
    logits = torch.log(torch.tensor([0.05, 0.4, 0.3, 0.25]))
    count = 2000
    cases = [
        (Sampling(max_tokens=1, top_k=2), {1, 2}),
        (Sampling(max_tokens=1, top_p=0.71), {1, 2, 3}),
        (Sampling(max_tokens=1, top_p=0.69), {1, 2}),
        (Sampling(max_tokens=1, top_p=0.01), {1}),
        (Sampling(max_tokens=1, top_k=3, top_p=0.5), {1, 2}),
        (Sampling(max_tokens=1), {0, 1, 2, 3}),
    ]
    samplings = [sampling for sampling, _ in cases for _ in range(count)]
    token_ids, logprobs = sample_tokens(
        logits.expand(len(samplings), -1), samplings, generator=generator()
    )
    for index, (_, allowed) in enumerate(cases):
        assert set(token_ids[index * count : (index + 1) * count]) == allowed
    torch.testing.assert_close(torch.tensor(logprobs), logits[torch.tensor(token_ids)])


def test_greedy_rows_take_the_maximum_with_logprobs_of_temperature_one():
    logits = torch.randn(50, 30, generator=generator())
    samplings = [Sampling(max_tokens=1, temperature=0), Sampling(max_tokens=1)] * 25
    token_ids, logprobs = sample_tokens(logits, samplings, generator=generator())
    assert token_ids[::2] == logits[::2].argmax(-1).tolist()
    expected = torch.log_softmax(logits, -1)[torch.arange(50), torch.tensor(token_ids)]
    torch.testing.assert_close(torch.tensor(logprobs), expected)


def test_rows_that_are_not_finite_have_nan_and_leave_the_others_alone():
    logits = torch.zeros(5, 3)
    logits[0, 1] = math.nan
    logits[1, 1] = math.inf
    logits[2] = -math.inf
    logits[3, 1] = -math.inf
    samplings = [Sampling(max_tokens=1)] * 5
    for _ in range(20):
        token_ids, logprobs = sample_tokens(logits, samplings, generator=torch.Generator())
        assert [math.isnan(p) for p in logprobs] == [True, True, True, False, False]
        assert token_ids[3] != 1
        assert all(0 <= t < 3 for t in token_ids)


def test_the_meter_charges_every_second_to_one_part():
    now = 0.0
    meter = EngineMeter(clock=lambda: now)

    def wait(seconds):
        nonlocal now
        now += seconds

    wait(5)  # idle
    meter.wakes()
    for step_s, away_s in ((2, 1), (4, 3), (2, 1)):
        meter.work_starts()
        wait(step_s)
        meter.step_ends(generated=3, prefilled=1, reprefilled=step_s - 2, running=True)
        wait(away_s)
    meter.work_starts()
    wait(0.5)
    meter.swap_ends(1)
    meter.becomes_idle()
    wait(7)
    stats = meter.take(running=2, waiting=1)
    assert (stats.busy_s, stats.yielded_s, stats.idle_s) == (8.5, 5, 12)
    assert (stats.decode_steps, stats.generated_tokens, stats.reprefilled_tokens) == (3, 9, 2)
    # Steps end at 7, 12 and 17.
    assert stats.longest_gap_s == 5
    assert stats.longest_gap_decode_steps == 1
    assert stats.swap_stall_s == 4.5
    wait(3)
    assert meter.take(running=0, waiting=0).idle_s == 3
