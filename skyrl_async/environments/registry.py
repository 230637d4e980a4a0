"""Finding an environment by name.

Short names stand for entries of Gymnasium's own registry in the namespace ``skyrl_async``:
``number_guess`` is ``skyrl_async/number_guess-v0``. So ``gymnasium.register`` adds one, and after
:func:`register_environments`, ``gymnasium.make("skyrl_async/number_guess-v0")`` makes one.
Any other name is ``module:Class``. Environments are made directly, without Gymnasium's wrappers,
which cost more than the built-in games do.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NAMESPACE = "skyrl_async"

BUILT_IN = {
    "arithmetic": "skyrl_async.environments.arithmetic:Arithmetic",
    "largest_digit": "skyrl_async.environments.largest_digit:LargestDigit",
    "number_guess": "skyrl_async.environments.number_guess:NumberGuess",
}
"""Short names and entry points of the environments of this package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentType:
    """A class that makes environments.

    Attributes:
        name: by which it was found.
        environment_class: makes one from options as keyword arguments.
        default_options: of its registration.
        is_async: ``reset`` and ``step`` are ``async def``.
    """

    name: str
    environment_class: type
    default_options: Mapping[str, Any]
    is_async: bool


def register_environments() -> None:
    """Enter the built-in environments into Gymnasium's registry; again does nothing."""
    import gymnasium

    for name, entry_point in BUILT_IN.items():
        if _gymnasium_id(name) not in gymnasium.registry:
            gymnasium.register(
                id=_gymnasium_id(name),
                entry_point=entry_point,
                order_enforce=False,
                disable_env_checker=True,
            )


def known_environments() -> tuple[str, ...]:
    """Return all short names."""
    import gymnasium

    register_environments()
    prefix, suffix = _gymnasium_id("|").split("|")
    ids = (i for i in gymnasium.registry if i.startswith(prefix) and i.endswith(suffix))
    return tuple(sorted(i[len(prefix) : -len(suffix)] for i in ids))


def find_environment(name: str) -> EnvironmentType:
    """Import the class that ``name`` stands for and check its shape.

    Args:
        name: a short name or ``module:Class``.

    Raises:
        ValueError: if there is none, its module cannot be imported, or the class lacks the shape of
            :class:`skyrl_async.environments.base.Environment`.
    """
    environment_class, options = _find_class(name)
    return EnvironmentType(
        name=name,
        environment_class=environment_class,
        default_options=options,
        is_async=_checked_shape(name, environment_class),
    )


def _find_class(name: str) -> tuple[type, dict[str, Any]]:
    """Return the class and the options of its registration."""
    if ":" in name:
        return load_class(name), {}
    import gymnasium

    spec = gymnasium.registry.get(_gymnasium_id(name))
    if spec is None:
        register_environments()
        spec = gymnasium.registry.get(_gymnasium_id(name))
    if spec is None:
        known = known_environments()
        raise ValueError(
            f"unknown environment {name!r}; known are {', '.join(known)}, or give "
            f"module:Class{_suggestion(name, known)}"
        )
    entry: Any = spec.entry_point
    if isinstance(entry, str):
        entry = load_class(entry)
    if not inspect.isclass(entry):
        raise ValueError(f"environment {name!r}: its entry point must be a class, not {entry}")
    return entry, dict(spec.kwargs)


def load_class(entry_point: str) -> type:
    """Import ``module:Class``.

    Raises:
        ValueError: if the module cannot be imported or has no such class.
    """
    module_name, _, class_name = entry_point.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"environment {entry_point!r}: importing {module_name!r} failed with "
            f"{type(error).__name__}: {error}"
        ) from error
    try:
        found = functools.reduce(getattr, class_name.split("."), module)
    except AttributeError:
        found = None
    if not inspect.isclass(found):
        classes = [n for n, v in vars(module).items() if inspect.isclass(v)]
        raise ValueError(
            f"environment {entry_point!r}: module {module_name!r} has no class "
            f"{class_name!r}{_suggestion(class_name, classes)}"
        )
    return found


def make_environment(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Return a new environment, without any wrapper.

    Args:
        name: a short name or ``module:Class``.
        options: keyword arguments of the class.

    Raises:
        ValueError: if there is no such environment, or its class does not take the options; it
            names the option and those accepted.
        Exception: what the class raises.
    """
    environment_class, defaults = _find_class(name)
    try:
        return environment_class(**{**defaults, **(options or {})})
    except TypeError:
        _check_options(name, environment_class, defaults, options or {})
        raise


def check_environment(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Check that an environment can be made, without playing it.

    The module is imported and one environment is made in this process; ``reset`` is not called.

    Raises:
        ValueError: as :func:`find_environment` and :func:`make_environment`, and if making one
            fails.
    """
    kind = find_environment(name)
    options = options or {}
    _check_options(name, kind.environment_class, kind.default_options, options)
    try:
        environment = kind.environment_class(**{**kind.default_options, **options})
        close = getattr(environment, "close", None)
        if close is not None and not inspect.iscoroutinefunction(close):
            close()
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"environment {name!r} cannot be made with options {dict(options)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_options(
    name: str, environment_class: type, defaults: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Check the names of options against the signature of the class.

    Raises:
        ValueError: naming an option that is unknown or missing, and those accepted.
    """
    try:
        parameters = inspect.signature(environment_class).parameters.values()
    except (TypeError, ValueError):
        return
    by_name = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    accepts = f"it accepts {', '.join(by_name)}" if by_name else "it accepts none"
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for option in options:
        if option not in by_name and not takes_any:
            raise ValueError(
                f"environment {name!r} has no option {option!r}; "
                f"{accepts}{_suggestion(option, by_name)}"
            )
    for parameter in by_name.values():
        missing = parameter.name not in options and parameter.name not in defaults
        if missing and parameter.default is parameter.empty:
            raise ValueError(f"environment {name!r} needs option {parameter.name!r}; {accepts}")


def _checked_shape(name: str, environment_class: type) -> bool:
    """Return whether the class is asynchronous.

    Raises:
        ValueError: if ``reset`` or ``step`` is missing, takes the wrong arguments, or only one of
            them is ``async def``.
    """
    # The calls that will be made, with the instance as first argument.
    shapes: tuple[tuple[str, tuple[Any, ...], dict[str, Any]], ...] = (
        ("reset", (None,), {"seed": 0, "options": {}}),
        ("step", (None, ""), {}),
    )
    for method, args, kwargs in shapes:
        function = getattr(environment_class, method, None)
        if not callable(function):
            raise ValueError(f"environment {name!r}: the class has no method {method!r}")
        try:
            inspect.signature(function).bind(*args, **kwargs)
        except TypeError as error:
            raise ValueError(
                f"environment {name!r}: {method} must be callable as reset(seed=..., options=...) "
                f"and step(action): {error}"
            ) from None
    reset, step = (
        inspect.iscoroutinefunction(getattr(environment_class, m)) for m in ("reset", "step")
    )
    if reset != step:
        raise ValueError(
            f"environment {name!r}: reset and step must both be async def, or neither of them"
        )
    return step


def _gymnasium_id(name: str) -> str:
    return f"{NAMESPACE}/{name}-v0"


def _suggestion(word: str, known: Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
