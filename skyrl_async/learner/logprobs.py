"""The policy as the learner runs it: from packed tokens to what is known of the loss tokens.

Shapes: ``L`` loss tokens, ``V`` vocabulary, ``H`` width of the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from skyrl_async.learner.chunked_head import head_outputs
from skyrl_async.learner.packing import Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutputs:
    """What a forward pass says about each loss token.

    Attributes:
        logprobs: ``[L]``, of ``softmax(logits / temperature)``.
        entropy: ``[L]``, of the same; with gradient too.
    """

    logprobs: Tensor
    entropy: Tensor


class PolicyModule(nn.Module):
    """A causal LM whose one forward pass goes from packed tokens to their logprobs.

    The language-model head runs on the ``L`` positions that predict a loss token, not on prompts,
    and its logits exist only chunk by chunk. Decoder and head are one module because sharded
    weights are gathered where a module's forward pass begins.

    The ranks of a sequence group each run a slice of the tokens, and get the logprobs of all; the
    gradient goes to those of the own slice.

    Args:
        model: a ``transformers`` causal LM with an output embedding, which :func:`use_attention`
            was told of.
        float32_head: multiply in float32 in the head, whatever the type of the weights.
        sequence_group: process group whose ranks share the tokens of a microbatch.
    """

    def __init__(
        self, model: Any, *, float32_head: bool = False, sequence_group: Any | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self._float32_head = float32_head
        self._sequence_group = sequence_group
        config = model.config.get_text_config()
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)

    def forward(
        self, microbatch: Microbatch, *, with_head: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logprobs ``[L]``, entropy ``[L]`` and hidden states ``[L, H]``.

        Without the head, logprobs and entropy are empty. Of a slice there are its hidden states
        only.
        """
        if self._sequence_group is not None:
            return self._share(microbatch, self._sequence_group)
        hidden = hidden_states(self.model.get_decoder(), microbatch)
        if not with_head:
            return hidden.new_empty(0), hidden.new_empty(0), hidden
        return *self._head(hidden, microbatch), hidden

    def _head(self, hidden: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
        head = self.model.get_output_embeddings()
        logprobs, entropy = head_outputs(
            hidden,
            head.weight,
            microbatch.targets,
            microbatch.temperature,
            bias=head.bias,
            softcap=self._softcap,
            float32=self._float32_head,
        )
        # Views would confuse FSDP, which hooks what a module returns.
        return logprobs.clone(), entropy.clone()

    def _share(self, microbatch: Microbatch, group: Any) -> tuple[Tensor, Tensor, Tensor]:
        rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        part = microbatch.slice_for_rank(rank, num_ranks)
        hidden = hidden_states(self.model.get_decoder(), part, sequence_group=group)
        size = part.token_ids.shape[1]
        place = (microbatch.source // size == rank).nonzero().squeeze(-1)
        logprobs, entropy = (
            _assemble(own, place, microbatch.num_loss_tokens, group=group)
            for own in self._head(hidden, part)
        )
        return logprobs, entropy, hidden


def _assemble(own: Tensor, place: Tensor, length: int, *, group: Any) -> Tensor:
    """Return ``[length]``: the values of all ranks; ``own`` at ``place`` have gradients."""
    others = own.new_zeros(length).index_put((place,), own.detach())
    dist.all_reduce(others, group=group)
    return others.index_put((place,), own)


def hidden_states(
    decoder: Any, microbatch: Microbatch, *, sequence_group: Any | None = None
) -> Tensor:
    """Return ``[L, H]``: the last hidden state of ``decoder`` before each loss token."""
    inputs = microbatch.decoder_inputs(sequence_group=sequence_group)
    hidden = decoder(**inputs).last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, microbatch.source)


def token_outputs(policy: Any, microbatch: Microbatch) -> TokenOutputs:
    """Run the policy on a microbatch.

    Args:
        policy: a :class:`PolicyModule`, or a causal LM to make one of.
        microbatch: packed sequences.
    """
    module = policy if isinstance(policy, PolicyModule) else PolicyModule(policy)
    logprobs, entropy, _ = module(microbatch)
    return TokenOutputs(logprobs=logprobs, entropy=entropy)


def token_logprobs(policy: Any, microbatch: Microbatch) -> Tensor:
    """Return ``[L]``: the logprobs of :func:`token_outputs`."""
    return token_outputs(policy, microbatch).logprobs


def token_hidden(policy: PolicyModule, microbatch: Microbatch) -> Tensor:
    """Return ``[L, H]``: the policy's last hidden state before each loss token."""
    return policy(microbatch, with_head=False)[2]
