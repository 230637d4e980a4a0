from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skyrl_async.learner import attention
from skyrl_async.learner.attention import packed_attention, resolve_attention, use_attention
from skyrl_async.learner.segments import SHORT_TOKENS, SegmentGeometry
from skyrl_async.learner.tiny_policy import build_tiny_model

F64 = torch.float64
BF16 = torch.bfloat16
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@given(LENGTHS)
def test_buckets_hold_every_token_once_and_little_padding(lengths):
    geometry = SegmentGeometry.of(lengths)
    laid_out = torch.cat([b.index.reshape(-1) for b in geometry.buckets])
    assert laid_out[geometry.inverse].tolist() == list(range(sum(lengths)))
    assert geometry.lengths() == lengths
    assert geometry.cu_seqlens.dtype == torch.int32
    assert geometry.max_segment == max(lengths)
    for bucket in geometry.buckets:
        sizes = [len(set(row.tolist())) for row in bucket.index]
        longest = bucket.num_tokens
        assert max(sizes) == longest
        assert longest <= SHORT_TOKENS or min(sizes) >= 0.8 * longest


def test_many_short_sequences_are_one_call():
    geometry = SegmentGeometry.of([1 + i % SHORT_TOKENS for i in range(500)])
    assert [b.index.shape for b in geometry.buckets] == [(500, SHORT_TOKENS)]


def test_the_longest_rows_take_few_calls():
    lengths = torch.logspace(0, 15, 4000, base=2).int().tolist()
    assert max(lengths) == 2**15
    assert len(SegmentGeometry.of(lengths).buckets) <= 32


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_empty_segments_are_refused(lengths):
    with pytest.raises(ValueError, match="at least one of at least one token"):
        SegmentGeometry.of(lengths)


def literal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    *,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """softmax(q k^T scaling) v, for each pair of tokens of one segment."""
    segment = torch.repeat_interleave(torch.tensor(lengths))
    place = torch.arange(len(segment))
    age = place[:, None] - place
    sees = (segment[:, None] == segment) & (age >= 0)
    if window is not None:
        sees &= age < window
    heads = []
    for a in range(q.shape[1]):
        g = a // (q.shape[1] // k.shape[1])
        logits = q[0, a] @ k[0, g].T * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        heads.append(logits.masked_fill(~sees, -torch.inf).softmax(-1) @ v[0, g])
    return torch.stack(heads, dim=1)[None]


def tensors(heads: int, kv_heads: int, length: int, *, width: int = 4) -> list[Tensor]:
    make = torch.Generator().manual_seed(length)
    return [
        torch.randn(1, n, length, width, dtype=F64, generator=make).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


@settings(deadline=None, max_examples=40)
@given(
    LENGTHS,
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.sampled_from([None, 0.7]),
    st.sampled_from([None, 1, 3, 16, 200]),
)
def test_flat_rows_are_attention_within_each_segment(lengths, heads, softcap, window):
    qkv = tensors(*heads, sum(lengths))
    rules = {"softcap": softcap, "scaling": 0.3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_MIN_WINDOW_BLOCK", 8)
        got, weights = packed_attention(
            torch.nn.Identity(),
            *qkv,
            None,
            kind="sdpa",
            geometry=SegmentGeometry.of(lengths),
            sliding_window=window,
            **rules,
        )
    wanted = literal(*qkv, lengths, window=window, **rules)
    assert weights is None
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    share = torch.cos(torch.arange(got.numel(), dtype=F64)).view_as(got)
    gradients = (torch.autograd.grad((x * share).sum(), qkv) for x in (got, wanted))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_scaling_is_the_usual_one_unless_the_model_has_its_own():
    qkv = tensors(2, 2, 9, width=16)
    got, _ = packed_attention(
        torch.nn.Identity(), *qkv, None, kind="sdpa", geometry=SegmentGeometry.of([9])
    )
    wanted = literal(*qkv, [9], scaling=0.25, softcap=None, window=None)
    torch.testing.assert_close(got, wanted)


def test_dropout_is_refused_in_packed_rows():
    with pytest.raises(ValueError, match=r"attention dropout 0\.1 of the model"):
        packed_attention(
            torch.nn.Identity(),
            *tensors(2, 2, 3),
            None,
            kind="sdpa",
            geometry=SegmentGeometry.of([3]),
            dropout=0.1,
        )


def test_on_a_cpu_there_is_only_sdpa():
    assert resolve_attention("auto", device="cpu", dtype=torch.float32) == "sdpa"
    assert resolve_attention("sdpa", device="cpu", dtype=BF16) == "sdpa"
    for kind in ("flash", "varlen"):
        with pytest.raises(ValueError, match=rf"attention={kind}: it needs a CUDA device.*use lea"):
            resolve_attention(kind, device="cpu", dtype=BF16)


def test_what_a_gpu_cannot_do_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"needs bfloat16 or float16, and .* in torch\.float32"):
        resolve_attention("varlen", device="cuda", dtype=torch.float32)
    with pytest.raises(ValueError, match="cannot cap attention logits"):
        resolve_attention("varlen", device="cuda", dtype=BF16, softcap=True)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"flash-attn is not installed; use .*=auto"):
        resolve_attention("flash", device="cuda", dtype=BF16)


