"""Certificates that are renewed while a process runs: files that change are read again."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import grpc

log = logging.getLogger(__name__)

# What tells one state of some files from another; mounted secrets change their symlinks.
Version: TypeAlias = tuple[tuple[int, int, int], ...]


_MISSING = (0, 0, 0)


def version_of(files: Iterable[Path | None]) -> Version:
    """Returns what changes when one of the files does."""
    found = []
    for file in files:
        if file is None:
            continue
        try:
            status = file.stat()
            found.append((status.st_mtime_ns, status.st_ino, status.st_size))
        except OSError:
            found.append(_MISSING)
    return tuple(found)


def is_renewed(version: Version, since: Version) -> bool:
    """Whether files have changed, and are all there."""
    return version != since and _MISSING not in version


class ServerCertificate:
    """A server's certificate, as its files have it when a client connects.

    What does not fit together, as while files are written one after the other, leaves the former
    certificate in use until they change again: gRPC sees to that.

    Args:
        ca: that must have signed clients' certificates; None: they need none.

    Raises:
        OSError: a file cannot be read.
    """

    def __init__(self, certificate: Path, key: Path, ca: Path | None) -> None:
        self._certificate, self._key, self._ca = certificate, key, ca
        self._version = self._present_version()
        self.credentials = grpc.dynamic_ssl_server_credentials(
            self._read(),
            self._renewed,  # type: ignore[arg-type]  # which may return None, says its docstring
            require_client_authentication=ca is not None,
        )

    def _present_version(self) -> Version:
        return version_of((self._certificate, self._key, self._ca))

    def _read(self) -> grpc.ServerCertificateConfiguration:
        pair = self._key.read_bytes(), self._certificate.read_bytes()
        return grpc.ssl_server_certificate_configuration(
            [pair], self._ca.read_bytes() if self._ca else None
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """For each handshake: the certificate if it has changed; on threads of gRPC's."""
        version = self._present_version()
        if not is_renewed(version, self._version):
            return None
        self._version = version
        try:
            configuration = self._read()
        except OSError as error:
            log.error("the certificate stays as it was: %s: %s", error.filename, error.strerror)
            return None
        log.info("the certificate in %s was read again", self._certificate)
        return configuration
