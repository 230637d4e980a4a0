import json
import struct
from pathlib import Path

import pytest

from skyrl_async.model_folder import ModelShape, is_hub_name, read_model_folder

CONFIG = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "head_dim": 16,
    "max_position_embeddings": 256,
}


def write_safetensors(file: Path, shapes: dict[str, list[int]]) -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    write_safetensors(path / "model.safetensors", {"a": [3, 4], "b": [5]})
    return path


def why_refused(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_model_folder(str(folder))
    return str(caught.value)


def test_sizes_come_from_config_and_header(folder):
    assert read_model_folder(str(folder)) == ModelShape(
        num_parameters=17, num_layers=2, kv_width=32, max_positions=256, model_type="qwen3"
    )
    (folder / "config.json").write_text(json.dumps({**CONFIG, "sliding_window": 96}))
    assert read_model_folder(str(folder)).sliding_window == 96


def test_sizes_of_a_nested_text_model_and_of_old_names_are_found(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "vl", "text_config": CONFIG}))
    assert read_model_folder(str(folder)).kv_width == 32
    old = {"model_type": "gpt2", "n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 128}
    (folder / "config.json").write_text(json.dumps(old))
    shape = read_model_folder(str(folder))
    assert (shape.num_layers, shape.kv_width, shape.max_positions) == (3, 64, 128)


def test_shards_are_counted_together_and_a_missing_one_is_named(folder):
    (folder / "model.safetensors").unlink()
    write_safetensors(folder / "model-1.safetensors", {"a": [3, 4]})
    write_safetensors(folder / "model-2.safetensors", {"b": [5]})
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_model_folder(str(folder)).num_parameters == 17
    (folder / "model-2.safetensors").unlink()
    assert "weights are missing: model-2.safetensors" in why_refused(folder)


def test_pickled_weights_are_accepted_without_being_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert read_model_folder(str(folder)).num_parameters is None


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", None, "config.json is missing; save the model"),
        ("config.json", b"{", "config.json is broken"),
        ("config.json", b"\xff", "config.json is broken"),
        ("config.json", b"[]", "config.json is broken (not a mapping)"),
        ("config.json", b"{}", "config.json has no model_type"),
        ("tokenizer.json", None, "no tokenizer (one of tokenizer.json"),
        ("chat_template.jinja", None, "no chat template; add chat_template.jinja"),
        ("model.safetensors", None, "no weights (model.safetensors or pytorch_model.bin"),
        ("model.safetensors", b"", "not in safetensors format"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("model.safetensors", struct.pack("<Q", 2) + b"[]", "not in safetensors format"),
    ],
)
def test_missing_and_broken_files_are_named_with_a_remedy(folder, name, content, reason):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    assert reason in why_refused(folder)


def test_weights_that_were_cut_off_are_refused_with_both_sizes(folder):
    file = folder / "model.safetensors"
    complete = file.read_bytes()
    file.write_bytes(complete[:-1])
    assert f"{len(complete) - 1} bytes, but its header promises {len(complete)}" in why_refused(
        folder
    )


def test_chat_template_in_the_tokenizer_settings_is_enough(folder):
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert read_model_folder(str(folder)).num_parameters == 17


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file; give a folder" in why_refused(tmp_path / "file")
    assert "no such folder; give a folder" in why_refused(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("path", "hub"),
    [
        ("org/name-0.5B", True),
        ("name", True),
        ("/abs/name", False),
        ("./name", False),
        ("../name", False),
        ("~/name", False),
        ("a/b/c", False),
        ("here/name", False),
        ("here", False),
        ("", False),
    ],
)
def test_hub_names_are_told_from_folders(tmp_path, monkeypatch, path, hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_hub_name(path) is hub
