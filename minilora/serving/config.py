"""The options of a server, each with a help text and its range."""

import ipaddress
import re
from dataclasses import dataclass

from minilora.common import check_options, option


@dataclass(frozen=True)
class ServeConfig:
    """The options of `serve`.

    The token that clients must send is not a field: it comes from the environment variable
    MINILORA_API_KEY, so that no command line and no process list shows it.

    Attributes:
        host: address to listen at; an address that other machines can reach requires a token.
        port: port to listen at; 0 takes a free one.
        name: model name of the base; None is its Hub id, or the name of its folder or file.
        adapter_folder: folder from which clients may load adapters; None forbids loading.
        max_adapters: largest number of adapters.
        batch_size: largest number of requests in one batch.
        waiting: largest number of requests in the queue; further ones receive status 429.
        max_length: limit of prompt and answer together, in tokens; None is the model's context.
        max_tokens: limit of an answer, in tokens, and the default of a chat.
        timeout: time limit of a request, in seconds, with its time in the queue.
        max_body: limit of a request's body, in bytes.
        drain: time after SIGTERM in which running answers may finish, in seconds.
        allow_no_token: True allows other machines to connect without a token.
        cors_origins: origins of web pages that may read answers in a browser (CORS), separated by
            commas, or "*" for all; None allows none except the server's own page.
    """

    host: str = option(
        "127.0.0.1", "address to listen at; one that other machines can reach needs a token"
    )
    port: int = option(8000, "port to listen at; 0 takes a free one", low=0, high=65535)
    name: str | None = option(
        None, "model name of the base; None: its Hub id, or the name of its folder or file"
    )
    adapter_folder: str | None = option(
        None, "folder from which clients may load adapters; None forbids loading"
    )
    max_adapters: int = option(64, "largest number of adapters", low=1)
    batch_size: int = option(8, "requests in one batch; up to 8 are fast in 4 bits on a CPU", low=1)
    waiting: int = option(64, "requests in the queue; further ones receive 429", low=0)
    max_length: int | None = option(
        None, "limit of prompt and answer together, in tokens; None is the model's context", low=2
    )
    max_tokens: int = option(
        1024, "limit of an answer, in tokens, and the default of a chat", low=1
    )
    timeout: float = option(
        120.0, "time limit of a request, in seconds, with its time in the queue", above=0
    )
    max_body: int = option(1 << 20, "limit of a request's body, in bytes", low=1)
    drain: float = option(30.0, "seconds after SIGTERM in which running answers may finish", low=0)
    allow_no_token: bool = option(False, "allow other machines to connect without a token")
    cors_origins: str | None = option(
        None, "web pages that may read answers (CORS): https://a.example,https://b.example or *"
    )

    def __post_init__(self) -> None:
        check_options(self)
        for origin in self.origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(
                    f"cors_origins: expected origins such as https://app.example:3000, separated "
                    f"by commas, or *, got {origin!r}. An origin has no path and no slash at its "
                    "end."
                )

    @property
    def origins(self) -> list[str]:
        """The entries of `cors_origins`."""
        if self.cors_origins is None:
            return []
        return [origin.strip() for origin in self.cors_origins.split(",")]

    @property
    def is_local(self) -> bool:
        """True if only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # the host is a name, not an address
            return self.host == "localhost"
