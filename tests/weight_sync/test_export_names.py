import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.core_model_loading import WeightRenaming
from transformers.utils.logging import disable_progress_bar

from skyrl_async.weight_sync.export_names import ExportedPart, ExportNames, export_names
from skyrl_async.weight_sync.layout import WeightLayout
from tests.models.families import FAMILIES, family_model

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
OTHERS = {
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(autouse=True)
def no_progress_bar():
    # It would leave a thread.
    disable_progress_bar()


def model_of(family):
    if family in FAMILIES:
        return family_model(family)
    config = CONFIG_MAPPING[family](**(SMALL | OTHERS[family]))
    return AutoModelForCausalLM.from_config(config).requires_grad_(False)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_what_is_published_is_what_a_hugging_face_file_holds(family, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    published = dict(export_names(model).publish(model.named_parameters()))
    trained = {name for name in saved if name in published}
    assert published.keys() == trained
    # The rest are buffers, which no optimizer changes.
    assert saved.keys() - trained <= {name for name, _ in model.named_buffers()}
    for name, tensor in published.items():
        assert torch.equal(tensor, saved[name]), name


def test_the_experts_of_a_layer_are_published_one_by_one_without_a_copy():
    model = family_model("qwen3_moe")
    fused = dict(model.named_parameters())["model.layers.1.mlp.experts.gate_up_proj"]
    published = dict(export_names(model).publish(model.named_parameters()))
    width = fused.shape[1] // 2
    for expert in range(4):
        prefix = f"model.layers.1.mlp.experts.{expert}"
        for name, rows in (("gate_proj", slice(0, width)), ("up_proj", slice(width, None))):
            part = published[f"{prefix}.{name}.weight"]
            assert torch.equal(part, fused[expert, rows])
            assert part.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
    assert not any("gate_up_proj" in name for name in published)


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma", "mixtral"])
def test_restoring_what_was_published_gives_the_parameters(family):
    model = family_model(family)
    names = export_names(model)
    published = {n: t.clone() for n, t in names.publish(model.named_parameters())}
    restored = names.restore(published)
    assert restored.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(restored[name], parameter)


def test_a_model_without_weights_gives_the_same_names_and_layout():
    model = family_model("qwen3_moe")
    empty = family_model("qwen3_moe").to("meta")
    assert export_names(empty) == export_names(model)
    layouts = [
        WeightLayout.of(export_names(m).publish(m.named_parameters())) for m in (model, empty)
    ]
    assert layouts[0] == layouts[1]


def test_the_names_of_a_checkpoint_that_was_loaded_make_no_difference(tmp_path):
    expected = export_names(family_model("qwen3_moe"))
    model = family_model("qwen3_moe")
    # As `transformers` remembers a checkpoint that called this norm otherwise.
    remembered = [WeightRenaming("model.last_norm", "model.norm")]
    model._weight_conversions = remembered
    model.save_pretrained(tmp_path)
    assert "model.last_norm.weight" in load_file(tmp_path / "model.safetensors")
    assert export_names(model) == expected
    assert model._weight_conversions is remembered


def test_a_parameter_that_is_not_contiguous_is_published_all_the_same():
    model = family_model("qwen3_moe")
    names = export_names(model)
    name = "model.layers.0.mlp.experts.down_proj"
    parameter = dict(model.named_parameters())[name]
    strided = parameter.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    for (_, part), (_, expected) in zip(
        names.published(name, strided), names.published(name, parameter), strict=True
    ):
        assert torch.equal(part, expected)


def test_a_part_of_a_larger_buffer_is_published_from_its_place():
    names = export_names(family_model("qwen3_moe"))
    name = "model.layers.0.mlp.experts.down_proj"
    buffer = torch.arange(7 + 4 * 32 * 24, dtype=torch.float32)
    parameter = buffer[7:].view(4, 32, 24)
    parts = [part for _, part in names.published(name, parameter)]
    for expert, part in enumerate(parts):
        assert torch.equal(part, parameter[expert])


def test_wrong_parameters_and_wrong_tensors_are_refused():
    model = family_model("qwen3_moe")
    names = export_names(model)
    with pytest.raises(ValueError, match=r"unknown parameter 'model\.other'"):
        list(names.published("model.other", torch.zeros(2)))
    with pytest.raises(ValueError, match=r"must be \(32,\), got \(31,\)"):
        list(names.published("model.norm.weight", torch.zeros(31)))
    published = dict(names.publish(model.named_parameters()))
    lacking = {n: t for n, t in published.items() if n != "model.norm.weight"}
    with pytest.raises(ValueError, match=r"missing tensor 'model\.norm"):
        names.restore(lacking)
    with pytest.raises(ValueError, match="unknown tensor 'more'"):
        names.restore({**published, "more": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' must be \(32,\), got \(3,\)"):
        names.restore({**published, "model.norm.weight": torch.zeros(3)})


def test_parts_that_leave_elements_out_are_refused():
    part = ExportedPart(name="a", source="w", shape=(2,), stride=(1,), offset=0)
    with pytest.raises(ValueError, match="3 elements, of which 2 are published"):
        ExportNames(shapes={"w": (3,)}, parts=(part,))


def test_a_model_that_saves_mixtures_of_its_parameters_is_refused(monkeypatch):
    def mixed(model, state_dict):
        return {"both": torch.cat([t.flatten() for t in state_dict.values()])}

    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", mixed)
    with pytest.raises(ValueError, match="'both' as a mixture of its parameters"):
        export_names(copy.deepcopy(nn.Linear(2, 3)))
