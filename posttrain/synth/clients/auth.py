"""Headers that say who asks. The key is looked up when it is used, and told to the scrubber."""

import base64
import hashlib
import json
import time
from collections.abc import Callable, Generator
from pathlib import Path

import httpx

from posttrain.errors import SynthError
from posttrain.synth.ledger.keys import Scrubber
from posttrain.values import Secret

TOKEN_SECONDS = 3540
"""Snowflake takes key-pair tokens of an hour at most."""
RENEW_BEFORE = 300


class KeyAuth(httpx.Auth):
    """A key in a header."""

    def __init__(
        self, secret: Secret | None, scrubber: Scrubber, header: str = "Authorization", scheme: str = "Bearer "
    ) -> None:
        self._secret, self._scrubber, self._header, self._scheme = secret, scrubber, header, scheme

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Add the header."""
        if self._secret is not None:
            request.headers[self._header] = self._scheme + self._scrubber.key(self._secret)
        yield request


class KeyPairAuth(httpx.Auth):
    """Snowflake's key-pair JWT (RS256), made again before it runs out and once more if it is refused.

    Source: docs.snowflake.com, developer-guide/sql-api/authenticating.
    """

    def __init__(
        self, account: str, user: str, key_file: Path, passphrase: Secret | None, scrubber: Scrubber,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        # An account locator goes without its region; both names in capitals.
        self._subject = f"{account.partition('.')[0].upper()}.{user.upper()}"
        self._file, self._passphrase, self._scrubber, self._clock = key_file, passphrase, scrubber, clock
        self._token, self._until = "", 0.0

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Add the header; a refused token is made again once."""
        request.headers["X-Snowflake-Authorization-Token-Type"] = "KEYPAIR_JWT"
        request.headers["Authorization"] = f"Bearer {self._fresh()}"
        response = yield request
        if response.status_code == 401:
            self._until = 0.0
            request.headers["Authorization"] = f"Bearer {self._fresh()}"
            yield request

    def _fresh(self) -> str:
        if self._clock() > self._until - RENEW_BEFORE:
            self._token = self._scrubber.learn(self._made())
        return self._token

    def _made(self) -> str:
        try:
            from cryptography.hazmat.primitives import hashes, serialization
            from cryptography.hazmat.primitives.asymmetric import padding, rsa
        except ImportError:
            raise SynthError("key-pair tokens need the package cryptography: pip install 'posttrain[cortex]'") from None
        password = self._scrubber.learn(self._passphrase.reveal().rstrip("\r\n")).encode() if self._passphrase else None
        try:
            key = serialization.load_pem_private_key(self._file.read_bytes(), password)
        except (OSError, ValueError, TypeError) as error:
            raise SynthError(f"the private key {self._file} cannot be read: {error}") from None
        if not isinstance(key, rsa.RSAPrivateKey):
            raise SynthError(f"{self._file} holds no RSA key, which Snowflake asks for")
        public = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        fingerprint = base64.b64encode(hashlib.sha256(public).digest()).decode()
        now = int(self._clock())
        self._until = now + TOKEN_SECONDS
        claims = {
            "iss": f"{self._subject}.SHA256:{fingerprint}", "sub": self._subject,
            "iat": now, "exp": now + TOKEN_SECONDS,
        }  # fmt: skip
        parts = [
            base64.urlsafe_b64encode(json.dumps(p).encode()).rstrip(b"=")
            for p in ({"alg": "RS256", "typ": "JWT"}, claims)
        ]
        signed = b".".join(parts)
        signature = key.sign(signed, padding.PKCS1v15(), hashes.SHA256())
        return (signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()
