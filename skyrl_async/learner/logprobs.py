"""Log-probabilities of the loss tokens under the policy, computed at those tokens only.

Shapes: ``L`` loss tokens, ``V`` vocabulary, ``H`` width of the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skyrl_async.learner.packing import Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutputs:
    """What a forward pass says about each loss token.

    Attributes:
        logprobs: ``[L]``, of ``softmax(logits / temperature)``.
        entropy: ``[L]``, of the same; with gradient too.
        hidden: ``[L, H]``, the last hidden state before each loss token.
    """

    logprobs: Tensor
    entropy: Tensor
    hidden: Tensor


def hidden_states(decoder: Any, microbatch: Microbatch) -> Tensor:
    """Return ``[L, H]``: the last hidden state of ``decoder`` before each loss token."""
    hidden = decoder(
        input_ids=microbatch.token_ids,
        position_ids=microbatch.position_ids,
        attention_mask=microbatch.attention_mask(),
        use_cache=False,
    ).last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, microbatch.source)


def token_outputs(model: Any, microbatch: Microbatch) -> TokenOutputs:
    """Run the policy on a microbatch.

    The language-model head runs on the ``L`` positions that predict a loss token, not on prompts.
    Logprobs and entropy are computed in float32 at least.

    Args:
        model: a ``transformers`` causal LM with an output embedding.
        microbatch: packed sequences.
    """
    hidden = hidden_states(model.get_decoder(), microbatch)
    logits = model.get_output_embeddings()(hidden)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    all_logprobs = torch.log_softmax(logits / microbatch.temperature.unsqueeze(-1), dim=-1)
    return TokenOutputs(
        logprobs=all_logprobs.gather(-1, microbatch.targets.unsqueeze(-1)).squeeze(-1),
        entropy=-(all_logprobs.exp() * all_logprobs).sum(-1),
        hidden=hidden,
    )


def token_logprobs(model: Any, microbatch: Microbatch) -> Tensor:
    """Return ``[L]``: the logprobs of :func:`token_outputs`."""
    return token_outputs(model, microbatch).logprobs
