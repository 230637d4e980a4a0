import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from skyrl_async.learner.optimizer import (
    OptimizerSettings,
    ParameterGroup,
    build_optimizer,
    clip_gradients,
    rate_at,
    set_rate,
)
from skyrl_async.learner.tiny_policy import build_tiny_model
from tests.learner.rank_processes import run_ranks


def small_network(seed: int = 0) -> nn.Sequential:
    """Widths that two ranks cannot halve, and a norm."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3)).double()


def loss_of(network: nn.Module, step: int) -> torch.Tensor:
    inputs = torch.linspace(-1, 1 + step, 20, dtype=torch.float64).view(4, 5)
    return (network(inputs) - step).square().sum()


def rates_by_name(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def decays_by_name(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }


def test_constant_rate_after_a_warm_up_that_ends_at_one():
    settings = OptimizerSettings(warmup_steps=4)
    factors = [rate_at(s, settings) for s in range(7)]
    assert factors == [0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert [rate_at(s, OptimizerSettings()) for s in (0, 1, 10**6)] == [1, 1, 1]


@pytest.mark.parametrize("minimum", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, 3])
def test_linear_and_cosine_rates_at_every_step(warmup, minimum):
    total = 11
    for schedule in ("linear", "cosine"):
        settings = OptimizerSettings(
            schedule=schedule, warmup_steps=warmup, total_steps=total, min_rate_fraction=minimum
        )
        for step in range(warmup):
            assert rate_at(step, settings) == pytest.approx((step + 1) / warmup, rel=1e-12)
        for step in range(warmup, total + 5):
            progress = min((step - warmup) / (total - warmup), 1)
            if schedule == "linear":
                expected = minimum + (1 - minimum) * (1 - progress)
            else:
                expected = minimum + (1 - minimum) * (1 + math.cos(math.pi * progress)) / 2
            assert rate_at(step, settings) == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert rate_at(total - 1, settings) > minimum
        assert rate_at(total, settings) == pytest.approx(minimum, abs=1e-15)


def test_one_rate_for_all_gives_the_numbers_of_plain_adamw():
    network = small_network()
    plain = copy.deepcopy(network)
    settings = OptimizerSettings(weight_decay=0.1, no_decay_on_vectors=False, eps=1e-6)
    ours = build_optimizer(network.named_parameters(), settings)
    theirs = torch.optim.AdamW(
        plain.parameters(), lr=2e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, fused=True
    )
    for step in range(5):
        for optimizer, module in ((ours, network), (theirs, plain)):
            optimizer.zero_grad()
            loss_of(module, step).backward()
            optimizer.step()
    for a, b in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_vectors_are_not_decayed_unless_it_is_asked_for():
    model = build_tiny_model(hidden_size=16, num_heads=2)
    decays = decays_by_name(
        model, build_optimizer(model.named_parameters(), OptimizerSettings(weight_decay=0.1))
    )
    assert len(decays) == len(list(model.named_parameters()))
    for name, decay in decays.items():
        assert decay == (0 if "norm" in name else 0.1), name
    everywhere = OptimizerSettings(weight_decay=0.1, no_decay_on_vectors=False)
    decays = decays_by_name(model, build_optimizer(model.named_parameters(), everywhere))
    assert set(decays.values()) == {0.1}


def test_the_first_group_that_matches_a_name_holds_for_it():
    model = build_tiny_model(hidden_size=16, num_heads=2)
    settings = OptimizerSettings(
        learning_rate=1e-3,
        weight_decay=0.1,
        groups=(
            ParameterGroup(match=r"layers\.0\..*norm", learning_rate_factor=3, weight_decay=0.5),
            ParameterGroup(match=r"layers\.0\.", learning_rate_factor=0.5),
            ParameterGroup(match="^lm_head", learning_rate_factor=0),
        ),
    )
    optimizer = build_optimizer(model.named_parameters(), settings)
    rates, decays = rates_by_name(model, optimizer), decays_by_name(model, optimizer)
    for name in rates:
        in_first_layer, is_norm = "layers.0." in name, "norm" in name
        rate, decay = 1e-3, 0.0 if is_norm else 0.1
        if in_first_layer and is_norm:
            rate, decay = 3e-3, 0.5
        elif in_first_layer:
            rate = 5e-4
        elif name.startswith("lm_head"):
            rate = 0.0
        assert rates[name] == pytest.approx(rate, rel=1e-12), name
        assert decays[name] == decay, name
    set_rate(optimizer, 0.25)
    for name, rate in rates_by_name(model, optimizer).items():
        assert rate == pytest.approx(rates[name] / 4, rel=1e-12), name
    set_rate(optimizer, 1.0)
    assert rates_by_name(model, optimizer) == rates


def test_frozen_parameters_are_left_out():
    network = small_network()
    network[0].requires_grad_(False)
    optimizer = build_optimizer(network.named_parameters(), OptimizerSettings())
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert trained == {p for p in network.parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        build_optimizer(network.requires_grad_(False).named_parameters(), OptimizerSettings())


@pytest.mark.parametrize(
    "groups",
    [
        (ParameterGroup(match="lm_heat"),),
        (ParameterGroup(match=r"0\."), ParameterGroup(match=r"^0\.weight")),
    ],
)
def test_a_group_without_a_parameter_is_refused(groups):
    with pytest.raises(ValueError, match=re.escape(repr(groups[-1].match))):
        build_optimizer(small_network().named_parameters(), OptimizerSettings(groups=groups))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"eps": 0.0}, "eps"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"min_rate_fraction": 1.5}, "min_rate_fraction"),
        ({"schedule": "cosine"}, "total_steps=None"),
        ({"schedule": "linear", "total_steps": 5, "warmup_steps": 5}, "warmup_steps=5"),
    ],
)
def test_bad_settings_are_refused_by_name(values, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        OptimizerSettings(**values)


def test_bad_groups_factors_and_steps_are_refused():
    with pytest.raises(ValueError, match="not a regular expression"):
        ParameterGroup(match="(")
    with pytest.raises(ValueError, match="learning_rate_factor=-1"):
        ParameterGroup(match="a", learning_rate_factor=-1.0)
    with pytest.raises(ValueError, match="optimizer_step=-1"):
        rate_at(-1, OptimizerSettings())
    optimizer = build_optimizer(small_network().named_parameters(), OptimizerSettings())
    with pytest.raises(ValueError, match="factor=-1"):
        set_rate(optimizer, -1.0)


def test_gradients_are_scaled_to_the_norm_only_if_they_are_longer():
    network = small_network()
    loss_of(network, 2).backward()
    before = [p.grad.clone() for p in network.parameters()]
    literal = math.sqrt(sum(float(g.square().sum()) for g in before))
    assert float(clip_gradients(network.parameters(), 2 * literal)) == pytest.approx(literal)
    assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), before, strict=True))
    norm = clip_gradients(network.parameters(), literal / 4)
    assert norm.item() == pytest.approx(literal, rel=1e-12)
    for parameter, gradient in zip(network.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient / 4, rtol=1e-5, atol=0)


def test_parameters_without_gradients_have_norm_0_and_others_keep_a_broken_one():
    network = small_network()
    assert float(clip_gradients(network.parameters(), 1.0)) == 0
    loss_of(network[:2], 0).backward()
    assert float(clip_gradients(network.parameters(), 1e9)) > 0
    network[0].bias.grad[0] = math.nan
    assert math.isnan(float(clip_gradients(network.parameters(), 1.0)))


def trained(network: nn.Module, parameters: list[nn.Parameter]) -> list[float]:
    """Train a few clipped steps at several rates; return the norms."""
    settings = OptimizerSettings(
        learning_rate=1e-2,
        weight_decay=0.1,
        schedule="cosine",
        total_steps=6,
        groups=(ParameterGroup(match=r"^3\.", learning_rate_factor=0.5),),
    )
    optimizer = build_optimizer(network.named_parameters(), settings)
    norms = []
    for step in range(4):
        optimizer.zero_grad()
        loss_of(network, step).backward()
        norms.append(float(clip_gradients(parameters, 0.5)))
        set_rate(optimizer, rate_at(step, settings))
        optimizer.step()
    return norms


def whole(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


def train_sharded() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for everything in (True, False):
        alone, network = small_network(), small_network()
        expected = trained(alone, list(alone.parameters()))
        fully_shard(network[0], mesh=mesh)
        if everything:
            fully_shard(network, mesh=mesh)
        norms = trained(network, list(network.parameters()))
        assert norms == pytest.approx(expected, rel=1e-10)
        assert min(norms) > 0.5
        for a, b in zip(network.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(whole(a), b, rtol=1e-10, atol=1e-12)


def test_two_ranks_with_sharded_parameters_train_like_one(free_port):
    run_ranks(train_sharded, num_ranks=2, port=free_port)
