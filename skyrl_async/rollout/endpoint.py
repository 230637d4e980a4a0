"""Where an engine server is, as the code that plays episodes needs to know it."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEndpoint:
    """One engine server of the training pool.

    Attributes:
        engine_id: its name in the run.
        url: ``http://HOST:PORT``, without a path.
        api_key: for generation; None if the server asks for none. As secret as the admin key, which
            SGLang tells whoever has this one.
        policy_version: that the server had verified and loaded when this was made, or an older one.

    Raises:
        ValueError: on an empty id, another kind of URL, or a negative version.
    """

    engine_id: str
    url: str
    api_key: str | None = field(default=None, repr=False)
    policy_version: int = 0

    def __post_init__(self) -> None:
        if not self.engine_id:
            raise ValueError("engine_id must not be empty")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise ValueError(
                f"url of engine {self.engine_id!r} must look like http://HOST:PORT, "
                f"got {self.url!r}"
            )
        if self.policy_version < 0:
            raise ValueError(f"policy_version must be >= 0, got {self.policy_version}")

    def same_server(self, other: EngineEndpoint) -> bool:
        """Return whether both are one server, with one key."""
        return (self.url, self.api_key) == (other.url, other.api_key)
