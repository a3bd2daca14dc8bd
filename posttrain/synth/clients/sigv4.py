"""AWS Signature Version 4: requests that are signed with a secret key.

Source: docs.aws.amazon.com, IAM User Guide, "Create a signed AWS API request"; AWS' signature test suite.
"""

import hashlib
import hmac
import time
from collections.abc import Callable, Generator
from urllib.parse import parse_qsl, quote

import httpx

from posttrain.synth.ledger.keys import Scrubber
from posttrain.values import Secret

ALGORITHM = "AWS4-HMAC-SHA256"
SIGNED = ("content-type", "host", "x-amz-date", "x-amz-security-token")
"""Headers that are signed where they are there; proxies may change others."""


class SigV4Auth(httpx.Auth):
    """Signs each request."""

    requires_request_body = True

    def __init__(
        self, access_key: Secret, secret_key: Secret, session_token: Secret | None, region: str, service: str,
        scrubber: Scrubber, clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._access, self._secret, self._token = access_key, secret_key, session_token
        self._region, self._service, self._scrubber, self._clock = region, service, scrubber, clock

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Add the headers."""
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._clock()))
        request.headers["x-amz-date"] = now
        if self._token is not None:
            request.headers["x-amz-security-token"] = self._scrubber.key(self._token)
        scope = f"{now[:8]}/{self._region}/{self._service}/aws4_request"
        canonical, names = canonical_request(request)
        to_sign = "\n".join((ALGORITHM, now, scope, hashlib.sha256(canonical.encode()).hexdigest()))
        key = ("AWS4" + self._scrubber.key(self._secret)).encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
        request.headers["authorization"] = (
            f"{ALGORITHM} Credential={self._scrubber.key(self._access)}/{scope}, SignedHeaders={names}, "
            f"Signature={signature}"
        )
        yield request


def canonical_request(request: httpx.Request) -> tuple[str, str]:
    """Return (what is signed, names of the headers in it). The path is encoded once more, as all services but S3 do."""
    raw, _, query = request.url.raw_path.decode().partition("?")
    pairs = sorted((quote(k, safe="-_.~"), quote(v, safe="-_.~")) for k, v in parse_qsl(query, keep_blank_values=True))
    headers = {name: " ".join(request.headers[name].split()) for name in SIGNED if name in request.headers}
    names = ";".join(headers)
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    body = hashlib.sha256(request.content).hexdigest()
    parts = (request.method, quote(raw, safe="/-_.~"), "&".join(f"{k}={v}" for k, v in pairs), lines, names, body)
    return "\n".join(parts), names
