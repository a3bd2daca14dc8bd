"""vLLM: one or several servers, or the engine in this process."""

import json
import time
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import httpx
from attrs.validators import gt

from posttrain.errors import SynthError
from posttrain.registry import block, key
from posttrain.synth.clients.auth import KeyAuth
from posttrain.synth.clients.served import ServedSynth
from posttrain.synth.ledger.database import Statement
from posttrain.synth.ledger.keys import CHAT, Request, as_secret
from posttrain.synth.ledger.replies import Action, Verdict
from posttrain.synth.ledger.session import Session, dumped
from posttrain.synth.sending.online import send_all
from posttrain.synth.sending.service import OpenAIDialect, Service
from posttrain.values import Secret

PARAMS_OF_WEIGHTS = ("revision", "quantization", "dtype", "hf_overrides", "load_format", "tokenizer", "chat_template")
"""Arguments of the engine that make it another model."""
ENGINE_KEYS = {"model", "messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"}
"""Keys of a body that are no sampling parameters."""


def as_urls(given: Any) -> list[str]:
    """Return a list of URLs, of which one may have been given by itself."""
    return [given] if isinstance(given, str) else list(given or [])


def as_dict(given: Any) -> dict[str, Any]:
    """Return sampling parameters as plain data; a `vllm.SamplingParams` says what differs from its defaults."""
    if given is None or isinstance(given, dict):
        return dict(given or {})
    plain = type(given)()
    return {
        name: getattr(given, name) for name in plain.__struct_fields__
        if not name.startswith("_") and getattr(given, name) != getattr(plain, name)
    }  # fmt: skip


