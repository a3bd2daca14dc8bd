"""A model of transformers in this process as a client: for a laptop, for reward models, for a model that is training.

What a chunk of requests brings is committed as one, and its random numbers are made from the requests themselves. So
the replies do not depend on where an earlier run was stopped. A server answers faster where there is a GPU.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from itertools import groupby, islice
from typing import Any

import attrs
from attrs.validators import gt

from posttrain.blocks.models.exports import chosen, ends_of, open_model
from posttrain.errors import RecipeError, SynthError
from posttrain.registry import block, key
from posttrain.synth.clients.client import Synth
from posttrain.synth.clients.structured import How, as_asked
from posttrain.synth.ledger.keys import Request
from posttrain.synth.ledger.replies import Action, Verdict
from posttrain.synth.ledger.session import Session, dumped

CLASSIFY = "/classify"
EMBEDDINGS = "/embeddings"
SAMPLING = {"temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens"}


@block("synth", "transformers")
class TransformersSynth(Synth):
    """Data from a model in this process: chats, the raw logits of a reward model (`/classify`), or embeddings."""

    name_or_path: str = ""
    """Folder of a run, of a model or of an adapter, or a hub name."""
    batch_size: int = key(64, check=gt(0))
    """Requests that are answered together, and lost at most by a crash."""
    device: str = "auto"
    """`cpu`, `cuda`, `mps`, or what there is."""
    loaded: Any = attrs.field(default=None, repr=False)
    """From Python: (model, tokenizer) to use instead of `name_or_path`; give `weights` with it."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is missing."""
        if not self.name_or_path and self.loaded is None:
            yield "name_or_path", "is missing: which model is to answer"
        if self.loaded is not None and not self.weights:
            yield "weights", "is needed with `loaded`: a name that changes when the weights do"

    @cached_property
    def namespace(self) -> str:
        """The weights, so that a model that was trained further answers again."""
        if self.weights:
            return f"transformers:{self.weights}"
        from posttrain.blocks.models.model import HFModel

        said = HFModel(name_or_path=self.name_or_path).fingerprint()
        return f"transformers:{said or self.name_or_path}"

    @property
    def _forms(self) -> How:
        return "prompt"

    @cached_property
    def _answers(self) -> str:
        """The namespace, which names the weights already; random numbers are made from it, so that it stays."""
        return self.namespace

    def body(self, model: str | None, messages: list[dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
        """Return the body of a chat request."""
        messages, given = as_asked(messages, given, self.structured or self._forms)
        if any(
            isinstance(m.get("content"), list) and any(p.get("type") != "text" for p in m["content"]) for m in messages
        ):
            raise SynthError("a model in this process answers text alone; serve it by vLLM for images")
        unknown = sorted(given.keys() - SAMPLING)
        if unknown:
            known = ", ".join(sorted(SAMPLING))
            raise SynthError(f"a model in this process takes {known}, not {unknown[0]}; serve it by vLLM for more")
        return super().body(model or self.name_or_path or "loaded", messages, given)

    def send(self, session: Session) -> None:
        """Answer what a session has to answer, chunk by chunk; between two chunks the run can end."""
        for _, message in self.check():
            raise SynthError(message)
        todo = session.todo()
        while not session.stopping.is_set() and (chunk := list(islice(todo, self.batch_size))):
            recorded = []
            for (endpoint, _), group in groupby(chunk, key=_alike):
                answer = {CLASSIFY: self._classify, EMBEDDINGS: self._embed}.get(endpoint, self._chat)
                for request in (requests := list(group)):
                    session.budget.reserve(request)
                for request, reply in zip(requests, answer(requests), strict=True):
                    session.budget.release(request)
                    if isinstance(reply, str):
                        said = Verdict(Action.REFUSED, "refused", reply)
                        recorded += session.failure(request, said, permanent=True)
                    else:
                        recorded += session.result(request, reply, dumped(reply), None)
            session.ledger.record(recorded)
            session.report(session.progress)

    # -- chats ------------------------------------------------------------------------

    def _chat(self, requests: list[Request]) -> list[dict[str, Any] | str]:
        """Return a chat completion for each request; they have the same sampling parameters."""
        import torch

        model, tokenizer = self.generator
        ends = ends_of(model, tokenizer)
        bodies = [json.loads(request.body) for request in requests]
        prompts = [
            tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
            for body in bodies
        ]  # fmt: skip
        asked = tokenizer(
            prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt",
            return_token_type_ids=False,
        ).to(_device_of(model))  # fmt: skip
        limit = int(bodies[0].get("max_completion_tokens") or bodies[0].get("max_tokens") or 256)
        seed = int.from_bytes(hashlib.sha256(b"".join(request.key for request in requests)).digest()[:7], "big")
        devices = [asked["input_ids"].device] if asked["input_ids"].device.type == "cuda" else []
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                ids = model.generate(
                    **asked, max_new_tokens=limit, use_cache=True, pad_token_id=_pad(tokenizer),
                    eos_token_id=sorted(ends), **sampling(bodies[0]),
                )  # fmt: skip
        finally:
            model.train(was_training)
        width = asked["input_ids"].shape[1]
        given = asked["attention_mask"].sum(1).tolist()
        return [
            _completion(tokenizer, request, made[width:].tolist(), count, ends)
            for request, made, count in zip(requests, ids, given, strict=True)
        ]

    @cached_property
    def generator(self) -> Any:
        """The model that answers chats, and its tokenizer."""
        if self.loaded is not None:
            return tuple(self.loaded)
        try:
            opened = open_model(self.name_or_path, self.device)
        except RecipeError as error:
            raise SynthError(str(error)) from error
        if _pad(opened.tokenizer) is None:
            raise SynthError(f"the tokenizer of {self.name_or_path} has neither a pad token nor an end of text")
        return opened.hf, opened.tokenizer

    # -- reward models ----------------------------------------------------------------

    def _classify(self, requests: list[Request]) -> list[dict[str, Any] | str]:
        """Return the logits of each conversation, in the shape of vLLM's `/classify`."""
        import torch

        model, tokenizer = self.classifier
        bodies = [json.loads(request.body) for request in requests]
        if any(body.get("use_activation", True) for body in bodies):
            return ["this client gives raw logits: say use_activation: false"] * len(requests)
        texts = [tokenizer.apply_chat_template(body["messages"], tokenize=False) for body in bodies]
        asked = tokenizer(
            texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt",
            return_token_type_ids=False,
        ).to(_device_of(model))  # fmt: skip
        with torch.no_grad():
            logits = model(**asked).logits.float().tolist()
        counts = asked["attention_mask"].sum(1).tolist()
        return [
            {"data": [{"index": 0, "probs": row, "num_classes": len(row)}], "usage": {"prompt_tokens": count}}
            for row, count in zip(logits, counts, strict=True)
        ]

    def _embed(self, requests: list[Request]) -> list[dict[str, Any] | str]:
        """Return the mean of the last hidden states over each text, of length 1 (Sentence-BERT, arXiv:1908.10084)."""
        import torch

        model, tokenizer = self.embedder
        texts = [json.loads(request.body)["input"] for request in requests]
        asked = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(_device_of(model))
        with torch.no_grad():
            states = model(**asked).last_hidden_state.float()  # [texts, tokens, dimensions]
        mask = asked["attention_mask"].unsqueeze(-1)
        means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1).clamp(min=1), dim=-1).tolist()
        return [
            {"data": [{"index": 0, "embedding": mean}], "usage": {"prompt_tokens": count}}
            for mean, count in zip(means, asked["attention_mask"].sum(1).tolist(), strict=True)
        ]

    @cached_property
    def embedder(self) -> tuple[Any, Any]:
        """The model that embeds, and its tokenizer."""
        from transformers import AutoModel

        return self._load(AutoModel)

    @cached_property
    def classifier(self) -> tuple[Any, Any]:
        """The model that scores, and its tokenizer."""
        from transformers import AutoModelForSequenceClassification

        return self._load(AutoModelForSequenceClassification)

    def _load(self, kind: Any) -> tuple[Any, Any]:
        from transformers import AutoTokenizer

        try:
            model = kind.from_pretrained(self.name_or_path).eval()
            tokenizer = AutoTokenizer.from_pretrained(self.name_or_path)
        except (OSError, ValueError) as error:
            raise SynthError(f"{self.name_or_path} cannot be loaded: {error}") from error
        if _pad(tokenizer) is None:
            raise SynthError(f"the tokenizer of {self.name_or_path} has neither a pad token nor an end of text")
        return model.to(chosen(self.device)), tokenizer


