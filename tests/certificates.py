"""A throw-away certificate authority for tests."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from protos.wire import Tls


class Authority:
    """Signs certificates for 127.0.0.1 into a directory."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        builder = _builder(self._name, self._name, self._key).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.ca = directory / f"{name}.pem"
        self.ca.write_bytes(_pem(builder.sign(self._key, hashes.SHA256())))

    def issue(
        self,
        name: str,
        *others: str,
        addresses: Sequence[str] = ("127.0.0.1",),
        expired: bool = False,
    ) -> Tls:
        """Makes a certificate that is good for both sides of a connection.

        Args:
            name: the common name, and that of the files.
            others: subject alternative names beside addresses; those with a colon are URIs.
            addresses: IP addresses among them.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(other) if ":" in other else x509.DNSName(other)
            for other in others
        ]
        names += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
        age = datetime.timedelta(hours=2 if expired else 0)
        builder = _builder(_name(name), self._name, key, age).add_extension(
            x509.SubjectAlternativeName(names), critical=False
        )
        files = self._directory / f"{name}.crt", self._directory / f"{name}.key"
        files[0].write_bytes(_pem(builder.sign(self._key, hashes.SHA256())))
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return Tls(files[0], files[1], self.ca)


def replace(old: Tls, new: Tls) -> None:
    """Puts another certificate, key and authority where those of a process are, one by one."""
    for target, source in (
        (old.certificate, new.certificate),
        (old.key, new.key),
        (old.ca, new.ca),
    ):
        assert target is not None and source is not None
        fresh = target.with_suffix(".fresh")
        fresh.write_bytes(source.read_bytes())
        fresh.rename(target)


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    age: datetime.timedelta = datetime.timedelta(),
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC) - age
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
