"""Who may call which method: the table, and the guard of both servers. Knows grpc."""

from __future__ import annotations

import logging
from typing import NoReturn

import grpc

from control_plane.access import (
    Access,
    Caller,
    Role,
    UnknownCaller,
    calling,
    is_tenant,
    set_calling,
)
from protos import wire
from protos.identity import HEALTH_METHODS, Guard, certificate_names

log = logging.getLogger(__name__)

# A replica that passes a call on names the tenant, and says that it does.
TENANT_KEY = "quire-tenant"
RELAY_KEY = "quire-relay"

_ANYBODY: frozenset[Role] = frozenset()
# Clients ask for the newer version first, and for the one that there is when it is unimplemented.
_REFLECTION_METHODS = tuple(
    f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
    for version in ("v1", "v1alpha")
)
_READING = (
    "ListEngines",
    "ListSequences",
    "GetBlockTable",
    "GetBlockMap",
    "ListPrefixes",
    "ListRegisteredPrefixes",
    "ExplainPrompt",
    "ExplainRequest",
)
_WRITING = (
    "RegisterPrefix",
    "UpdatePrefix",
    "UnregisterPrefix",
    "WarmPrefix",
    "DrainEngine",
)
_INFERENCE = ("Generate", "Cancel")

# One of the roles is needed; a method that is not here is open to nobody.
ROLES: dict[str, frozenset[Role]] = {
    **{
        f"/quire.inference.v1.InferenceService/{name}": frozenset({Role.GENERATE, Role.RELAY})
        for name in _INFERENCE
    },
    **{
        f"/quire.admin.v1.AdminService/{name}": frozenset({role, Role.RELAY})
        for role, names in ((Role.READ, _READING), (Role.WRITE, _WRITING))
        for name in names
    },
    **dict.fromkeys(HEALTH_METHODS, _ANYBODY),
}


def tenant_of(_: wire.Context) -> str:
    """Whose the call is that is being answered."""
    return calling().tenant


class Authorisation:
    """Lets callers do what the access file says, and nothing else.

    Handlers find the caller with `access.calling()`.
    """

    def __init__(self, access: Access, *, reflection: bool) -> None:
        self._access = access
        self._roles = ROLES | dict.fromkeys(_REFLECTION_METHODS if reflection else (), _ANYBODY)

    def guard(self) -> Guard:
        """Makes the interceptor of a server."""
        return Guard(self.check)

    def check(self, method: str, context: wire.Context) -> None:
        """Raises RpcError, UNAUTHENTICATED or PERMISSION_DENIED, unless the call may go on."""
        wanted = self._roles.get(method)
        if wanted is None:
            raise wire.failed(
                grpc.StatusCode.PERMISSION_DENIED, "NO_METHOD", "this method is open to nobody"
            )
        if not wanted:
            return
        caller = self._caller(method, context)
        if not caller.roles & wanted:
            # The first one that is not for replicas among themselves.
            _deny(method, caller, min(wanted - {Role.RELAY}))
        set_calling(caller)

    def _caller(self, method: str, context: wire.Context) -> Caller:
        """Who calls, and for which tenant."""
        metadata = [(key, str(value)) for key, value in context.invocation_metadata() or ()]
        tokens = [_token(value) for key, value in metadata if key == "authorization"]
        try:
            caller = self._access.identify(tokens, certificate_names(context))
        except UnknownCaller as unknown:
            log.info("%s was refused: %s", method, unknown)
            raise wire.failed(
                grpc.StatusCode.UNAUTHENTICATED, "UNKNOWN_CALLER", str(unknown)
            ) from None
        tenants = [value for key, value in metadata if key == TENANT_KEY]
        relayed = any(key == RELAY_KEY for key, _ in metadata)
        if not tenants and not relayed:
            return Caller(caller.name, caller.tenant, caller.roles - {Role.RELAY})
        return _passed_on(method, caller, tenants, relayed)


def _passed_on(method: str, caller: Caller, tenants: list[str], relayed: bool) -> Caller:
    """A call whose metadata says that it is another caller's.

    Who has no right to that may say only what is true anyway: where no caller is known, all are of
    one tenant, and replicas pass calls on to each other without any roles.
    """
    if len(tenants) > 1 or not all(map(is_tenant, tenants)):
        raise wire.bad_field(TENANT_KEY, "is no tenant")
    if relayed and tenants and Role.RELAY in caller.roles:
        return caller.for_tenant(tenants[0])
    if tenants and tenants[0] != caller.tenant:
        _deny(method, caller, Role.RELAY)
    return Caller(caller.name, caller.tenant, caller.roles - {Role.RELAY})


def _token(header: str) -> str:
    """The bearer token of an authorization header; of any other kind, what is nobody's token."""
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _deny(method: str, caller: Caller, role: Role) -> NoReturn:
    log.info("%s was refused to %s: it has no role %s", method, caller.name or "anonymous", role)
    raise wire.failed(
        grpc.StatusCode.PERMISSION_DENIED,
        "ROLE_MISSING",
        f"the caller has no role {role}",
        {"role": str(role)},
    )
