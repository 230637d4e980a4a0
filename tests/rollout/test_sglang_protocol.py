import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.rollout.engine_errors import (
    AbortedByServer,
    AccessRefused,
    BadReply,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    NonfiniteLogprob,
    UnsupportedServer,
    UnverifiedWeights,
    error_of_status,
)
from skyrl_async.rollout.sglang_protocol import (
    EventSplitter,
    StreamedReply,
    make_body,
    new_rid,
    parse_version,
    versions_of_spans,
)
from skyrl_async.rollout.sglang_server_info import parse_load, parse_server_info
from skyrl_async.types import FinishReason, Sampling


def body_of(token_ids, sampling=None, **options):
    sampling = sampling or Sampling(max_tokens=4)
    return make_body(token_ids, sampling, rid=new_rid(), vocab_size=10, **options)


def chunk(ids, *, start=0, total=None, reason=None, label="3", spans=None, logprobs=None, **meta):
    """One event of the server that holds tokens ``start..total``."""
    total = start + len(ids) if total is None else total
    logprobs = [-0.5] * len(ids) if logprobs is None else logprobs
    meta = {
        "finish_reason": reason,
        "prompt_tokens": 7,
        "cached_tokens": 2,
        "completion_tokens": total,
        "weight_version": label,
        "output_token_logprobs": [[p, i, None] for p, i in zip(logprobs, ids, strict=True)],
        **meta,
    }
    if spans is not None:
        meta["weight_versions"] = [{"version": v, "start": s, "end": e} for v, s, e in spans]
    return json.dumps({"text": "", "output_ids": ids, "meta_info": meta}).encode()


LENGTH = {"type": "length", "length": 4}


def stream(known_version=3):
    return StreamedReply(known_version=known_version)


def test_a_body_asks_for_every_logprob_and_stops_only_where_it_was_told_to():
    sampling = Sampling(max_tokens=4, temperature=0.5, top_p=0.9, top_k=5, stop_token_ids=(2, 3))
    body = body_of(np.array([1, 9]), sampling, extra_key="4", stream_interval=8)
    assert body["input_ids"] == [1, 9]
    assert body["return_logprob"] is True
    assert body["stream"] is True
    assert body["extra_key"] == "4"
    assert body["sampling_params"] == {
        "max_new_tokens": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "stop_token_ids": [2, 3],
        "ignore_eos": False,
        "stream_interval": 8,
    }
    json.dumps(body)


def test_without_stop_tokens_only_the_length_ends_a_reply():
    params = body_of([1])["sampling_params"]
    assert params["ignore_eos"] is True
    assert params["top_k"] == -1


@pytest.mark.parametrize("token_ids", [[], [10], [-1], [1, 2**40], [0.5], [[1, 2]]])
def test_a_context_that_would_end_the_server_is_not_sent(token_ids):
    with pytest.raises(InvalidRequest) as caught:
        body_of(token_ids)
    assert isinstance(caught.value, ValueError)
    assert not caught.value.retryable


def test_request_ids_have_one_length_so_that_none_is_the_prefix_of_another():
    rids = {new_rid() for _ in range(100)}
    assert len(rids) == 100
    assert {len(rid) for rid in rids} == {32}


@given(st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")), max_size=6), st.data())
def test_events_are_the_same_however_the_bytes_arrive(payloads, data):
    payloads = [b"{" + payload.hex().encode() + b"}" for payload in payloads]
    whole = b"".join(b"data: " + p + b"\n\n" for p in [*payloads, b"[DONE]"])
    splitter, got, at = EventSplitter(), [], 0
    while at < len(whole):
        size = data.draw(st.integers(1, len(whole)))
        got += splitter.feed(whole[at : at + size])
        at += size
    assert got == payloads


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 2**20))
def test_spans_become_a_version_for_every_token(lengths, first):
    spans, expected = [], []
    for index, length in enumerate(lengths):
        start = len(expected)
        version = str(first + index)
        spans.append({"version": version, "start": start, "end": start + length})
        expected += [first + index] * length
    assert versions_of_spans(spans, len(expected)) == expected
    with pytest.raises(BadReply, match="cover"):
        versions_of_spans(spans, len(expected) + 1)


