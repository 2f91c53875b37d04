"""Who callers are and what they may do: the access file, and what it means. No wire types here."""

from __future__ import annotations

import asyncio
import enum
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Self, TypeAlias

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

log = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
MAX_FILE_BYTES = 4 << 20
MAX_CALLERS = 10_000
# Names go into logs and labels, tenants into metadata of calls between replicas.
_NAME = re.compile(r"[!-~]{1,128}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_NO_TOKEN = hashlib.sha256(b"").digest()


class Role(enum.StrEnum):
    GENERATE = "generate"
    READ = "read"
    WRITE = "write"
    RELAY = "relay"


class AccessError(ValueError):
    """What is wrong with the access file; one sentence, with nothing secret in it."""


class UnknownCaller(Exception):
    """Somebody shows credentials that nobody has; one sentence."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls.

    Attributes:
        name: in the access file; empty for the anonymous.
        tenant: whose prefix cache and request ids it uses.
    """

    name: str
    tenant: str
    roles: frozenset[Role]

    def for_tenant(self, tenant: str) -> Caller:
        """The same caller, when it passes on another tenant's call."""
        return replace(self, tenant=tenant)


NOBODY = Caller("", "", frozenset())
_calling: ContextVar[Caller] = ContextVar("calling", default=NOBODY)


def calling() -> Caller:
    """Whose call is being answered here; nobody outside of calls."""
    return _calling.get()


def set_calling(caller: Caller) -> None:
    _calling.set(caller)


def is_tenant(text: str) -> bool:
    """Whether a tenant can have this name; the empty one is that of the anonymous."""
    return text == "" or _NAME.fullmatch(text) is not None


# The file.


def _named(text: str) -> str:
    if _NAME.fullmatch(text) is None:
        raise ValueError("must be 1 to 128 printable ASCII characters without spaces")
    return text


def _digest(text: str) -> str:
    if _DIGEST.fullmatch(text) is None:
        raise ValueError("must be the 64 hex digits of a token's SHA-256")
    if bytes.fromhex(text) == _NO_TOKEN:
        raise ValueError("is that of no token at all")
    return text.lower()


def _certified(text: str) -> str:
    if not 0 < len(text) <= 256 or not text.isprintable():
        raise ValueError("must be 1 to 256 printable characters")
    return text


def _known_roles(words: list[str]) -> list[str]:
    roles_of(words)
    return words


Name: TypeAlias = Annotated[str, AfterValidator(_named)]


class CallerEntry(BaseModel):
    """One caller: known by a token or by a name in its certificate."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: Name
    token_sha256: Annotated[str, AfterValidator(_digest)] | None = None
    certificate: Annotated[str, AfterValidator(_certified)] | None = None
    tenant: Name | None = None
    roles: Annotated[list[str], AfterValidator(_known_roles)] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_credentials(self) -> Self:
        if (self.token_sha256 is None) == (self.certificate is None):
            raise ValueError("must have either token_sha256 or certificate")
        return self

    @property
    def caller(self) -> Caller:
        tenant = self.name if self.tenant is None else self.tenant
        return Caller(self.name, tenant, roles_of(self.roles))


class AccessFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    callers: list[CallerEntry] = Field(max_length=MAX_CALLERS)

    @model_validator(mode="after")
    def _check_distinct(self) -> Self:
        for field_name in ("name", "token_sha256", "certificate"):
            seen: dict[str, int] = {}
            for index, entry in enumerate(self.callers):
                value = getattr(entry, field_name)
                if value is None:
                    continue
                if value in seen:
                    both = f"callers[{seen[value]}] and callers[{index}]"
                    raise ValueError(f"{both} have the same {field_name}")
                seen[value] = index
        return self


def roles_of(words: Iterable[str]) -> frozenset[Role]:
    """Returns what roles amount to: who may write may read, too.

    Raises:
        ValueError: there is no such role.
    """
    found = set()
    for word in words:
        try:
            found.add(Role(word))
        except ValueError:
            raise ValueError(f"there is no role {word!r}, only {', '.join(Role)}") from None
    return frozenset(found | ({Role.READ} if Role.WRITE in found else set()))


def anonymous_roles(text: str) -> frozenset[Role]:
    """Parses roles separated by commas, of callers that nobody knows.

    Raises:
        ValueError: there is no such role, or it is none for them.
    """
    roles = roles_of(word.strip() for word in text.split(",") if word.strip())
    if Role.RELAY in roles:
        raise ValueError("relay is no role for callers that nobody knows")
    return roles


@dataclass(frozen=True, slots=True)
class _Known:
    """The callers of one reading of the file."""

    by_token: dict[bytes, Caller] = field(default_factory=dict)
    by_name: dict[str, Caller] = field(default_factory=dict)


def read_access(path: Path) -> _Known:
    """Reads an access file.

    Raises:
        AccessError: it cannot be read, or means nothing.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise AccessError(f"{path}: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise AccessError(f"{path}: has more than {MAX_FILE_BYTES} bytes")
    try:
        entries = AccessFile.model_validate(yaml.safe_load(data)).callers
    except ValidationError as error:
        raise AccessError(f"{path}: {_sentence(error)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # What the parser says quotes the file, secrets included.
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise AccessError(f"{path}{where}: is no YAML") from None
    known = _Known()
    for entry in entries:
        if entry.token_sha256 is not None:
            known.by_token[bytes.fromhex(entry.token_sha256)] = entry.caller
        elif entry.certificate is not None:
            known.by_name[entry.certificate] = entry.caller
    return known


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ""
    for part in first["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    context: dict[str, Any] = first.get("ctx", {})
    what = str(context["error"]) if first["type"] == "value_error" else _spoken(first["msg"])
    return f"{place}: {what}" if place else what


def _spoken(message: str) -> str:
    return message[:1].lower() + message[1:]


# What it means.


class Access:
    """Who a caller is, by the present file.

    Args:
        path: of the file; None: nobody is known.
        anonymous: what callers may do that it does not know.

    Raises:
        AccessError: the file cannot be read, or means nothing.
    """

    def __init__(self, path: Path | None, anonymous: frozenset[Role]) -> None:
        self._path = path
        self._anonymous = Caller("", "", anonymous)
        self._version = self._present_version()
        self._known = _Known() if path is None else read_access(path)

    @property
    def knows_tokens(self) -> bool:
        return bool(self._known.by_token)

    @property
    def knows_certificates(self) -> bool:
        return bool(self._known.by_name)

    def identify(self, tokens: Sequence[str], names: Iterable[str]) -> Caller:
        """Returns who shows these bearer tokens, or has a certificate with these names.

        A token goes before a certificate. Who shows one that nobody has is not anonymous.

        Raises:
            UnknownCaller: the token is nobody's, there are several, or the names are those of
                several callers.
        """
        known = self._known
        if tokens:
            digest = hashlib.sha256(tokens[0].encode()).digest()
            if len(tokens) > 1 or digest not in known.by_token:
                raise UnknownCaller("the credentials are not known")
            return known.by_token[digest]
        callers = {known.by_name[name] for name in names if name in known.by_name}
        if len(callers) > 1:
            raise UnknownCaller("the certificate has the names of several callers")
        return callers.pop() if callers else self._anonymous

    async def follow(self) -> None:
        """Reads the file again whenever it has changed; until cancelled."""
        while self._path is not None:
            await asyncio.sleep(CHECK_SECONDS)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Reads the file if it has changed. If it means nothing now, the old meaning stays."""
        version = self._present_version()
        if self._path is None or version == self._version:
            return
        self._version = version
        try:
            self._known = read_access(self._path)
        except AccessError as error:
            log.error("access stays as it was: %s", error)
            return
        count = len(self._known.by_token) + len(self._known.by_name)
        log.info("access was read again: %d callers", count)

    def _present_version(self) -> tuple[int, int, int] | None:
        """What tells one state of the file from another; mounted secrets change their symlink."""
        if self._path is None:
            return None
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size
