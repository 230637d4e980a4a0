"""What a run that publishes adapters alone must agree on: learner, workers and servers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skyrl_async.config import Config
from skyrl_async.rollout.engine_launch import ServedAdapters

if TYPE_CHECKING:
    from skyrl_async.weight_sync.layout import WeightLayout
    from skyrl_async.weight_sync.sglang_adapters import AdapterLoader
    from skyrl_async.weight_sync.sglang_control import SglangControl


def publishes_adapters(config: Config) -> bool:
    """Return whether adapters are published, and not whole weights."""
    return config.lora.rank > 0 and config.lora.publish == "adapter"


def adapter_layout(config: Config) -> WeightLayout:
    """Return names, types and shapes of what is published."""
    from skyrl_async.learner.lora import adapter_parameters, add_adapter
    from skyrl_async.learner.policy import skeleton
    from skyrl_async.runtime.settings import lora_settings, policy_source
    from skyrl_async.weight_sync.layout import WeightLayout

    model: Any = skeleton(policy_source(config))
    lora = lora_settings(config)
    assert lora is not None, "there is nothing to publish without adapters"
    return WeightLayout.of(adapter_parameters(add_adapter(model, lora)))


def served_adapters(config: Config) -> ServedAdapters | None:
    """Return what a server is told about adapters at its start; None if it gets whole weights."""
    if not publishes_adapters(config):
        return None
    from skyrl_async.weight_sync.sglang_adapters import LOADED_AT_ONCE

    names = adapter_layout(config).names
    modules = {name.rsplit(".", 3)[1] for name in names}
    return ServedAdapters(
        rank=config.lora.rank,
        target_modules=tuple(sorted(modules)),
        # One more while the next is loaded, and the weights without any, for probes.
        num_slots=LOADED_AT_ONCE[config.engine.kv_after_swap] + 2,
    )


def adapter_loader(config: Config, control: SglangControl) -> AdapterLoader:
    """Return what loads adapters into the server of ``control``."""
    from skyrl_async.rollout.sglang_protocol import adapter_name, adapter_version
    from skyrl_async.weight_sync.sglang_adapters import AdapterLoader, AdapterSettings

    return AdapterLoader(
        control,
        settings=AdapterSettings(rank=config.lora.rank, alpha=config.lora.alpha),
        kv_after_swap=config.engine.kv_after_swap,
        name_of=adapter_name,
        is_ours=lambda name: adapter_version(name) is not None,
    )
