"""Owns the section `server`: how models behind servers are asked, and what that may cost."""

from typing import Literal

from pydantic import Field

from saro_jax.config.section import Section


class ServerConfig(Section):
    """How models behind OpenAI-compatible servers are asked, and what that may cost."""

    key_env: str = Field(
        default="OPENAI_API_KEY", description="environment variable that holds the server's key"
    )
    concurrency: int = Field(
        default=8, ge=1, description="requests under way at a time; does not change the result"
    )
    requests_per_minute: int | None = Field(
        default=None, ge=1, description="requests in any minute at most; null = as the server says"
    )
    tokens_per_minute: int | None = Field(
        default=None,
        ge=1,
        description="tokens in any minute at most, the prompt's estimated and all that may be new; "
        "null = as the server says",
    )
    max_requests: int | None = Field(
        default=None,
        ge=1,
        description="replies of a run at most, those it finds in the cache too; null = any number",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens of a run's prompts and replies at most, cached ones too; null = any "
        "number",
    )
    max_cost: float | None = Field(
        default=None,
        gt=0,
        description="cost of a run's replies at most, cached ones too, in the money of the prices; "
        "null = any",
    )
    input_price: float = Field(default=0.0, ge=0, description="money per million prompt tokens")
    output_price: float = Field(default=0.0, ge=0, description="money per million new tokens")
    timeout: float = Field(default=600.0, gt=0, description="seconds a reply may take")
    attempts: int = Field(
        default=8,
        ge=1,
        description="times a request is sent at most, where the server is busy or fails",
    )
    backoff: float = Field(
        default=1.0,
        ge=0,
        description="seconds before the second attempt; doubles with each, up to a minute",
    )
    give_up: Literal["run", "request"] = Field(
        default="run",
        description="what ends when all attempts fail: the run, which can go on later, or only the "
        "request, which is reported",
    )
    stream: bool = Field(
        default=False, description="ask for replies as streams, for gateways that cut idle lines"
    )
    extra: str | None = Field(
        default=None,
        description="JSON object of more fields of each request; a null takes a field out",
    )
    version: str | None = Field(
        default=None,
        description="what the replies depend on beside the model's name, such as its date; null = "
        "nothing",
    )
    cache: str | None = Field(
        default=None,
        description="sqlite file of replies; null = replies.sqlite in the cache folder "
        "(SARO_JAX_CACHE)",
    )
