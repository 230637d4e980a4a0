"""Losses by name and by module, and what is refused before a run."""

import re
import textwrap
from pathlib import Path

import pytest

from skyrl_async.algorithms.catalogue import losses
from skyrl_async.algorithms.loss_by_name import check_loss, find_loss

DOCUMENT = Path(__file__).parents[2] / "docs" / "algorithms.md"
HEAD = """
import torch
from skyrl_async.algorithms.tokens import TokenLoss

"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """Return a function that writes a module and gives the name of its ``loss``."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"own_loss_{abs(hash(request.node.name))}"

    def write(body: str) -> str:
        (tmp_path / f"{name}.py").write_text(HEAD + textwrap.dedent(body))
        return f"{name}:loss"

    return write


def returning(loss: str, clipped: str = "torch.zeros(len(lp), dtype=torch.bool)") -> str:
    return f"""
    def loss(tokens):
        lp = tokens.current_logprobs
        return TokenLoss(loss={loss}, clipped={clipped})
    """


def test_every_loss_of_ours_passes_with_its_defaults():
    for name in losses():
        check_loss(name, {})


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("ppo_clip", {"clip_lw": 0.1}, r"clip_lw=0.1: unknown option; did you mean clip_low\?"),
        ("ppo_clip", {"clip_low": "much"}, "clip_low='much': must be a number"),
        ("ppo_clip", {"clip_low": -1.0}, r"loss_options={'clip_low': -1.0}: clip_low must be in"),
        ("ppo_clip", {"clip_low": float("nan")}, "clip_low must be in 0 .. 1, got nan"),
        ("reinforce_is", {"cap": 0.5}, "cap must be at least 1, got 0.5"),
        ("m2po", {"kept": 1}, "algorithm.loss_options.kept=1: unknown option"),
        ("torch:exp", {}, "algorithm.loss=torch:exp: .*change it"),
        ("no_such_module:loss", {}, "cannot be imported"),
        ("math:pi", {}, "is no function but float"),
    ],
)
def test_what_no_loss_can_take_is_refused_under_the_name_of_the_key(name, options, says):
    with pytest.raises(ValueError, match=says):
        check_loss(name, options)


def test_a_loss_of_ones_own_is_found_by_module_and_name(own):
    assert find_loss("skyrl_async.algorithms.policy_losses:sapo") is losses()["sapo"]
    check_loss(own(returning("-lp * tokens.advantages")), {})


def test_the_example_of_the_documents_is_a_loss(own):
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    check_loss(own(example.replace("shrunk", "loss")), {"scale": 0.5})


def test_options_of_ones_own_loss_may_be_anything_that_it_takes(own):
    name = own("""
    def loss(tokens, scale=1.0, *, mode="a"):
        assert (scale, mode) == (2.0, "b")
        lp = tokens.current_logprobs
        return TokenLoss(loss=-scale * lp, clipped=torch.zeros(len(lp), dtype=torch.bool))
    """)
    check_loss(name, {"scale": 2.0, "mode": "b"})
    with pytest.raises(ValueError, match=r"scal=2.0: unknown option; did you mean scale\?"):
        check_loss(name, {"scal": 2.0})
    with pytest.raises(ValueError, match=r"no message .AssertionError"):
        check_loss(name, {"scale": 3.0})


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (returning("lp.sum()"), r"its loss is \(\), not of shape \(4,\)"),
        (returning("lp[:, None]"), r"its loss is \(4, 1\), not of shape"),
        (returning("lp.detach()"), "its loss has no gradient"),
        (returning("lp / 0"), "its loss is not finite"),
        (returning("lp", "torch.zeros(len(lp))"), r"its clipped is torch.float32, not bool"),
        (returning("lp", "None"), "its clipped is NoneType"),
        ("def loss(tokens): return None", "it returned NoneType"),
        ("async def loss(tokens): return None", "it returned coroutine"),
        ("def loss(): return None", "takes 0 positional arguments"),
        ("def loss(tokens, *, scale): return None", "missing 1 required keyword-only argument"),
        ("def loss(tokens): raise RuntimeError", r"no message \(RuntimeError\)"),
        ("def loss(tokens) return", "cannot be imported .SyntaxError"),
        ("1 / 0", "cannot be imported .ZeroDivisionError"),
        ("raise SystemExit(3)", "cannot be imported .SystemExit: 3"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_is_no_loss_is_refused_with_the_reason(own, body, says):
    with pytest.raises(ValueError, match=f"algorithm.loss=own_loss_.*{says}"):
        check_loss(own(body), {})
