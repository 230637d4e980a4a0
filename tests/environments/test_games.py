import math
import re
from collections import Counter

import gymnasium
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.environments.arithmetic import Arithmetic
from skyrl_async.environments.largest_digit import LargestDigit
from skyrl_async.environments.number_guess import NumberGuess
from skyrl_async.environments.registry import BUILT_IN, make_environment, register_environments
from skyrl_async.environments.replies import first_integer
from skyrl_async.learner.tiny_policy import VOCABULARY

seeds = st.integers(0, 2**31 - 1)


def bisect(game, low, high):
    """Play by binary search; return the total reward and the number of guesses."""
    for guesses in range(1, 100):
        guess = (low + high) // 2
        observation, reward, terminated, truncated, _ = game.step(str(guess))
        assert not truncated
        if terminated:
            return reward, guesses
        assert reward == 0
        if observation == "higher":
            low = guess + 1
        else:
            assert observation == "lower"
            high = guess - 1
    raise AssertionError("the game did not end")


@given(seeds, st.integers(-5, 5), st.integers(0, 40))
def test_binary_search_always_wins_with_enough_guesses(seed, low, span):
    high = low + span
    guesses = math.ceil(math.log2(high - low + 2))
    game = NumberGuess(low=low, high=high, max_guesses=guesses)
    observation, _ = game.reset(seed=seed)
    assert observation == f"guess {low} to {high}"
    reward, used = bisect(game, low, high)
    assert reward == 1.0
    assert used <= guesses


def test_a_bad_guess_is_invalid_and_costs_one():
    game = NumberGuess(max_guesses=3)
    game.reset(seed=0)
    assert game.step("") == ("invalid", 0.0, False, False, {})
    assert game.step("is the number 11 ?") == ("invalid", 0.0, False, False, {})
    assert game.step("-3") == ("invalid", 0.0, True, False, {})
    with pytest.raises(RuntimeError, match="call reset first"):
        game.step("3")


def test_the_first_integer_of_a_reply_counts():
    game = NumberGuess(low=7, high=7)
    game.reset(seed=0)
    assert game.step("I guess 7 , not 8") == ("correct", 1.0, True, False, {})
    assert first_integer("3.9") == 3
    assert first_integer("x-2 5") == -2
    assert first_integer("no number") is None
    assert first_integer("9" * 5000) is None


def test_a_wrong_last_guess_terminates_without_reward():
    game = NumberGuess(low=1, high=2, max_guesses=1)
    game.reset(seed=3)
    answers = dict.fromkeys("12")
    for guess in answers:
        game.reset(seed=3)
        answers[guess] = game.step(guess)
    assert sorted(a[1] for a in answers.values()) == [0.0, 1.0]
    assert all(a[2] for a in answers.values())


def test_number_guess_draws_every_number_about_equally_often():
    game = NumberGuess()
    numbers = Counter()
    for seed in range(2000):
        game.reset(seed=seed)
        numbers[game._number] += 1
    assert set(numbers) == set(range(1, 11))
    assert all(140 <= count <= 260 for count in numbers.values())


@given(seeds, st.sampled_from(["+", "-", "*", "+-", "+-*"]), st.integers(1, 20))
def test_arithmetic_stays_in_range_and_rewards_the_right_answer(seed, operators, max_number):
    game = Arithmetic(operators=operators, max_number=max_number)
    question, _ = game.reset(seed=seed)
    left, operator, right = re.fullmatch(r"what is (\d+) ([-+*]) (\d+) \?", question).groups()
    assert operator in operators
    result = {
        "+": int(left) + int(right),
        "-": int(left) - int(right),
        "*": int(left) * int(right),
    }[operator]
    assert 0 <= result <= max_number
    assert max(int(left), int(right)) <= max_number
    assert game.step(f"the answer is {result}") == ("correct", 1.0, True, False, {})
    assert game.reset(seed=seed)[0] == question
    assert game.step(str(result + 1)) == ("failed", 0.0, True, False, {})
    with pytest.raises(RuntimeError, match="call reset first"):
        game.step(str(result))


@given(seeds, st.integers(1, 8))
def test_largest_digit_rewards_the_largest(seed, num_digits):
    game = LargestDigit(num_digits=num_digits)
    question, _ = game.reset(seed=seed)
    digits = [int(word) for word in question.removeprefix("largest of ").rstrip(" ?").split()]
    assert len(digits) == num_digits
    assert game.step(str(max(digits))) == ("correct", 1.0, True, False, {})
    game.reset(seed=seed)
    assert game.step("no")[:3] == ("failed", 0.0, True)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_environments_speak_the_vocabulary_and_are_reproducible(name):
    for seed in range(200):
        first, second = (make_environment(name) for _ in range(2))
        observation, info = first.reset(seed=seed, options={})
        assert second.reset(seed=seed)[0] == observation
        assert first.observation_space.contains(observation)
        assert info == {}
        texts = [observation]
        for guess in ("1", "7", "no"):
            answer = first.step(guess)
            assert second.step(guess) == answer
            texts.append(answer[0])
            if answer[2]:
                break
        for text in texts:
            assert set(text.split()) <= set(VOCABULARY), text


@pytest.mark.parametrize("name", BUILT_IN)
def test_without_a_seed_reset_goes_on_with_the_same_generator(name):
    first, second = (make_environment(name) for _ in range(2))
    streams = []
    for game in (first, second):
        game.reset(seed=1)
        streams.append([game.reset()[0] for _ in range(5)])
    assert streams[0] == streams[1]
    assert isinstance(make_environment(name).reset()[0], str)


@pytest.mark.parametrize("name", BUILT_IN)
def test_gymnasium_makes_built_in_environments_without_wrappers(name):
    register_environments()
    game = gymnasium.make(f"skyrl_async/{name}-v0")
    assert game is game.unwrapped


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NumberGuess(low=5, high=4), "low=5"),
        (lambda: NumberGuess(max_guesses=0), "max_guesses=0"),
        (lambda: Arithmetic(operators="/"), "operators='/'"),
        (lambda: Arithmetic(operators=""), "operators=''"),
        (lambda: Arithmetic(max_number=0), "max_number=0"),
        (lambda: LargestDigit(num_digits=0), "num_digits=0"),
    ],
)
def test_bad_options_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
