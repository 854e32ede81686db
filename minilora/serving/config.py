"""What a server is told, each option with its help and its range in one line."""

import ipaddress
from dataclasses import dataclass

from minilora.common import check_options, option


@dataclass(frozen=True)
class ServeConfig:
    """How to serve. The token that clients must send is no field: it comes from the environment, MINILORA_API_KEY."""

    host: str = option("127.0.0.1", "address to listen at; beyond this machine only with a token")
    port: int = option(8000, "to listen at; 0 takes a free one", low=0, high=65535)
    name: str | None = option(None, "what the base is called; None: its Hub id, or the name of its folder or file")
    adapter_folder: str | None = option(None, "folder in which clients may name adapters to load; None: they may not")
    max_adapters: int = option(64, "adapters held at a time", low=1)
    batch_size: int = option(8, "requests answered at a time; up to 8 are quick in 4 bits on a CPU", low=1)
    waiting: int = option(64, "requests that may wait for a place; further ones get 429", low=0)
    max_length: int | None = option(None, "tokens of a prompt and its answer; None is the model's context", low=2)
    max_tokens: int = option(1024, "tokens of an answer at most, and where a chat does not say", low=1)
    timeout: float = option(120.0, "seconds for a request, waiting included", above=0)
    max_body: int = option(1 << 20, "bytes of a request's body at most", low=1)
    drain: float = option(30.0, "seconds after SIGTERM for the answers that are being given", low=0)
    allow_no_token: bool = option(False, "listen beyond this machine without a token: anybody may ask")

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name
            return self.host == "localhost"