@pytest.mark.parametrize(
    "spans",
    [
        [("3", 0, 2), ("4", 3, 5)],
        [("3", 0, 3), ("4", 2, 5)],
        [("4", 0, 2), ("3", 2, 5)],
        [("3", 1, 5)],
        [("3", 0, 4)],
    ],
)
def test_spans_with_gaps_overlaps_or_decreasing_versions_are_refused(spans):
    values = [{"version": v, "start": s, "end": e} for v, s, e in spans]
    with pytest.raises(BadReply):
        versions_of_spans(values, 5)
    with pytest.raises(BadReply, match="weight_versions"):
        versions_of_spans(None, 5)


@pytest.mark.parametrize(
    "label", ["unverified", "default", "", "-1", "4.0", "٤", None, 4, "9" * 30]
)
def test_a_label_that_is_no_policy_version_is_an_error_of_its_own(label):
    with pytest.raises(UnverifiedWeights) as caught:
        parse_version(label)
    assert caught.value.retryable
    with pytest.raises(UnverifiedWeights):
        versions_of_spans([{"version": label, "start": 0, "end": 1}], 1)


@pytest.mark.parametrize("incremental", [False, True])
def test_chunks_become_one_reply_whether_they_repeat_tokens_or_not(incremental):
    reply = stream()
    reply.feed(chunk([1]))
    reply.feed(chunk([2, 3], start=1) if incremental else chunk([1, 2, 3]))
    assert reply.whole is None
    last = {"reason": LENGTH, "spans": [("3", 0, 1), ("5", 1, 4)]}
    reply.feed(chunk([4], start=3, **last) if incremental else chunk([1, 2, 3, 4], **last))
    assert reply.whole is not None
    assert reply.whole.token_ids == [1, 2, 3, 4]
    assert reply.whole.logprobs == [-0.5] * 4
    assert reply.whole.policy_versions == [3, 5, 5, 5]
    assert reply.whole.finish_reason is FinishReason.LENGTH
    assert (reply.whole.prompt_tokens, reply.whole.cached_tokens) == (7, 2)
    assert reply.reported_version == 5


def test_a_sampled_stop_token_is_part_of_the_reply():
    reply = stream()
    reply.feed(chunk([1, 2], reason={"type": "stop", "matched": 2}, spans=[("3", 0, 2)]))
    assert reply.whole is not None
    assert reply.whole.token_ids == [1, 2]
    assert reply.whole.finish_reason is FinishReason.STOP


def test_an_aborted_request_of_an_incremental_server_repeats_no_token():
    """Such a server sends its last token again, beside the logprobs of all."""
    reply = stream()
    reply.feed(chunk([1, 2]))
    entries = [[-0.5, token_id, None] for token_id in (1, 2, 3)]
    abort = {"type": "abort", "message": "Abort in waiting queue"}
    with pytest.raises(AbortedByServer) as caught:
        reply.feed(
            chunk(
                [3],
                total=3,
                reason=abort,
                spans=[("3", 0, 3)],
                output_token_logprobs=entries,
            )
        )
    assert caught.value.partial is not None
    assert caught.value.partial.token_ids == [1, 2, 3]


def test_of_a_broken_stream_tokens_count_until_the_reported_version_changes():
    reply = stream()
    reply.feed(chunk([1, 2], label="3"))
    reply.feed(chunk([1, 2, 3], label="4"))
    reply.feed(chunk([1, 2, 3, 4, 5], label="4"))
    partial = reply.certain()
    assert partial.token_ids == [1, 2]
    assert partial.policy_versions == [3, 3]
    assert partial.finish_reason is FinishReason.ABORT
    assert reply.reported_version == 4


