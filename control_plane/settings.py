"""Settings of a control-plane replica: defaults < YAML file < QUIRE_* environment < flags."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from control_plane.access import anonymous_roles, read_access
from control_plane.traces import check_endpoint
from protos import wire
from protos.settings_file import settings_file


class Settings(BaseSettings):
    """Serves the inference and admin APIs and drives engines: python -m control_plane."""

    model_config = SettingsConfigDict(
        env_prefix="QUIRE_",
        cli_prog_name="python -m control_plane",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        extra="forbid",
    )

    config: Path | None = Field(None, description="YAML file with any of these settings")
    engines: str = Field(
        "127.0.0.1:7411", description="host:port of the engines to lead, separated by commas"
    )
    listen: str = Field("127.0.0.1:7401", description="host:port of the inference API")
    admin_listen: str = Field("127.0.0.1:7402", description="host:port of the admin API")
    health_listen: str = Field(
        "", description="host:port of health alone, in plain text, for probes; empty: none"
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="port of /metrics, on the host of listen; 0: none"
    )
    vllm_metrics: bool = Field(False, description="serve metrics under vLLM's names, too")
    traces_endpoint: str = Field(
        "", description="http[s]://host:port of a collector of traces (OTLP/gRPC); empty: none"
    )
    traces_share: float = Field(
        1.0, ge=0, le=1, description="of the traces that begin here, how many are kept"
    )
    advertise: str = Field("", description="host:port told to other replicas; empty: listen")
    peer_name: str = Field(
        "", description="name in other replicas' certificates; empty: that of their address"
    )
    redis_url: str = Field(
        "redis://127.0.0.1:6379",
        description="of the prefix index; serving goes on without it",
        repr=False,  # It may have a password in it.
    )
    redis_username: str = Field("", description="of Redis's ACL; empty: the default user")
    redis_password: SecretStr | None = Field(None, description="of that user; none: no password")
    redis_ca: Path | None = Field(None, description="PEM file that signed Redis's certificate")
    index_namespace: str = Field("quire", description="begins every key of the prefix index")
    index_timeout_ms: float = Field(5.0, gt=0, description="ms that a request waits for the index")
    steps_in_flight: int = Field(2, ge=1, le=4, description="plans sent ahead of results")
    chunk_tokens: int = Field(512, ge=1, description="tokens of one prompt in one step, at most")
    preemption: Literal["auto", "swap", "recompute"] = Field(
        "auto", description="what to do with a preempted request's blocks; auto: what costs less"
    )
    max_waiting_requests: int = Field(1024, ge=1, description="requests in the queue, at most")
    max_waiting_tokens: int = Field(
        1 << 20, ge=1, description="tokens in the queue from which on it takes no more requests"
    )
    max_waiting_seconds: float = Field(
        0.0, ge=0, description="seconds of a request in the queue, at most; 0: no limit"
    )
    max_calls: int = Field(
        16384, ge=1, description="Generate calls open at this replica at once, at most"
    )
    tenant_cache_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="of the blocks, what one tenant's cached ones may be while others want memory",
    )
    prefixes: Path | None = Field(
        None, description="YAML file of shared prefixes that are registered from the start"
    )
    access: Path | None = Field(
        None, description="YAML file of callers, their tenants and roles; none: all are anonymous"
    )
    anonymous_roles: str = Field(
        "generate", description="of callers that access does not know: generate, read, write"
    )
    orphan_grace_seconds: float = Field(
        30.0, ge=0, description="seconds for clients to come back to what a new leader took over"
    )
    drain_seconds: float = Field(30.0, ge=0, description="seconds for calls to end at SIGTERM")
    connection_age_seconds: float = Field(
        60.0,
        ge=0,
        description="seconds after which clients connect anew, maybe to another replica; 0: never",
    )
    tls_certificate: Path | None = Field(None, description="PEM file; together with tls-key")
    tls_key: Path | None = Field(None, description="PEM file")
    tls_ca: Path | None = Field(None, description="PEM file; peers must be signed by it")
    client_certificates: bool = Field(
        True, description="callers must have a certificate that tls-ca signed; engines must anyway"
    )
    reflection: bool = Field(False, description="serve gRPC reflection")
    check_invariants: bool = Field(False, description="verify block conservation after every step")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="log level")
    log_format: Literal["text", "json"] = Field("text", description="of a line in the log")

    @property
    def own_address(self) -> str:
        """By which other replicas know this one."""
        return self.advertise or self.listen

    @property
    def tls(self) -> wire.Tls | None:
        return wire.tls(self.tls_certificate, self.tls_key, self.tls_ca)

    @property
    def peer_tls(self) -> wire.Tls | None:
        """Towards other replicas, which may be told of by an address that no certificate has."""
        return None if self.tls is None else replace(self.tls, peer_name=self.peer_name)

    @property
    def listen_tls(self) -> wire.Tls | None:
        """Of the servers: without `client_certificates` they ask callers for none."""
        ca = self.tls_ca if self.client_certificates else None
        return None if self.tls is None else wire.Tls(self.tls_certificate, self.tls_key, ca)

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        wire.tls(self.tls_certificate, self.tls_key, self.tls_ca)
        return self

    @model_validator(mode="after")
    def _check_redis(self) -> Self:
        if self.redis_ca is not None and not self.redis_url.startswith("rediss://"):
            raise ValueError("redis-ca is for a redis-url that begins with rediss://")
        return self

    @field_validator("traces_endpoint")
    @classmethod
    def _check_traces_endpoint(cls, endpoint: str) -> str:
        check_endpoint(endpoint)
        return endpoint

    @field_validator("access")
    @classmethod
    def _check_access(cls, path: Path | None) -> Path | None:
        if path is not None:
            read_access(path)
        return path

    @field_validator("anonymous_roles")
    @classmethod
    def _check_anonymous_roles(cls, roles: str) -> str:
        anonymous_roles(roles)
        return roles

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = YamlConfigSettingsSource(settings_cls, settings_file())
        return (init_settings, env_settings, file)
