import pytest
from pydantic import ValidationError

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


def test_adapters_alone_are_published_to_embedded_engines_only():
    lora = {"rank": 4, "publish": "adapter"}
    Config(lora=lora)
    sglang = {"kind": "sglang", "urls": ("http://127.0.0.1:1",)}
    text = refusal(lora=lora, engine=sglang)
    assert "lora.publish=adapter, engine.kind=sglang" in text and "lora.publish=merged" in text
    Config(lora={"rank": 4}, engine=sglang)


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
