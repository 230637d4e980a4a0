"""Ranks that share a flat row compute what one rank computes."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from skyrl_async.learner.attention import packed_attention, use_attention
from skyrl_async.learner.microbatch import empty_microbatch
from skyrl_async.learner.packing import pack
from skyrl_async.learner.segments import SegmentGeometry
from skyrl_async.learner.sequence_parallel import gather_tokens
from skyrl_async.learner.tiny_policy import build_tiny_model
from tests.learner.rank_processes import run_ranks
from tests.learner.test_packing import sequences_of

F64 = torch.float64
LENGTHS = [5, 1, 40, 7, 19]  # 72 tokens, for 2 and 4 ranks; segments lie across their borders
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def attend(qkv: list[Tensor], group: Any = None) -> Tensor:
    return packed_attention(
        torch.nn.Identity(),
        *qkv,
        None,
        kind="sdpa",
        geometry=SegmentGeometry.of(LENGTHS),
        sequence_group=group,
        sliding_window=17,
    )[0]


def check_attention(heads: int, kv_heads: int, group: Any) -> None:
    """Compare outputs and gradients of this rank's slice with those of all tokens at once."""
    make = torch.Generator().manual_seed(0)
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    whole = [
        torch.randn(1, n, sum(LENGTHS), 4, dtype=F64, generator=make).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]
    own = slice(rank * 72 // num_ranks, (rank + 1) * 72 // num_ranks)
    slices = [x.detach()[:, :, own].clone().requires_grad_() for x in whole]
    wanted, got = attend(whole), attend(slices, group)
    close(got, wanted[:, own])
    share = torch.cos(torch.arange(wanted.numel(), dtype=F64)).view_as(wanted)
    wanted_gradients = torch.autograd.grad((wanted * share).sum(), whole)
    gradients = torch.autograd.grad((got * share[:, own]).sum(), slices)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        close(a, b[:, :, own])


def check_policy(group: Any) -> None:
    """Compare logprobs and gradients of a policy; the padded row has 4 tokens more than 69."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    model = build_tiny_model(hidden_size=32, num_heads=4).double()
    use_attention(model, "sdpa")
    words = list(range(1, 50))
    members = sequences_of((words[:9], words[9:14]), (words[:3], words[3:44]), ([1], words[:13]))
    (microbatch,) = pack(members, tokens_per_microbatch=128, layout="flat", dtype=F64)
    assert microbatch.token_ids.shape == (1, 69)
    head = model.get_output_embeddings()

    def logprobs(part: Any, sequence_group: Any = None) -> Tensor:
        inputs = part.decoder_inputs(sequence_group=sequence_group)
        hidden = model.get_decoder()(**inputs).last_hidden_state[0, part.source]
        return head(hidden).log_softmax(-1).gather(1, part.targets[:, None])[:, 0]

    parameters = list(model.parameters())
    wanted = logprobs(microbatch)
    wanted_gradients = torch.autograd.grad((wanted * microbatch.index.cos()).sum(), parameters)
    part = microbatch.slice_for_rank(rank, num_ranks)
    got = logprobs(part, group)
    position = {int(i): n for n, i in enumerate(microbatch.index)}
    close(got, wanted[[position[int(i)] for i in part.index]])
    gradients = torch.autograd.grad((got * part.index.cos()).sum(), parameters)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        dist.all_reduce(a, group=group)
        close(a, b)


def check_nothing_to_do(group: Any) -> None:
    """A microbatch without loss tokens takes part in all exchanges, and has zero gradients."""
    model = build_tiny_model(hidden_size=32, num_heads=4).double()
    use_attention(model, "sdpa")
    part = empty_microbatch(dtype=F64, layout="flat").slice_for_rank(
        dist.get_rank(group), dist.get_world_size(group)
    )
    assert part.token_ids.shape == (1, 1) and part.num_loss_tokens == 0
    inputs = part.decoder_inputs(sequence_group=group)
    hidden = model.get_decoder()(**inputs).last_hidden_state
    hidden[0, part.source].sum().backward()
    assert all(not p.grad.any() for p in model.get_decoder().parameters())


def check_rank() -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for group in (pairs[dist.get_rank() // 2], dist.group.WORLD):
        for heads, kv_heads in ((4, 4), (4, 2), (8, 1), (12, 6)):
            check_attention(heads, kv_heads, group)
        check_policy(group)
        check_nothing_to_do(group)
        with pytest.raises(ValueError, match="ranks of a sequence cannot share 3 query heads even"):
            gather_tokens(*(torch.zeros(5, 3, 4) for _ in range(3)), group=group)


def test_outputs_and_gradients_with_2_and_4_ranks_are_those_of_one(free_port):
    run_ranks(check_rank, num_ranks=4, port=free_port)