def test_on_a_gpu_the_order_is_flash_varlen_sdpa(monkeypatch):
    found: list[str] = ["flash_attn"]
    monkeypatch.setattr(
        attention.importlib.util, "find_spec", lambda name: name if name in found else None
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    assert resolve_attention("auto", device="cuda", dtype=BF16) == "flash"
    found.clear()
    assert resolve_attention("auto", device="cuda", dtype=BF16) == "varlen"
    assert resolve_attention("auto", device="cuda", dtype=BF16, softcap=True) == "sdpa"
    capability[0] = (7, 5)
    assert resolve_attention("auto", device="cuda", dtype=BF16) == "sdpa"


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="attention=eager: must be auto, flash, varlen, sdpa"):
        resolve_attention("eager", device="cpu", dtype=BF16)


def test_a_varlen_function_without_what_is_needed_is_an_obstacle(monkeypatch):
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, scale: None)
    with pytest.raises(ValueError, match=r"varlen_attn of .* lacks enable_gqa, window_size"):
        resolve_attention("varlen", device="cuda", dtype=BF16)


def test_calls_without_packed_rows_stay_what_they_are():
    model = build_tiny_model(hidden_size=16, num_heads=2)
    ids = torch.randint(60, (3, 9), generator=torch.Generator().manual_seed(0))
    padding = torch.ones_like(ids)
    padding[1, :4] = 0
    calls = [{"input_ids": ids}, {"input_ids": ids, "attention_mask": padding}]
    with torch.no_grad():
        before = [model(**call).logits for call in calls]
        generated = model.generate(ids, attention_mask=padding, max_new_tokens=5, do_sample=False)
        use_attention(model, "sdpa")
        after = [model(**call).logits for call in calls]
        again = model.generate(ids, attention_mask=padding, max_new_tokens=5, do_sample=False)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(generated, again)


def test_models_whose_layers_would_mix_sequences_are_refused():
    from transformers import BloomConfig, BloomForCausalLM, GptOssConfig, GptOssForCausalLM

    config = SimpleNamespace(layer_types=["linear_attention", "full_attention"], model_type="x")
    config.get_text_config = lambda: config
    with pytest.raises(ValueError, match="model type x has layers of linear_attention"):
        use_attention(SimpleNamespace(config=config), "sdpa")
    small = {
        "vocab_size": 8,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
    with pytest.raises(ValueError, match="model type gpt_oss has attention sinks"):
        use_attention(GptOssForCausalLM(GptOssConfig(**small)), "sdpa")
    bloom = BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="bloom does not let its attention be exchanged"):
        use_attention(bloom, "sdpa")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", ["flash", "varlen"])
@pytest.mark.parametrize("window", [None, 64])
def test_kernels_for_segments_agree_with_sdpa(kind, window):
    try:
        resolve_attention(kind, device="cuda", dtype=BF16)
    except ValueError as error:
        pytest.skip(str(error))
    lengths = [3, 700, 64, 1, 300]
    geometry = SegmentGeometry.of(lengths).to("cuda")
    qkv = [x.detach().to("cuda", BF16) for x in tensors(8, 2, sum(lengths), width=64)]
    results = []
    for name, dtype in ((kind, BF16), ("sdpa", torch.float32)):
        inputs = [x.to(dtype).requires_grad_() for x in qkv]
        out, _ = packed_attention(
            torch.nn.Identity(),
            *inputs,
            None,
            kind=name,
            geometry=geometry,
            sliding_window=window,
        )
        results.append([out, *torch.autograd.grad(out.float().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=2e-2)
