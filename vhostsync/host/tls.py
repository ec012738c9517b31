# SPDX-License-Identifier: Apache-2.0
"""TLS with certificates of both sides. They lie in one directory, under the names that libnbd, QEMU and
libvirt give them, and each side trusts whom the CA of that directory has signed. Reading them blocks."""

import ssl
from pathlib import Path
from typing import Final

from vhostsync.errors import ConfigError

AUTHORITY: Final = "ca-cert.pem"
REVOKED: Final = "ca-crl.pem"  # may be missing
CERTIFICATE: Final = "{side}-cert.pem"
KEY: Final = "{side}-key.pem"

# What the other side's alert means; else OpenSSL's own words are shown.
_ALERTS: Final = {
    "CERTIFICATE_REQUIRED": "the other side wants a certificate, and was shown none",
    "UNKNOWN_CA": "the other side does not trust who has signed the certificate of this one",
    "CERTIFICATE_EXPIRED": "the other side says that the certificate of this one has expired",
    "BAD_CERTIFICATE": "the other side refuses the certificate of this one",
    "CERTIFICATE_REVOKED": "the other side says that the certificate of this one was revoked",
    "UNSUPPORTED_CERTIFICATE": "the other side says that the certificate of this one is not for this use",
    "CERTIFICATE_UNKNOWN": "the other side refuses the certificate of this one",
    "WRONG_VERSION_NUMBER": "what answers does not speak TLS",
}


def files_of(folder: Path, side: str) -> list[Path]:
    """All that `context` reads."""
    names = (AUTHORITY, REVOKED, CERTIFICATE.format(side=side), KEY.format(side=side))
    return [folder / name for name in names]


def server_context(folder: Path) -> ssl.SSLContext:
    """For whoever is connected to. ConfigError."""
    return _context(ssl.PROTOCOL_TLS_SERVER, folder, "server")


def client_context(folder: Path) -> ssl.SSLContext:
    """For whoever connects; the name of the other side is verified. ConfigError."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, folder, "client")


def _context(protocol: int, folder: Path, side: str) -> ssl.SSLContext:
    authority, revoked, certificate, key = files_of(folder, side)
    for needed in (authority, certificate, key):
        try:
            needed.open("rb").close()
        except OSError as error:
            raise ConfigError(
                f"The TLS certificates in {folder} cannot be used: {needed.name}: {error.strerror}; there "
                "have to be "
                f"{authority.name}, {certificate.name} and {key.name}."
            ) from error
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(authority)
        if revoked.exists():
            context.load_verify_locations(revoked)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        context.load_cert_chain(certificate, key, password=lambda: "")  # or it would ask on the terminal
    except (OSError, ValueError) as error:
        raise ConfigError(f"The TLS certificates in {folder} cannot be used: {why(error)}.") from error
    return context


def why(error: BaseException) -> str:
    """Of a handshake that failed, or files that cannot be read, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate of the other side is refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        reason = error.reason or ""
        alert = next((words for part, words in _ALERTS.items() if reason.endswith(part)), None)
        return alert or reason.lower().replace("_", " ") or str(error)
    if isinstance(error, TimeoutError):
        return "it does not answer in time"
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
