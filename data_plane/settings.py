"""Settings of a data plane: defaults < YAML file < QUIRE_* environment < flags."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from data_plane import demo_model
from protos import wire
from protos.settings_file import settings_file


class Settings(BaseSettings):
    """Serves one model's engine API: python -m data_plane."""

    model_config = SettingsConfigDict(
        env_prefix="QUIRE_",
        cli_prog_name="python -m data_plane",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        extra="forbid",
    )

    config: Path | None = Field(None, description="YAML file with any of these settings")
    model: Path = Field(
        demo_model.PATH, description="model directory: config, tokenizer.json, safetensors"
    )
    served_model_name: str = Field("", description="name clients ask for; empty: the directory's")
    load_format: Literal["safetensors", "dummy"] = Field(
        "safetensors", description="dummy makes random weights from config.json alone"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of weights, keys and values; auto: the checkpoint's"
    )
    kv_dtype: Literal["auto", "fp8"] = Field(
        "auto",
        description="of the KV cache; auto: dtype's; fp8 (e4m3): twice the blocks of 16 bits",
    )
    kv_scales: Path | None = Field(
        None, description="file of fp8 scales; none: the model directory's, else measured at start"
    )
    device: str = Field("auto", description="torch device; auto: cuda if there is one, else cpu")
    tensor_parallel: int = Field(
        1, ge=1, le=64, description="ranks that hold the model together, a device each"
    )
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0: torch's choice")
    listen: str = Field("127.0.0.1:7411", description="host:port of the engine API")
    health_listen: str = Field(
        "", description="host:port of health alone, in plain text, for probes; empty: none"
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="port of /metrics, on the host of listen; 0: none"
    )
    engine_id: str = Field("", description="stable name; empty: derived from host name and address")
    block_size: int = Field(16, ge=1, le=256, description="tokens per block")
    kv_memory_mib: int = Field(
        0, ge=0, description="MiB of memory for the block pool; 0: on a GPU what is left, else 512"
    )
    memory_share: float = Field(
        0.9, gt=0, le=1, description="of a GPU's memory, what is used in all if kv-memory-mib is 0"
    )
    graphs: bool = Field(True, description="run decode steps as CUDA graphs, on a GPU")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="run layers as fused code, compiled at start; auto: on a GPU"
    )
    blocks: int = Field(
        0, ge=0, description="blocks in the pool; 0: as many as kv-memory-mib holds"
    )
    swap_memory_mib: int = Field(0, ge=0, description="MiB of host memory for swapped blocks")
    max_slots: int = Field(256, ge=1, le=65536, description="sequences resident at once")
    max_step_tokens: int = Field(2048, ge=1, description="tokens of one step; at least max-slots")
    max_model_length: int = Field(
        0, ge=0, description="tokens of one sequence, prompt and output; 0: the model's own limit"
    )
    leader_timeout_seconds: float = Field(
        10.0, gt=0, description="seconds after which a silent leader is dropped"
    )
    resident_grace_seconds: float = Field(
        60.0, ge=0, description="seconds that sequences stay resident without a leader"
    )
    hung_step_seconds: float = Field(
        60.0, gt=0, description="seconds on one step after which the process gives itself up"
    )
    drain_seconds: float = Field(
        0.0, ge=0, description="seconds for sequences to end at SIGTERM, while nothing new begins"
    )
    stop_grace_seconds: float = Field(
        2.0, ge=0, description="seconds for calls to end at SIGTERM, after drain-seconds"
    )
    tls_certificate: Path | None = Field(None, description="PEM file; together with tls-key")
    tls_key: Path | None = Field(None, description="PEM file")
    tls_ca: Path | None = Field(None, description="PEM file; peers must be signed by it")
    leader_names: str = Field(
        "", description="names of certificates that may lead; empty: all that tls-ca signed"
    )
    reflection: bool = Field(False, description="serve gRPC reflection")
    check_invariants: bool = Field(False, description="verify block conservation after every step")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="log level")
    log_format: Literal["text", "json"] = Field("text", description="of a line in the log")

    @property
    def tls(self) -> wire.Tls | None:
        return wire.tls(self.tls_certificate, self.tls_key, self.tls_ca)

    @property
    def leaders(self) -> frozenset[str]:
        """The names of leader-names."""
        names = (name.strip() for name in self.leader_names.split(","))
        return frozenset(name for name in names if name)

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        tls = wire.tls(self.tls_certificate, self.tls_key, self.tls_ca)
        if self.leaders and (tls is None or tls.ca is None):
            raise ValueError("leader-names needs tls-ca: names are those of certificates")
        return self

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
