"""From a checkpoint to a policy in Hugging Face format, in one process, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from skyrl_async.checkpoint import CONFIG, LEARNER
from skyrl_async.config_loading import load_config
from skyrl_async.resume import find_checkpoint


def export_policy(
    source: Path, folder: Path, *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Path:
    """Write the policy of a checkpoint into ``folder``; return the checkpoint's folder.

    The weights may have been written by any number of ranks. What was not trained, the
    configuration and the tokenizer come from the ``model.path`` of the run. Adapters are merged,
    and written by themselves too, into ``folder/adapter``.

    Args:
        source: a checkpoint, or a run, whose newest whole checkpoint is taken.
        folder: does not exist yet.
        dtype: of the weights written.

    Raises:
        ValueError: if there is no whole checkpoint, the folder exists, or the model of the run
            cannot be loaded any more.
        OSError: if something cannot be read or written.
    """
    if folder.exists():
        raise ValueError(f"{folder}: exists; give a folder that does not")
    checkpoint = find_checkpoint(source)
    import torch

    from skyrl_async.learner.logprobs import PolicyModule
    from skyrl_async.learner.lora import add_adapter, save_adapter
    from skyrl_async.learner.policy import load_model, load_tokenizer, save_policy
    from skyrl_async.learner.training_state import load_policy_weights
    from skyrl_async.runtime.settings import lora_settings, policy_source

    config = load_config(checkpoint / CONFIG)
    model_source = policy_source(config)
    model: Any = load_model(replace(model_source, dtype="float32"))
    lora = lora_settings(config)
    if lora is not None:
        add_adapter(model, lora)
    load_policy_weights(PolicyModule(model), checkpoint / LEARNER)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        whole = (_merged(model) if lora is not None else model).to(getattr(torch, dtype))
    save_policy(whole, load_tokenizer(model_source), folder)
    if lora is not None:
        save_adapter(model, folder / "adapter")
    return checkpoint


def _merged(model: Any) -> Any:
    from skyrl_async.learner.lora import merged_parameters, plain_model
    from skyrl_async.learner.lora_merge import MergedWeight

    weights = {
        name: weight.tensor() if isinstance(weight, MergedWeight) else weight.detach().clone()
        for name, weight in merged_parameters(model)
    }
    return plain_model(model, weights)
