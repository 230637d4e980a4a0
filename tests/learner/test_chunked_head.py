import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from skyrl_async.learner import chunked_head
from skyrl_async.learner.chunked_head import head_outputs
from skyrl_async.learner.tiny_policy import build_tiny_model
from tests.learner.rank_processes import run_ranks

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def plain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logp = torch.log_softmax(z / temperature[:, None], -1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1)


class Case:
    """Random inputs; ``L``, ``V`` and ``H`` share no factor with the sizes of tiles."""

    def __init__(self, dtype: torch.dtype, *, length: int = 37, words: int = 101) -> None:
        make = torch.Generator().manual_seed(length)
        self.hidden = torch.randn(length, 16, generator=make, dtype=F64).to(dtype)
        self.weight = torch.randn(words, 16, generator=make, dtype=F64).to(dtype)
        self.bias = torch.randn(words, generator=make, dtype=F64).to(dtype)
        self.targets = torch.randint(words, (length,), generator=make)
        self.temperature = (torch.rand(length, generator=make, dtype=F64) + 0.5).to(dtype)
        self.shares = torch.randn(2, length, generator=make, dtype=F64)

    def results(self, function, dtype: torch.dtype, **options) -> list[Tensor]:
        """Return both outputs and the three gradients of a weighted sum of them."""
        leaves = [x.to(dtype).requires_grad_() for x in (self.hidden, self.weight, self.bias)]
        hidden, weight, bias = leaves
        temperature = self.temperature.to(dtype)
        outputs = function(hidden, weight, self.targets, temperature, bias=bias, **options)
        loss = sum((x.double() * s).sum() for x, s in zip(outputs, self.shares, strict=True))
        return [*outputs, *torch.autograd.grad(loss, leaves)]


