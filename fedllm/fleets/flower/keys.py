"""Who may talk to whom: certificates, node keys, secrets, and the server's list of clients.

The server's folder holds ``ca.crt``, ``server.crt``, ``server.key``, ``link.secret`` and ``clients.yaml``; the key of
the certificate authority lies in ``ca/`` and is needed again only for another certificate. A node's folder holds
``ca.crt``, its own ``node`` and ``node.pub``, ``node.secret`` and ``policy.yaml``. Everything secret has mode 0600.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedllm.config import plain_yaml
from fedllm.config.schema import parse_section
from fedllm.config.types import Count
from fedllm.errors import FedError

DAYS = 825
"""A certificate's life; more is refused by some systems."""

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""A client's id: it becomes a folder's name on both sides."""


@dataclass(frozen=True)
class Member:
    """A client that the server knows.

    Args:
        key: its node's public key, in OpenSSH's format; empty on plain HTTP.
        most_rows: the largest number of rows that it may claim; the claim weighs its update in the average.
        most_rank: the largest rank that it may claim.
    """

    key: str = ""
    most_rows: Count | None = None
    most_rank: Count | None = None


@dataclass(frozen=True)
class Server:
    """The server's folder.

    Args:
        host: the name or address under which nodes reach it.
        port: the gate's.
        insecure: plain HTTP without keys, on loopback alone.
        clients: who may take part, by id.
    """

    host: str = "127.0.0.1"
    port: Count = 9443
    insecure: bool = False
    clients: Mapping[str, Member] = field(default_factory=dict)


def check_id(id: str) -> str:
    """Raises FedError where a client's id is none."""
    if not ID.fullmatch(id) or id in {".", ".."}:
        raise FedError(
            f"client id {id[:80]!r}: give 1 to 64 letters, digits, dots, dashes or underscores, and no mark first."
        )
    return id


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def write_secret(path: Path, content: bytes) -> None:
    """A new file that only its owner reads; it never exists with another mode."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)


def read_secret(path: Path) -> bytes:
    """The content of a file that nobody else can read.

    Raises:
        FedError: it is missing, or others may read it.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_IMODE(mode) & 0o077:
            raise FedError(f"{path} can be read by others (mode {stat.S_IMODE(mode):04o}): chmod 600 {path}")
        return path.read_bytes()
    except OSError as error:
        raise FedError(f"{path} cannot be read: {error.strerror}.") from error


def create_server(folder: Path, host: str, port: int, insecure: bool) -> None:
    """Fills a new server's folder.

    Raises:
        FedError: it holds one already, or ``insecure`` off loopback.
    """
    if insecure and not is_loopback(host):
        raise FedError(
            f"--insecure with --host {host}: without TLS everybody on the way reads and writes the updates. "
            "It is for 127.0.0.1 alone; leave it out."
        )
    if (folder / "clients.yaml").exists():
        raise FedError(f"{folder} is a server's folder already: remove it first, or give another.")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    write_secret(folder / "link.secret", secrets.token_bytes(32))
    if not insecure:
        _certificates(folder, host)
    save_server(folder, Server(host, port, insecure))


def load_server(folder: Path) -> Server:
    """The settings and clients of a server's folder."""
    path = folder / "clients.yaml"
    if not path.is_file():
        raise FedError(f"{folder} is no server's folder: make one with `fedllm serve init {folder} --host NAME`.")
    try:
        server: Server = parse_section(Server, plain_yaml.read(path), "")
        for id in server.clients:
            check_id(id)
    except FedError as error:
        raise FedError(f"{path}: {error}") from error
    if server.insecure and not is_loopback(server.host):
        raise FedError(f"{path}: insecure is for 127.0.0.1 alone, and host is {server.host}.")
    return server


def save_server(folder: Path, server: Server) -> None:
    clients = {
        id: {key: value for key, value in vars(member).items() if value is not None}
        for id, member in server.clients.items()
    }
    page = {"host": server.host, "port": server.port, "insecure": server.insecure, "clients": clients}
    scratch = folder / ".clients.yaml.writing"
    scratch.write_text(yaml.safe_dump(page, sort_keys=False), encoding="utf-8")
    scratch.replace(folder / "clients.yaml")


def allow(folder: Path, id: str, public: Path | None, most_rows: int | None, most_rank: int | None) -> None:
    """Adds a client to the server's list, or replaces its key and bounds.

    Raises:
        FedError: no usable key, or one that another client has.
    """
    server = load_server(folder)
    check_id(id)
    if taken := [other for other in server.clients if other.lower() == id.lower() and other != id]:
        raise FedError(f"client {id} and client {taken[0]} differ in case alone: folders are named after them.")
    if public is None and not server.insecure:
        raise FedError(f"client {id} needs its node's public key: the file node.pub that `fedllm join init` made.")
    key = "" if public is None else public_key_text(public)
    for other, member in server.clients.items():
        if key and member.key == key and other != id:
            raise FedError(f"client {other} has this key already: every client has a node of its own.")
    member = Member(key, most_rows, most_rank)
    save_server(folder, Server(server.host, server.port, server.insecure, {**server.clients, id: member}))


def public_key_text(path: Path) -> str:
    """An OpenSSH public key without its comment."""
    try:
        key = serialization.load_ssh_public_key(path.read_bytes()[:10_000])
    except OSError as error:
        raise FedError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FedError(f"{path} is no public key in OpenSSH's format: {str(error)[:100]}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise FedError(f"{path}: Flower takes keys on an elliptic curve (ecdsa-sha2-nistp384) alone.")
    openssh = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return openssh.decode()


def registered_form(text: str) -> bytes:
    """A public key as the SuperLink stores it: PEM."""
    key = serialization.load_ssh_public_key(text.encode())
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def create_node(folder: Path, client: str, policy: str) -> str:
    """Fills a new node's folder and returns the public half of its key."""
    check_id(client)
    if (folder / "policy.yaml").exists():
        raise FedError(f"{folder} is a node's folder already: remove it first, or give another.")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_secret(folder / "node", private)
    write_secret(folder / "node.secret", secrets.token_bytes(32))
    (folder / "node.pub").write_text(f"{public.decode()} {client}\n")
    (folder / "policy.yaml").write_text(policy, encoding="utf-8")
    return f"{public.decode()} {client}"


def _certificates(folder: Path, host: str) -> None:
    """A certificate authority, and a server's certificate for ``host`` and for loopback."""
    (folder / "ca").mkdir(mode=0o700)
    authority = ec.generate_private_key(ec.SECP384R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedllm federation CA")])
    root = (
        _blank(issuer, issuer, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA384())
    )
    server = ec.generate_private_key(ec.SECP384R1())
    names = [_general(name) for name in dict.fromkeys([host, "localhost", "127.0.0.1"])]
    certificate = (
        _blank(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "superlink")]), issuer, server.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA384())
    )
    write_secret(folder / "ca" / "ca.key", _pem(authority))
    write_secret(folder / "server.key", _pem(server))
    (folder / "ca.crt").write_bytes(root.public_bytes(serialization.Encoding.PEM))
    (folder / "server.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _blank(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=DAYS))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def clients_by_key(members: Mapping[str, Member]) -> dict[bytes, str]:
    """Public key, as the SuperLink knows it -> the client that it belongs to."""
    return {registered_form(member.key): id for id, member in members.items() if member.key}
