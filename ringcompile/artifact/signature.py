"""Signed artifacts: whoever has the public key can tell that the holder of the other one made them.

The signature is over the manifest's digest, which covers the digests of every other file and of all
weights. Keys are ed25519 in PEM files, as `openssl genpkey -algorithm ed25519` writes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringcompile.artifact.files import SIGNATURE
from ringcompile.artifact.opened import OpenFile, OpenFolder, unreadable
from ringcompile.errors import RingCompileError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_PURPOSE = b"ringcompile artifact, ed25519\n"
_MAX_BYTES = 1024


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """The key that signs.

    Raises:
        RingCompileError: it cannot be read, is no ed25519 key, or is locked by a password.
    """
    library = _library()
    key = _parsed(path, lambda content: library.serialization.load_pem_private_key(content, None))
    if not isinstance(key, library.ed25519.Ed25519PrivateKey):
        raise _no_key(path, "private")
    return key


def sign(identity: str, key: Ed25519PrivateKey) -> str:
    """The text of a signature over an artifact's identity."""
    return key.sign(_PURPOSE + identity.encode()).hex() + "\n"


def check_signature(folder: OpenFolder, identity: str, key: Path) -> None:
    """Compare an artifact's signature with a public key.

    Args:
        folder: the artifact.
        identity: the digest of its manifest, which was compared with the manifest.
        key: a PEM file.

    Raises:
        RingCompileError: there is no signature, or it was made with another key or for another
            manifest; or the key cannot be read.
    """
    library = _library()
    public = _parsed(key, library.serialization.load_pem_public_key)
    if not isinstance(public, library.ed25519.Ed25519PublicKey):
        raise _no_key(key, "public")
    try:
        text = OpenFile(folder.path / SIGNATURE, folder).read(0, _MAX_BYTES).decode().strip()
        public.verify(bytes.fromhex(text), _PURPOSE + identity.encode())
    except FileNotFoundError:
        raise RingCompileError(
            f"'{folder.path}' is not signed", hint="ask its maker for a signed one (--sign)"
        ) from None
    except (library.InvalidSignature, ValueError):
        raise RingCompileError(
            f"the signature of '{folder.path}' was not made by the holder of '{key}' for this "
            "content",
            hint="do not use this artifact, or name the key of who signed it",
        ) from None


def _parsed(path: Path, parse: Any) -> Any:
    try:
        return parse(OpenFile(path).read(0, 1 << 16))
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, TypeError) as error:
        raise RingCompileError(
            f"cannot read a key from '{path}': {error}",
            hint="write one with `openssl genpkey -algorithm ed25519 -out key.pem`, and its public "
            "part with `openssl pkey -in key.pem -pubout -out key.pub`",
        ) from error


def _no_key(path: Path, kind: str) -> RingCompileError:
    return RingCompileError(f"'{path}' is not an ed25519 {kind} key")


class _Library:
    """What is used of `cryptography`, which need not be installed."""

    def __init__(self) -> None:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519

        self.InvalidSignature = InvalidSignature
        self.serialization, self.ed25519 = serialization, ed25519


def _library() -> _Library:
    try:
        return _Library()
    except ImportError:
        raise RingCompileError(
            "signatures need the package cryptography",
            hint="pip install 'ringcompile[sign]'",
        ) from None