@pytest.fixture(params=[1, 7, 64, None])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Tokens of a tile; small tiles have 13 words, so that there are many of them."""
    if request.param is not None:
        monkeypatch.setattr(chunked_head, "TILE_BYTES", 13 * request.param * 8)
    return request.param


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (F32, 1e-5)])
def test_outputs_and_gradients_are_those_of_the_whole_matrix_of_logits(
    tiles, dtype, tolerance, softcap
):
    case = Case(dtype)
    got = case.results(head_outputs, dtype, softcap=softcap, chunk_tokens=tiles)
    wanted = case.results(plain, F64, softcap=softcap)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_numerical_gradients(monkeypatch):
    monkeypatch.setattr(chunked_head, "TILE_BYTES", 3 * 2 * 8)
    case = Case(F64, length=5, words=7)
    leaves = [x.requires_grad_() for x in (case.hidden, case.weight, case.bias)]

    def function(hidden, weight, bias):
        return head_outputs(
            hidden,
            weight,
            case.targets,
            case.temperature,
            bias=bias,
            softcap=3.0,
            chunk_tokens=2,
        )

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("which", [0, 1])
def test_either_output_has_its_gradient_alone(which):
    case = Case(F64)
    case.shares[1 - which] = 0

    def one(*args, **options):
        outputs = head_outputs(*args, **options)
        return [x if i == which else x.detach() for i, x in enumerate(outputs)]

    for a, b in zip(case.results(one, F64), case.results(plain, F64), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_only_what_needs_a_gradient_gets_one():
    case = Case(F64)
    hidden = case.hidden.requires_grad_()
    logprobs, _ = head_outputs(hidden, case.weight, case.targets, case.temperature)
    wanted, _ = plain(hidden, case.weight, case.targets, case.temperature)
    torch.testing.assert_close(
        torch.autograd.grad(logprobs.sum(), hidden), torch.autograd.grad(wanted.sum(), hidden)
    )
    assert case.weight.grad is None
    with torch.no_grad():
        outputs = head_outputs(hidden, case.weight, case.targets, case.temperature)
    assert not any(x.requires_grad for x in outputs)


def test_bfloat16_inputs_with_float32_products_lose_only_the_rounding_of_the_results():
    """The inputs are what they are; logits, logprobs and sums are not rounded to 8 bits again."""
    case = Case(BF16, length=300)
    got = case.results(head_outputs, BF16)
    wanted = case.results(plain, F64)
    assert got[0].dtype == got[1].dtype == F32
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].double(), wanted[1], rtol=1e-5, atol=1e-5)
    for a, b in zip(got[2:], wanted[2:], strict=True):
        assert a.dtype == BF16
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=1e-5)


def test_without_float32_the_logits_are_those_of_a_bfloat16_linear_layer():
    case = Case(BF16)
    logprobs, _ = head_outputs(
        case.hidden, case.weight, case.targets, case.temperature, float32=False
    )
    logits = nn.functional.linear(case.hidden, case.weight).float()
    logp = (logits / case.temperature.float()[:, None]).log_softmax(-1)
    torch.testing.assert_close(logprobs, logp.gather(1, case.targets[:, None])[:, 0])
    exact, _ = plain(
        *(x.double() for x in (case.hidden, case.weight)), case.targets, torch.ones(37)
    )
    assert logprobs.dtype == F32 and (logprobs - exact).abs().max() > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_bfloat16_products_come_out_in_float32():
    case = Case(BF16, length=300)
    case.targets, case.shares = case.targets.cuda(), case.shares.cuda()
    for name in ("hidden", "weight", "bias", "temperature"):
        setattr(case, name, getattr(case, name).cuda())
    got, wanted = case.results(head_outputs, BF16), case.results(plain, F64)
    for a, b in zip(got[:2], wanted[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    for a, b in zip(got[2:], wanted[2:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2**-6, atol=2**-6)


def test_autocast_does_not_round_the_logits():
    case = Case(F32)
    args = (case.hidden, case.weight, case.targets, case.temperature)
    with torch.autocast("cpu", dtype=BF16):
        inside, _ = head_outputs(*args)
    assert torch.equal(inside, head_outputs(*args)[0])


def test_large_logits_neither_overflow_nor_cancel():
    case = Case(F32)
    case.hidden *= 100
    logprobs, entropy = head_outputs(case.hidden, case.weight, case.targets, case.temperature)
    wanted = plain(case.hidden.double(), case.weight.double(), case.targets, case.temperature)
    assert wanted[0].min() < -1000
    torch.testing.assert_close(logprobs.double(), wanted[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(entropy.double(), wanted[1], rtol=1e-4, atol=1e-5)


def test_no_tokens_give_empty_outputs_and_zero_gradients():
    case = Case(F32, length=0)
    logprobs, entropy, *gradients = case.results(head_outputs, F32)
    assert logprobs.shape == entropy.shape == (0,)
    assert [g.shape for g in gradients] == [(0, 16), (101, 16), (101,)]
    assert not gradients[1].any() and not gradients[2].any()


def test_a_target_outside_the_vocabulary_is_not_a_number():
    case = Case(F32)
    case.targets[3] = 101
    logprobs, _ = head_outputs(case.hidden, case.weight, case.targets, case.temperature)
    assert logprobs.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(37, 15)}, r"hidden \(37, 15\) and weight \(101, 16\)"),
        ({"targets": torch.zeros(36, dtype=torch.int64)}, r"targets must have shape \(37,\)"),
        ({"temperature": torch.ones(())}, r"temperature must have shape \(37,\), got \(\)"),
        ({"bias": torch.ones(37)}, r"bias must have shape \(101,\)"),
        ({"softcap": 0.0}, "softcap must be > 0, got 0.0"),
        ({"chunk_tokens": 0}, "chunk_tokens must be >= 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = Case(F32)
    names = ("hidden", "weight", "targets", "temperature")
    arguments = {name: getattr(case, name) for name in names}
    with pytest.raises(ValueError, match=message):
        head_outputs(**{**arguments, **change})


class _Policy(nn.Module):
    """Decoder and head in one module, as the learner has them."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = build_tiny_model(hidden_size=16, num_heads=2)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.lm.get_decoder()(input_ids=ids).last_hidden_state[0]
        ones = torch.ones(len(hidden) - 1)
        return head_outputs(hidden[:-1], self.lm.lm_head.weight, ids[0, 1:], ones)


def _loss(policy: nn.Module, rank: int) -> Tensor:
    ids = torch.arange(10 * rank, 10 * rank + 12)[None] % 60
    logprobs, entropy = policy(ids)
    return logprobs.sum() + 0.5 * entropy.sum()


def _check_sharded() -> None:
    rank = dist.get_rank()
    whole, sharded = _Policy(), _Policy()
    for layer in sharded.lm.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    with pytest.raises(ValueError, match=r"the head's weight is a shard.*Shard\(dim=0\)"):
        head_outputs(
            torch.zeros(1, 16),
            sharded.lm.lm_head.weight,
            torch.zeros(1, dtype=torch.int64),
            torch.ones(1),
        )
    _loss(sharded, rank).backward()
    (sum(_loss(whole, r) for r in range(2)) / 2).backward()
    for (name, a), (_, b) in zip(sharded.named_parameters(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(
            a.grad.full_tensor(), b.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_weight_may_be_one_that_fsdp_gathers_for_the_forward_pass(free_port):
    run_ranks(_check_sharded, num_ranks=2, port=free_port)
