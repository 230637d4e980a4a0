"""Log-probabilities of the loss tokens under the policy, computed at those tokens only.

Shapes: ``L`` loss tokens, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skyrl_async.learner.packing import Microbatch


def token_logprobs(model: Any, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
    """Return ``(logprobs [L], entropy [L])`` of ``softmax(logits / temperature)``.

    The language-model head runs on the ``L`` positions that predict a loss token, not on prompts.
    Both are computed in float32 at least. The entropy has gradient too.

    Args:
        model: a ``transformers`` causal LM with an output embedding.
        microbatch: packed sequences.
    """
    hidden = model.get_decoder()(
        input_ids=microbatch.token_ids,
        position_ids=microbatch.position_ids,
        attention_mask=microbatch.attention_mask(),
        use_cache=False,
    ).last_hidden_state
    selected = hidden.reshape(-1, hidden.shape[-1]).index_select(0, microbatch.source)
    logits = model.get_output_embeddings()(selected)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    all_logprobs = torch.log_softmax(logits / microbatch.temperature.unsqueeze(-1), dim=-1)
    logprobs = all_logprobs.gather(-1, microbatch.targets.unsqueeze(-1)).squeeze(-1)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return logprobs, entropy
