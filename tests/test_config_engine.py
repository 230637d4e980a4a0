import pytest
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, Phi3Config

from skyrl_async.config import Config
from skyrl_async.learner.tiny_policy import build_tiny_tokenizer
from skyrl_async.preflight import find_problems
from tests.models.families import WINDOW, family_model


def refusal(**sections):
    with pytest.raises(ValidationError) as caught:
        Config(**sections)
    return str(caught.value)


def test_an_embedded_engine_on_a_gpu_needs_one_from_ray():
    text = refusal(engine={"device": "cuda"})
    assert "engine.device=cuda, engine.gpus_per_engine=0: Ray gives a rollout actor no GPU" in text
    Config(engine={"device": "cuda", "gpus_per_engine": 0.5})
    Config(engine={"device": "cuda"}, runtime="local")
    # Servers of others, and ours as before, have devices of their own.
    Config(engine={"kind": "sglang", "device": "cuda", "urls": ("http://127.0.0.1:1",)})


def test_adapters_alone_are_published_to_engines_that_can_use_them():
    lora = {"rank": 4, "publish": "adapter"}
    Config(lora=lora)
    sglang = {"kind": "sglang", "urls": ("http://127.0.0.1:1",)}
    Config(lora=lora, engine=sglang)
    Config(lora={"rank": 4}, engine=sglang)
    text = refusal(lora=lora, engine={**sglang, "weight_load": "direct"})
    assert "engine.weight_load=direct" in text and "set engine.weight_load=memory" in text


@pytest.mark.parametrize(
    ("modules", "named"),
    [
        (("q_proj", "v_proj"), ""),
        (("self_attn.q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ""),
        (("gate_proj", "down_proj"), ""),
        (("q_proj",), "without v_proj"),
        (("k_proj",), "without q_proj, v_proj"),
        (("o_proj", "up_proj"), "without gate_proj"),
        (("q_proj", "v_proj", "router"), "no adapters of router"),
    ],
)
def test_adapters_that_sglang_cannot_serve_are_refused_with_a_way_out(modules, named):
    sections = {
        "lora": {"rank": 4, "publish": "adapter", "target_modules": modules},
        "engine": {"kind": "sglang", "urls": ("http://127.0.0.1:1",)},
    }
    if not named:
        Config(**sections)
        return
    text = refusal(**sections)
    assert named in text and "set lora.target_modules, or lora.publish=merged" in text
    Config(**{**sections, "engine": {"kind": "embedded"}})
    Config(**{**sections, "lora": {"rank": 4, "target_modules": modules}})


def test_publishing_adapters_without_a_rank_is_refused():
    assert "lora.rank=0 trains no adapter" in refusal(lora={"publish": "adapter"})


def test_a_critic_of_its_own_does_not_go_with_adapters():
    text = refusal(lora={"rank": 4}, critic={"kind": "model"}, algorithm={"advantage": "gae"})
    assert "critic.kind=model, lora.rank=4" in text and "critic.kind=head" in text


def test_layers_that_the_policy_does_not_have_are_found_before_the_run(tmp_path):
    good = Config(lora={"rank": 4, "target_modules": ("q_proj",)})
    assert not find_problems(good, root=tmp_path)
    bad = Config(lora={"rank": 4, "target_modules": ("nowhere",)})
    (problem,) = find_problems(bad, root=tmp_path)
    assert problem.startswith("lora: ") and "nowhere" in problem


def test_a_policy_whose_layers_sglang_serves_no_adapters_of_is_found_before_the_run(tmp_path):
    shape = dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 2)
    model = Phi3Config(**shape, hidden_size=16, intermediate_size=16, vocab_size=64, pad_token_id=0)
    AutoModelForCausalLM.from_config(model).save_pretrained(tmp_path / "model")
    build_tiny_tokenizer().save_pretrained(tmp_path / "model")
    sections = {
        "lora": {"rank": 4, "publish": "adapter"},
        "model": {"path": str(tmp_path / "model")},
        "engine": {"kind": "sglang", "urls": ("http://127.0.0.1:1",)},
    }
    (problem,) = find_problems(Config(**sections), root=tmp_path / "runs")
    assert problem.startswith("lora: SGLang serves no adapters of gate_up_proj, qkv_proj")
    assert "set lora.target_modules, or lora.publish=merged" in problem
    merged = {**sections, "lora": {"rank": 4}}
    assert not find_problems(Config(**merged), root=tmp_path / "runs")


@pytest.mark.parametrize(
    ("kind", "context_length", "is_refused"),
    [("sglang", 64, True), ("sglang", WINDOW + 1, True), ("embedded", 64, False)],
)
def test_a_sliding_window_that_sglang_ignores_is_refused(
    kind, context_length, is_refused, tmp_path
):
    model = tmp_path / "model"
    family_model("mistral_window").save_pretrained(model)
    build_tiny_tokenizer().save_pretrained(model)
    engine = {"kind": kind, "context_length": context_length}
    if kind == "sglang":
        engine["urls"] = ("http://127.0.0.1:1",)
    config = Config(engine=engine, model={"path": str(model)})
    problems = find_problems(config, root=tmp_path / "runs")
    assert len(problems) == is_refused
    if is_refused:
        assert f"sliding window of {WINDOW} tokens, which SGLang ignores" in problems[0]


@pytest.mark.parametrize(
    ("engine", "is_refused"),
    [
        ({"kind": "sglang", "urls": ("http://127.0.0.1:1",)}, True),
        ({"kind": "sglang", "urls": ("http://127.0.0.1:1",), "device": "cuda"}, False),
        ({"kind": "embedded"}, False),
    ],
)
def test_a_softcap_that_sglang_leaves_out_on_a_cpu_is_refused(engine, is_refused, tmp_path):
    model = tmp_path / "model"
    family_model("gemma2").save_pretrained(model)
    build_tiny_tokenizer().save_pretrained(model)
    problems = find_problems(
        Config(engine=engine, model={"path": str(model)}), root=tmp_path / "runs"
    )
    assert len(problems) == is_refused
    assert not is_refused or "leaves out the softcap of gemma2 models" in problems[0]
