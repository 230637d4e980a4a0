import copy
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from skyrl_async.learner.lora import (
    LoraSettings,
    adapter_config,
    adapter_name,
    adapter_parameters,
    add_adapter,
    base_name,
    fill_adapter,
    merged_model,
    merged_parameters,
    reference_policy,
    save_adapter,
)
from skyrl_async.learner.lora_merge import AdapterMerger, MergedWeight, merge
from tests.models.families import family_model

SETTINGS = LoraSettings(rank=3, alpha=12.0)
DECODER_LINEARS = 7 * 3
IDS = torch.tensor([[7, 8, 9, 10, 11, 12, 13], [3, 9, 27, 17, 51, 25, 11]])


def adapted(model, settings=SETTINGS, *, seed=0):
    add_adapter(model, settings)
    fill_adapter(model.named_parameters(), seed=seed)
    return model


def trained(model, *, seed=1):
    """Give both sides of all adapters values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def values(weight):
    return weight.tensor() if isinstance(weight, MergedWeight) else weight.detach()


def test_a_fresh_adapter_changes_nothing_and_only_it_is_trained():
    plain = family_model("qwen3")
    model = adapted(copy.deepcopy(plain).requires_grad_(True))
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=0)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in model.named_parameters() if "lora_" in n}
    assert len(names) == 2 * DECODER_LINEARS


def test_the_sides_begin_uniform_and_zero_by_seed_and_name():
    models = [adapted(family_model("qwen3"), seed=seed) for seed in (4, 4, 5)]
    same, again, other = (dict(adapter_parameters(m)) for m in models)
    for name, parameter in same.items():
        assert torch.equal(parameter, again[name])
        if name.endswith(".lora_B.weight"):
            assert not parameter.any()
            continue
        bound = 1 / math.sqrt(parameter.shape[1])
        assert 0.8 * bound < parameter.abs().max() <= bound
        assert not torch.equal(parameter, other[name])
    sides = [p for name, p in same.items() if name.endswith("q_proj.lora_A.weight")]
    assert not torch.equal(sides[0], sides[1])


def test_the_model_still_has_the_decoder_and_the_head_that_the_learner_uses():
    model = trained(adapted(family_model("qwen3")))
    hidden = model.get_decoder()(IDS).last_hidden_state
    torch.testing.assert_close(hidden @ model.get_output_embeddings().weight.T, logits(model))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_tied", "gemma3", "qwen3_moe"])
def test_merged_weights_follow_the_formula_and_give_the_adapted_models_logits(family):
    plain = family_model(family)
    model = trained(adapted(copy.deepcopy(plain)))
    merged = dict(merged_parameters(model))
    assert list(merged) == [name for name, _ in plain.named_parameters()]
    adapters = dict(adapter_parameters(model))
    changed = 0
    for name, base in plain.named_parameters():
        stem = "base_model.model." + name.removesuffix(".weight")
        expected = base
        if stem + ".lora_A.weight" in adapters:
            changed += 1
            a, b = adapters[stem + ".lora_A.weight"], adapters[stem + ".lora_B.weight"]
            expected = base + 12.0 / 3 * (b @ a)
        torch.testing.assert_close(values(merged[name]), expected, rtol=1e-6, atol=1e-6)
    assert changed == (12 if family == "qwen3_moe" else DECODER_LINEARS)
    assert len(adapters) == 2 * changed
    plain.load_state_dict({n: values(w) for n, w in merged.items()}, strict=False)
    difference = (logits(plain).log_softmax(-1) - logits(model).log_softmax(-1)).abs().max()
    assert difference < 1e-4


def test_merging_changes_no_weight_of_the_model():
    model = trained(adapted(family_model("qwen3")))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _, weight in merged_parameters(model):
        values(weight)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_merging_is_computed_in_float32_and_written_in_the_published_type():
    generator = torch.Generator().manual_seed(0)
    base, a, b = (torch.randn(shape, generator=generator) for shape in ((6, 5), (2, 5), (6, 2)))
    out = torch.empty(6, 5, dtype=torch.bfloat16)
    merge(base.bfloat16(), a, b, scale=0.5, out=out)
    exact = base.bfloat16().double() + 0.5 * b.double() @ a.double()
    assert torch.equal(out, exact.float().bfloat16())
    wide = torch.empty(6, 5, dtype=torch.float64)
    merge(base.double(), a, b, scale=0.5, out=wide)
    torch.testing.assert_close(
        wide, base.double() + 0.5 * b.double() @ a.double(), rtol=1e-14, atol=1e-14
    )


def test_the_reference_policy_is_the_model_before_training():
    plain = family_model("qwen3")
    model = trained(adapted(copy.deepcopy(plain)))
    after = logits(model)
    assert (after - logits(plain)).abs().max() > 0.1
    flags = [p.requires_grad for p in model.parameters()]
    with reference_policy(model):
        assert torch.equal(logits(model), logits(plain))
        assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(logits(model), after)
    with pytest.raises(ArithmeticError), reference_policy(model):
        raise ArithmeticError
    assert torch.equal(logits(model), after)


def test_the_saved_adapter_is_one_of_the_peft_library(tmp_path):
    plain = family_model("qwen3")
    model = trained(adapted(copy.deepcopy(plain)))
    save_adapter(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    files = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert files.keys() == dict(adapter_parameters(model)).keys()
    config = adapter_config(model)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 12.0, 0.0)
    assert config["target_modules"] == sorted(config["target_modules"])


@pytest.mark.parametrize("family", ["qwen3", "qwen3_tied", "qwen3_moe"])
def test_the_merged_model_is_a_hugging_face_folder(family, tmp_path):
    model = trained(adapted(family_model(family)))
    merged_model(model).save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)
    files = load_file(tmp_path / "merged" / "model.safetensors")
    family_model(family).save_pretrained(tmp_path / "plain")
    assert files.keys() == load_file(tmp_path / "plain" / "model.safetensors").keys()


def test_names_map_to_the_plain_model_and_to_peft():
    assert base_name("model.layers.0.mlp.up_proj.base_layer.weight") == (
        "model.layers.0.mlp.up_proj.weight"
    )
    assert base_name("model.norm.weight") == "model.norm.weight"
    own = "model.layers.0.mlp.up_proj.lora_B.default.weight"
    assert base_name(own) is None
    assert adapter_name(own) == "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    assert adapter_name("model.norm.weight") is None


def test_an_adapter_without_weights_has_the_same_names_and_shapes():
    with torch.device("meta"):
        empty = type(family_model("qwen3"))(family_model("qwen3").config)
    add_adapter(empty, SETTINGS)
    model = adapted(family_model("qwen3"))
    shapes = [(name, p.shape) for name, p in adapter_parameters(model)]
    assert [(name, p.shape) for name, p in adapter_parameters(empty)] == shapes
    assert all(p.is_meta for p in empty.parameters())


def test_chosen_layers_alone_are_adapted():
    settings = LoraSettings(rank=2, alpha=2, target_modules=("q_proj", "layers.1.mlp.up_proj"))
    model = adapted(family_model("qwen3"), settings)
    layers = {name.removesuffix(".lora_A.weight") for name, _ in adapter_parameters(model)}
    layers = {layer for layer in layers if not layer.endswith(".lora_B.weight")}
    prefix = "base_model.model.model.layers."
    assert layers == {
        *(f"{prefix}{i}.self_attn.q_proj" for i in range(3)),
        f"{prefix}1.mlp.up_proj",
    }


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_the_experts_of_a_mixture_are_left_out_by_default_and_refused_by_name(family):
    model = adapted(family_model(family))
    adapted_layers = {name.split(".")[-3] for name, _ in adapter_parameters(model)}
    assert adapted_layers == {"q_proj", "k_proj", "v_proj", "o_proj"}
    named = LoraSettings(rank=2, alpha=2, target_modules=("gate_proj", "up_proj"))
    with pytest.raises(ValueError, match="experts of a mixture"):
        add_adapter(family_model(family), named)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_embeddings_and_head_are_refused(target):
    settings = LoraSettings(rank=2, alpha=2, target_modules=(target,))
    with pytest.raises(ValueError, match=target):
        add_adapter(family_model("qwen3"), settings)


def test_a_model_without_linear_layers_is_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match=r"no torch.nn.Linear layers.*lora.rank=0"):
        add_adapter(model, SETTINGS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0, "alpha": 1}, "rank must be >= 1, got 0"),
        ({"rank": 1, "alpha": 0}, "alpha must be > 0"),
        ({"rank": 1, "alpha": math.inf}, "finite"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraSettings(**options)


def test_adapters_of_bfloat16_weights_are_float32():
    model = adapted(family_model("qwen3").to(torch.bfloat16))
    assert {p.dtype for _, p in adapter_parameters(model)} == {torch.float32}
    assert model(IDS).logits.dtype == torch.bfloat16


def test_the_merger_gives_the_merged_weights_and_never_drifts():
    plain = family_model("qwen3")
    base = {name: p.detach().clone() for name, p in plain.named_parameters()}
    model = trained(adapted(copy.deepcopy(plain)))
    adapter = {name: p.detach().clone() for name, p in adapter_parameters(model)}
    merger = AdapterMerger(plain, scale=SETTINGS.scale)
    first = merger.merge(adapter)
    expected = {name: values(weight) for name, weight in merged_parameters(model)}
    assert first.keys() == expected.keys()
    for name, weight in first.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-7)
    kept = {name: weight.clone() for name, weight in first.items()}
    other = {name: side + 1 for name, side in adapter.items()}
    for _ in range(20):
        second = merger.merge(other)
        # What is in use is not written to until the call after the next one.
        assert all(torch.equal(first[name], kept[name]) for name in kept)
        name = "model.layers.0.mlp.up_proj.weight"
        assert second[name].data_ptr() != first[name].data_ptr()
        first = merger.merge(adapter)
        assert all(torch.equal(first[name], kept[name]) for name in kept)
    assert all(torch.equal(p, base[name]) for name, p in plain.named_parameters())


def test_the_merger_refuses_what_does_not_fit():
    plain = family_model("qwen3")
    adapter = dict(adapter_parameters(adapted(copy.deepcopy(plain))))
    merger = AdapterMerger(plain, scale=1.0)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    side = adapter.pop(name)
    with pytest.raises(ValueError, match="of every weight"):
        merger.merge(adapter)
    with pytest.raises(ValueError, match="adapts no weight"):
        merger.merge({**adapter, name.replace("layers.0", "layers.9"): side})
    with pytest.raises(ValueError, match=r"\(3, 31\).*do not fit"):
        merger.merge({**adapter, name: side[:, 1:]})