@block("synth", "vllm")
class VllmSynth(ServedSynth):
    """Data from vLLM: give `base_url` for servers, or `model_params` for an engine in this process."""

    base_url: list[str] = key(factory=list, convert=as_urls)
    """Servers of the same model, such as `http://localhost:8000`; a request goes to the least busy one that answers."""
    model_params: dict[str, Any] = attrs.field(factory=dict)
    """Arguments of `vllm.LLM`: `{model: Qwen/Qwen3-0.6B, max_model_len: 4096}`."""
    sampling_params: dict[str, Any] = key(factory=dict, convert=as_dict)
    """What every request says unless it says something else: `{temperature: 0.7, max_tokens: 256}`."""
    chunk_size: int = key(2048, check=gt(0))
    """In process: requests given to the engine at once, and lost at most by a crash."""
    api_key: Secret | None = key(None, convert=as_secret)
    """Of servers started with one."""
    concurrency: int = key(256, check=gt(0))
    """Servers: requests in flight at most, all of them together."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts."""
        if bool(self.base_url) == bool(self.model_params):
            yield "base_url", "give either base_url (servers) or model_params (an engine in this process)"

    @property
    def namespace(self) -> str:
        """What answers: the weights if they were named, on whatever servers; otherwise the servers, or the model of the
        engine with its revision and, of a folder, its weights."""
        if self.weights:
            return "vllm"
        if self.base_url:
            return "vllm " + " ".join(sorted(url.rstrip("/").removesuffix("/v1") for url in self.base_url))
        params = self.model_params
        said = name = str(params.get("model", ""))
        if Path(name).is_dir():
            from posttrain.blocks.models.model import HFModel

            said = HFModel(name_or_path=name).fingerprint() or name
        own = {name: params[name] for name in PARAMS_OF_WEIGHTS if params.get(name) is not None}
        return f"vllm {said} {json.dumps(own, sort_keys=True, default=str)}"

    def body(self, model: str | None, messages: list[dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
        """Return the body of a chat request, sampling parameters included."""
        gone = [name for name in given if name.startswith("guided_")]
        if gone:
            raise SynthError(
                f"vLLM ignores {gone[0]} without a word: "
                f"say structured_outputs={{'{gone[0].removeprefix('guided_')}': ...}}"
            )
        named = model or self.model_params.get("model")
        return super().body(named, messages, {**self.sampling_params, **given})

    def send(self, session: Session) -> None:
        """Send what a session has to send."""
        for _, message in self.check():
            raise SynthError(message)
        if self.base_url:
            send_all(self.service(), session)
        else:
            Engine(self.llm, self.chunk_size, session).run()

    def service(self) -> Service:
        """Return where requests go; `/v1` before chat, nothing before `/classify`."""
        return self._one_by_one(
            [url.rstrip("/").removesuffix("/v1") for url in self.base_url], auth=KeyAuth(self.api_key, self.scrubber),
            dialect=VllmDialect(), concurrency=self.concurrency, start=self.concurrency,
        )  # fmt: skip

    @cached_property
    def llm(self) -> Any:
        """The engine, made when it is first needed."""
        try:
            from vllm import LLM
        except ImportError as error:
            raise SynthError(
                f"vllm cannot be imported ({error}): pip install 'posttrain[vllm]', or give base_url"
            ) from None
        return LLM(**self.model_params)


class VllmDialect(OpenAIDialect):
    """OpenAI's endpoints are below /v1, vLLM's own are not."""

    def request(self, request: Request, base: httpx.URL) -> tuple[str, httpx.URL, bytes]:
        """Return what to send."""
        prefix = "/v1" if request.endpoint in (CHAT, "/embeddings", "/completions", "/rerank") else ""
        return super().request(request._replace(endpoint=prefix + request.endpoint), base)


class Engine:
    """Sends chats to a `vllm.LLM` chunk by chunk; what a chunk brought is committed before the next one."""

    def __init__(self, llm: Any, chunk_size: int, session: Session) -> None:
        self.llm, self.chunk_size, self.session = llm, chunk_size, session

    def run(self) -> None:
        """Answer everything; between two chunks the run can end."""
        todo = self.session.todo()
        while not self.session.stopping.is_set() and (chunk := list(islice(todo, self.chunk_size))):
            for arguments, group in _alike(chunk):
                self._answer(group, arguments)
            self.session.report(self.session.progress)

    def _answer(self, group: list[Request], arguments: dict[str, Any]) -> None:
        """Answer requests that share the arguments of the call; one that is refused must not cost the others."""
        for request in group:
            self.session.budget.reserve(request)
        try:
            outputs = self._chat(group, arguments)
        except (ValueError, TypeError) as error:  # a prompt that is too long, an unknown parameter
            for request in group:
                self.session.budget.release(request)
            if len(group) > 1:
                middle = len(group) // 2
                self._answer(group[:middle], arguments)
                self._answer(group[middle:], arguments)
                return
            said = Verdict(Action.REFUSED, "refused_by_engine", f"{type(error).__name__}: {error}")
            self.session.ledger.record(self.session.failure(group[0], said, permanent=True))
            return
        recorded: list[Statement] = []
        for request, output in zip(group, outputs, strict=True):
            self.session.budget.release(request)
            reply = completion(request, output)
            recorded += self.session.result(request, reply, dumped(reply), output.request_id)
        self.session.ledger.record(recorded)

    def _chat(self, group: list[Request], arguments: dict[str, Any]) -> list[Any]:
        from vllm import SamplingParams

        bodies = [json.loads(request.body) for request in group]
        sampling = [SamplingParams(**sampling_arguments(body)) for body in bodies]
        return list(
            self.llm.chat([body["messages"] for body in bodies], sampling_params=sampling, use_tqdm=False, **arguments)
        )


def sampling_arguments(body: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `vllm.SamplingParams` that a chat body means."""
    made = {name: value for name, value in body.items() if name not in ENGINE_KEYS}
    if "max_completion_tokens" in made:
        made["max_tokens"] = made.pop("max_completion_tokens")
    made.setdefault("max_tokens", None)  # the engine's default is 16; a server's is what fits
    if made.pop("logprobs", None):
        made["logprobs"] = made.pop("top_logprobs", 0) or 0
    form = made.pop("response_format", None)
    wanted = made.pop("structured_outputs", None)
    if form and form.get("type") == "json_schema":
        wanted = {"json": form["json_schema"]["schema"]}
    elif form and form.get("type") == "json_object":
        wanted = {"json_object": True}
    if wanted:
        from vllm.sampling_params import StructuredOutputsParams

        made["structured_outputs"] = StructuredOutputsParams(**wanted)
    return made


def _alike(chunk: list[Request]) -> Iterator[tuple[dict[str, Any], list[Request]]]:
    """Group requests by the arguments that `LLM.chat` takes once for all conversations of a call."""
    groups: dict[str, tuple[dict[str, Any], list[Request]]] = {}
    for request in chunk:
        if not request.endpoint.endswith(CHAT):
            raise SynthError(f"an engine in this process answers chats only, not {request.endpoint}; give base_url")
        body = json.loads(request.body)
        arguments = {name: body[name] for name in ENGINE_KEYS - {"model", "messages"} if name in body}
        groups.setdefault(json.dumps(arguments, sort_keys=True), (arguments, []))[1].append(request)
    yield from groups.values()


def completion(request: Request, output: Any) -> dict[str, Any]:
    """Return a `vllm.RequestOutput` in the shape of a chat completion."""
    prompt = len(output.prompt_token_ids or ())
    made = sum(len(choice.token_ids) for choice in output.outputs)
    return {
        "id": output.request_id, "object": "chat.completion", "created": int(time.time()), "model": request.model,
        "choices": [_choice(choice) for choice in output.outputs],
        "usage": {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made},
    }  # fmt: skip


def _choice(choice: Any) -> dict[str, Any]:
    made = {
        "index": choice.index, "message": {"role": "assistant", "content": choice.text},
        "finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason,
    }  # fmt: skip
    if choice.logprobs is not None:
        tokens = zip(choice.token_ids, choice.logprobs, strict=True)
        made["logprobs"] = {"content": [_token(chosen, alternatives) for chosen, alternatives in tokens]}
    return made


def _token(chosen: int, alternatives: dict[int, Any]) -> dict[str, Any]:
    top = [{"token": a.decoded_token, "logprob": a.logprob} for a in alternatives.values()]
    said = alternatives[chosen]
    return {"token": said.decoded_token, "logprob": said.logprob, "top_logprobs": top}
