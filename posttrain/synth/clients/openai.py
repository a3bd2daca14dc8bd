"""OpenAI and whatever speaks its protocol; Azure OpenAI. In batches, or one by one."""

import os
from typing import Any, Literal

import attrs
import httpx
from attrs.validators import ge, gt, optional

from posttrain.errors import SynthError
from posttrain.registry import block, key
from posttrain.synth.clients.auth import KeyAuth
from posttrain.synth.clients.served import ServedSynth
from posttrain.synth.ledger.keys import as_secret
from posttrain.synth.ledger.session import Session
from posttrain.synth.sending.batches.run import BatchRun, with_batches
from posttrain.synth.sending.batches.service import BatchService
from posttrain.synth.sending.online import send_all
from posttrain.synth.sending.service import OpenAIDialect, Service
from posttrain.values import Secret


@attrs.frozen(kw_only=True, slots=False)
class OpenAIProtocol(ServedSynth):
    """What OpenAI and Azure share."""

    api_key: Secret | None = key(None, convert=as_secret)
    """Looked up in the environment unless given (OPENAI_API_KEY, AZURE_OPENAI_API_KEY). Never written or printed."""
    mode: Literal["batch", "online"] = "batch"
    """`batch`: Files and Batches, half the price, results within a day. `online`: one by one, at once."""
    concurrency: int = key(64, check=gt(0))
    """Online: requests in flight at most; fewer while the server says that it is too much."""
    rpm: float | None = key(None, check=optional(gt(0)))
    """Online: requests per minute at most; what the server announces, unless given."""
    tpm: float | None = key(None, check=optional(gt(0)))
    """Online: tokens per minute at most, by estimates; what the server announces, unless given."""
    poll_every: float = key(60.0, check=ge(0))
    """Batch: seconds between two looks at a batch."""
    reconcile_after: float = key(30.0, check=ge(0))
    """Batch: seconds between the two listings that must not show a batch before a lost call is made again."""
    batch_size: int | None = key(None, check=optional(gt(0)))
    """Batch: lines of a file at most; the provider's limit unless given."""
    max_rounds: int = key(3, check=gt(0))
    """Batch: how often one run sends a request that came back without a verdict."""

    @property
    def batched(self) -> bool:
        """Whether requests go into batches."""
        return self.mode == "batch"

    def send(self, session: Session) -> None:
        """Send what a session has to send."""
        if self.batched:
            with_batches(self.batch_service(), session, BatchRun.run)
        else:
            send_all(self.online_service(), session)

    def online_service(self) -> Service:
        """Return where requests go one by one."""
        return self._one_by_one(
            [self.url], auth=self.auth, headers=self.headers, dialect=OpenAIDialect(self.query),
            concurrency=self.concurrency, rpm=self.rpm, tpm=self.tpm,
        )  # fmt: skip

    def _batches(self, **more: Any) -> BatchService:
        if not self.batched:
            raise SynthError(f"this {type(self).__name__} has mode='online': there are no batches")
        size = {"max_lines": self.batch_size} if self.batch_size else {}
        return BatchService(
            url=self.url.rstrip("/") + "/", auth=self.auth, headers=self.headers, query=self.query,
            timeout=self.timeout, patience=self.patience, poll_every=self.poll_every,
            reconcile_after=self.reconcile_after, max_rounds=self.max_rounds, transport=self.transport, **more | size,
        )  # fmt: skip

    @property
    def url(self) -> str:
        """Base URL."""
        raise NotImplementedError

    @property
    def namespace(self) -> str:
        """The server: the same in both modes, so that one can take over from the other."""
        return self.url.rstrip("/")

    @property
    def auth(self) -> httpx.Auth:
        """Who asks."""
        raise NotImplementedError

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request, besides."""
        return {}

    @property
    def query(self) -> dict[str, str]:
        """Parameters of every URL."""
        return {}


@block("synth", "openai")
class OpenAISynth(OpenAIProtocol):
    """Data from OpenAI, or from any server that speaks its protocol.

    >>> OpenAISynth(api_key="sk-1", mode="online").api_key
    Given('...')
    """

    base_url: str | None = None
    """`https://api.openai.com/v1`, or OPENAI_BASE_URL, unless given."""
    organization: str | None = None
    """Sent as OpenAI-Organization."""
    project: str | None = None
    """Sent as OpenAI-Project."""

    @property
    def url(self) -> str:
        """Base URL."""
        return self.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"

    @property
    def auth(self) -> httpx.Auth:
        """The key as a bearer token."""
        return KeyAuth(self.api_key or Secret("OPENAI_API_KEY"), self.scrubber)

    @property
    def headers(self) -> dict[str, str]:
        """Whose account is charged."""
        given = {"OpenAI-Organization": self.organization, "OpenAI-Project": self.project}
        return {name: value for name, value in given.items() if value}

    def batch_service(self) -> BatchService:
        """Return where batches are made."""
        return self._batches()


@block("synth", "azure")
class AzureOpenAISynth(OpenAIProtocol):
    """Data from Azure OpenAI; `model` is the name of a deployment, and batches need one of a batch type."""

    azure_endpoint: str | None = None
    """`https://<resource>.openai.azure.com`; AZURE_OPENAI_ENDPOINT unless given."""
    api_version: str | None = None
    """Such as `2024-10-21`. Without one, the v1 interface is used, which needs none."""
    entra_token: Secret | None = key(None, convert=as_secret)
    """A token of Entra ID instead of a key."""
    line_url: str | None = None
    """What stands before `/chat/completions` in batch lines: nothing (classic) or `/v1`, unless given."""
    file_days: int | None = key(14, check=optional(ge(14)))
    """Days after which uploaded files go (14 to 30). Only 500 files without an end are allowed per resource."""

    def __attrs_post_init__(self) -> None:
        if self.file_days is not None and self.file_days > 30:
            raise ValueError(f"file_days must be 14 to 30, got {self.file_days}")

    @property
    def url(self) -> str:
        """Base URL."""
        endpoint = self.azure_endpoint or os.environ.get("AZURE_OPENAI_ENDPOINT")
        if not endpoint:
            raise SynthError("AzureOpenAISynth needs azure_endpoint='https://<resource>.openai.azure.com'")
        return endpoint.rstrip("/") + ("/openai" if self.api_version else "/openai/v1")

    @property
    def auth(self) -> httpx.Auth:
        """An Entra token, or the key in its own header."""
        if self.entra_token is not None:
            return KeyAuth(self.entra_token, self.scrubber)
        return KeyAuth(self.api_key or Secret("AZURE_OPENAI_API_KEY"), self.scrubber, "api-key", "")

    @property
    def query(self) -> dict[str, str]:
        """The version of the classic interface."""
        return {"api-version": self.api_version} if self.api_version else {}

    def online_service(self) -> Service:
        """Return where requests go; the classic interface has the deployment in the path."""
        service = super().online_service()
        return attrs.evolve(service, dialect=AzureDialect(self.query)) if self.api_version else service

    def batch_service(self) -> BatchService:
        """Return where batches are made. File expiry exists in the v1 interface and the previews of 2025."""
        prefix = self.line_url if self.line_url is not None else ("" if self.api_version else "/v1")
        expires = self.file_days is not None and (self.api_version is None or self.api_version >= "2025")
        expiry = {"expires_after.seconds": str((self.file_days or 0) * 86_400), "expires_after.anchor": "created_at"}
        return self._batches(line_prefix=prefix, expiry=expiry if expires else {}, max_lines=100_000)


class AzureDialect(OpenAIDialect):
    """The classic interface: the deployment is part of the path."""

    def request(self, request: Any, base: httpx.URL) -> tuple[str, httpx.URL, bytes]:
        """Return what to send."""
        return super().request(request._replace(endpoint=f"/deployments/{request.model}{request.endpoint}"), base)