def sampling(body: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `generate` that a chat body means; as in OpenAI's interface, the temperature is 1."""
    temperature = body.get("temperature", 1.0)
    if not temperature:
        return {"do_sample": False}
    named = {"temperature": float(temperature), "top_p": body.get("top_p", 1.0), "top_k": body.get("top_k", 0)}
    return {"do_sample": True, **named}


def _alike(request: Request) -> tuple[str, str]:
    """What requests that are answered together have in common."""
    body = json.loads(request.body)
    return request.endpoint, json.dumps({name: body[name] for name in SAMPLING if name in body}, sort_keys=True)


def _completion(tokenizer: Any, request: Request, made: list[int], given: int, ends: set[int]) -> dict[str, Any]:
    stop = next((i for i, token in enumerate(made) if token in ends), None)
    kept = made if stop is None else made[:stop]
    message = {"role": "assistant", "content": tokenizer.decode(kept, skip_special_tokens=True)}
    count = len(kept) + (stop is not None)
    return {
        "object": "chat.completion", "model": request.model,
        "choices": [{"index": 0, "message": message, "finish_reason": "length" if stop is None else "stop"}],
        "usage": {"prompt_tokens": given, "completion_tokens": count, "total_tokens": given + count},
    }  # fmt: skip


def _pad(tokenizer: Any) -> int | None:
    found: int | None = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return found


def _device_of(model: Any) -> Any:
    return next(model.parameters()).device