def test_of_a_broken_stream_nothing_counts_that_began_with_an_unexpected_version():
    reply = stream(known_version=2)
    reply.feed(chunk([1, 2], label="3"))
    assert reply.certain().token_ids == []


@pytest.mark.parametrize("logprob", [None, float("nan"), float("-inf")])
def test_a_sampled_token_without_a_finite_logprob_is_an_error(logprob):
    reply = stream()
    reply.feed(chunk([1]))
    with pytest.raises(NonfiniteLogprob, match="NaN") as caught:
        reply.feed(chunk([1, 2], logprobs=[-0.5, logprob]))
    assert not caught.value.retryable
    assert caught.value.partial is not None
    assert caught.value.partial.token_ids == [1]


def test_a_server_that_stops_because_of_nan_is_not_believed():
    with pytest.raises(NonfiniteLogprob, match="NaN happened"):
        stream().feed(
            chunk([1], reason={"type": "stop", "matched": "NaN happened"}, spans=[("3", 0, 1)])
        )


@pytest.mark.parametrize(
    "payload",
    [
        b"{",
        b"[]",
        b"{}",
        chunk([1, 2], total=5),
        chunk([1], reason={"type": "meditating"}, spans=[("3", 0, 1)]),
        chunk([1], reason=LENGTH),
        chunk([1], output_token_logprobs=[]),
        chunk([1], output_token_logprobs=[[-0.5, 2, None]]),
    ],
)
def test_a_reply_that_is_not_one_of_sglang_is_refused(payload):
    with pytest.raises(BadReply):
        stream().feed(payload)


@pytest.mark.parametrize(
    ("status", "kind", "retryable"),
    [
        (400, InvalidRequest, False),
        (404, InvalidRequest, False),
        (401, AccessRefused, True),
        (429, EngineUnavailable, True),
        (500, EngineUnavailable, True),
        (503, EngineUnavailable, True),
    ],
)
def test_a_status_says_whether_another_engine_may_help(status, kind, retryable):
    error = error_of_status(status, "why")
    assert type(error) is kind
    assert error.retryable is retryable
    assert str(status) in str(error)
    abort = {"type": "abort", "message": "why", "status_code": status}
    with pytest.raises(kind) as caught:
        stream().feed(chunk([1], reason=abort, spans=[("3", 0, 1)]))
    assert caught.value.partial is not None
    assert caught.value.partial.token_ids == [1]


def test_an_error_inside_a_stream_is_raised():
    payload = json.dumps({"error": {"message": "too long", "code": 400}}).encode()
    with pytest.raises(InvalidRequest, match="too long"):
        stream().feed(payload)


def test_every_error_tells_callers_of_engines_what_they_expect():
    for kind in EngineError.__subclasses__():
        assert issubclass(kind, ValueError if kind is InvalidRequest else RuntimeError)


@pytest.mark.parametrize("version", ["0.5.21", "0.5.21.post1", "0.5.23", "0.6.0rc1", "1.0"])
def test_recent_servers_are_accepted(version):
    info = parse_server_info({"version": version, "incremental_streaming_output": True})
    assert info.version == version
    assert info.incremental


@pytest.mark.parametrize("version", ["0.5.20", "0.4.30", "dev", "", None])
def test_old_servers_are_refused(version):
    with pytest.raises(UnsupportedServer, match=r"0\.5\.21"):
        parse_server_info({"version": version})


def test_load_is_summed_over_ranks():
    ranks = [
        {"num_running_reqs": 3, "num_waiting_reqs": 1, "token_usage": 0.25},
        {"num_running_reqs": 4, "num_waiting_reqs": 0, "token_usage": 0.5},
    ]
    load = parse_load({"loads": ranks})
    assert (load.running, load.waiting, load.kv_usage) == (7, 1, 0.5)
    with pytest.raises(BadReply):
        parse_load({"loads": [{}]})
