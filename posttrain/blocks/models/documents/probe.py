"""Which way keeps the documents of a row apart in a network: tried, never guessed from names.

Three short documents are packed into rows of a tiny copy of the model, with random weights and short windows, and
compared with each alone. A module through which documents leak (see leaks.py) is told to compute by document.
"""

import functools
import json
import logging
from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from posttrain.batch import Batch
from posttrain.blocks.layout import lay
from posttrain.blocks.models.causal import CausalLM
from posttrain.blocks.models.documents.attention import NAME
from posttrain.blocks.models.documents.known import known_way
from posttrain.blocks.models.documents.leaks import Calls, first_leak
from posttrain.blocks.models.documents.tiny import tiny
from posttrain.blocks.models.documents.trial import (
    CLOSE,
    GRADIENTS,
    LEAKS,
    WINDOW,
    Held,
    auto_of,
    close,
    gradients_differ,
    gradients_of,
    log_probs_of,
    on_the_side,
    set_attention,
)
from posttrain.blocks.models.documents.ways import Way, decoder_of, head_of
from posttrain.errors import RecipeError

LENGTHS = (21, 13, 18)
"""Of the documents: longer than the windows of a tiny copy, and none as long as another."""
TRIES = 8
"""So many kinds of modules of one network can be told to compute by document."""
log = logging.getLogger("posttrain")


@attrs.frozen
class Alone:
    """What a network gives for a document by itself."""

    ids: Tensor
    """int64 [tokens]."""
    log_probs: Tensor
    """[tokens - 1], of each token but the first."""
    calls: Calls
    gradients: list[Tensor | None]
    """Of their sum, by each parameter."""


def find_way(config: Any, name: str, attention: str | None, remote: bool = False) -> Way:
    """Return how a network of a configuration keeps documents apart.

    Args:
        config: of transformers.
        name: of the model, for messages.
        attention: which one the recipe asks for; None leaves it open.
        remote: whether its code comes with the model.

    Raises:
        RecipeError: no way does.
    """
    said = json.dumps(config.to_dict(), default=str, sort_keys=True)
    if remote:  # its code may change from one time to the next
        return _find_way(said, Held(config), name, attention, remote)
    return known_way([said, attention], lambda: _find_way(said, Held(config), name, attention, remote))


@functools.lru_cache(maxsize=64)
def _find_way(said: str, held: Held, name: str, attention: str | None, remote: bool) -> Way:
    problems: list[str] = []
    with on_the_side():
        try:
            hf, alone = twin(held.config, remote)
        except Exception as error:  # an architecture may want sizes that nobody can know
            log.info("%s: no tiny copy of it could be tried (%s): each document gets a row of its own", name, error)
            native = (attention if attention != NAME else None) or "eager"
            return Way(native, unfolds=True, plain_head=False, proven=False)
        if looks_ahead(hf):
            raise RecipeError(
                f"model {name!r} looks at later tokens, so it cannot be trained to predict them (no causal model)"
            )
        best: Way | None = None
        for number, (how, unfolds) in enumerate(list(candidates(hf, attention))):
            if best is not None and (unfolds or not best.separated):
                break
            if number:
                hf, alone = twin(held.config, remote)  # again: its modules were changed
            found = tried(hf, alone, how, unfolds)
            if isinstance(found, str):
                problems.append(f"{how} attention{' in rows of their own' if unfolds else ''}: {found}")
            elif best is None or len(found.separated) < len(best.separated):  # the fewer by document, the faster
                best = found
        if best is not None:
            return best
    raise RecipeError(f"model {name!r} cannot keep the documents of a row apart: {'; '.join(problems)}")


def twin(config: Any, remote: bool = False) -> tuple[Any, list[Alone]]:
    """Return a tiny network of the same architecture, and what it gives for each document alone."""
    more = {"trust_remote_code": True} if remote else {}
    made: list[Any] = []

    def works(small: Any) -> None:
        small._attn_implementation = None  # its own
        hf = auto_of(small).from_config(small, dtype=torch.float32, **more).eval()
        hf(input_ids=documents(small)[0][None], use_cache=False)
        made.append(hf)

    tiny(config, vocabulary=256, window=WINDOW, works=works)
    (hf,), found = made, []
    for ids in documents(hf.config):
        with Calls(hf) as calls:
            log_probs = log_probs_of(hf(input_ids=ids[None], use_cache=False).logits[0], ids)
        with torch.enable_grad():
            again = log_probs_of(hf(input_ids=ids[None], use_cache=False).logits[0], ids)
            gradients = gradients_of(hf, again.sum())
        found.append(Alone(ids, log_probs, calls, gradients))
    return hf, found


def documents(config: Any) -> list[Tensor]:
    """Return three documents of a model's tokens, int64 [tokens] each."""
    random = torch.Generator().manual_seed(0)
    known = config.get_text_config().vocab_size
    return [torch.randint(min(3, known - 1), known, (length,), generator=random) for length in LENGTHS]


def packed(ids: list[Tensor]) -> Batch:
    """Return them in two rows, of which one has padding; random weights may be zero for the token that is for it."""
    first, second, third = ((one.numpy(), np.ones(len(one), dtype=bool)) for one in ids)
    return lay([[first, second], [third]], int(first[0][0]))


def looks_ahead(hf: Any) -> bool:
    """Whether what a network says of a token depends on later ones."""
    ids = documents(hf.config)[0][None]
    other = torch.cat([ids[:, :10], ids.flip(1)[:, 10:]], 1)
    one, two = (hf(input_ids=given, use_cache=False).logits[0, :10].float() for given in (ids, other))
    return not close(one, two)


def candidates(hf: Any, attention: str | None) -> Iterator[tuple[str, bool]]:
    """Yield attentions, and whether each document has a row of its own, the best first."""
    native = hf.config.get_text_config()._attn_implementation or "eager"
    yield attention or NAME, False
    if attention != NAME:
        if attention is None:
            yield native, False
        yield attention or native, True


def tried(hf: Any, alone: list[Alone], attention: str, unfolds: bool) -> Way | str:
    """Return a way, if it keeps documents apart, or what went wrong."""
    try:
        set_attention(hf, attention)
    except ValueError as error:
        return str(error)[:200]
    if hf.config.get_text_config()._attn_implementation != attention:  # transformers has only warned
        return "transformers lets nobody choose the attention of this model"
    network, separated = CausalLM(hf), dict[str, bool]()
    for _ in range(TRIES):
        way = Way(attention, tuple(separated.items()), unfolds)
        network.keep_apart(way)
        calls = Calls(hf)
        try:
            with calls:
                right = agrees(network, alone)
            if right or agrees(network, alone, plain_head=False):
                with torch.enable_grad():
                    ours = gradients_of(hf, network(packed([one.ids for one in alone]), "log_probs").sum())
                wrong = gradients_differ(ours, [one.gradients for one in alone])
                return GRADIENTS if wrong else attrs.evolve(way, plain_head=right)
            problem, leak = LEAKS, first_leak(calls, [one.calls for one in alone], LENGTHS)
        except Exception as error:  # a module may say itself that it cannot, or not know what it is given
            problem, leak = f"{type(error).__name__}: {str(error)[:200]}", calls.inside()
        if unfolds or leak is None or separated.get(leak):
            return problem
        module = next(module for module in hf.modules() if type(module).__name__ == leak)
        if isinstance(module, type(decoder_of(hf))):
            return "its documents leak between layers"
        separated[leak] = leak in separated  # the second time, each document by itself
    return f"documents leak in {', '.join(separated)}"


def agrees(network: Any, alone: list[Alone], plain_head: bool = True) -> bool:
    """Whether packed documents get the log-probabilities that each gets alone.

    Args:
        network: is told whether its head is plain.
        alone: what the documents get.
        plain_head: whether to try it as a linear layer of the last hidden states; if it is none, the answer is False.
    """
    rows, head = packed([one.ids for one in alone]), head_of(network.base)
    network.plain_head = plain_head and type(head) is nn.Linear
    if plain_head:
        hidden = network.hidden_states(rows).flatten(0, 1)
        if not network.plain_head or hidden.shape[-1] != head.in_features:
            return False
    return close(network(rows, "log_probs"), torch.cat([one.log_probs for one in alone]))


def confirm(network: Any, name: str) -> None:
    """Try a network itself, if no tiny copy of it could be tried.

    Raises:
        RecipeError: packed documents do not get what each gets alone.
    """
    hf, training = network.base, network.training
    if hf.config.is_encoder_decoder:
        raise RecipeError(f"model {name!r} writes with a decoder what it reads with an encoder (no causal model)")
    network.eval()
    try:
        each = documents(hf.config)
        with torch.no_grad():
            alone = [log_probs_of(hf(input_ids=ids[None], use_cache=False).logits[0], ids) for ids in each]
            found = network(packed(each), "log_probs").float()
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            network.train()
            if trained := [parameter for parameter in hf.parameters() if parameter.requires_grad]:
                torch.autograd.grad(network(packed(each)), trained[0], allow_unused=True)
    except Exception as error:  # what a model wants besides tokens
        said = f"{type(error).__name__}: {error}"
        raise RecipeError(f"model {name!r} cannot be trained on tokens alone: {said}") from error
    finally:
        network.train(training)
    exact = hf.dtype == torch.float32
    expected = torch.cat(alone)
    if float((found - expected).abs().max()) > (CLOSE if exact else 0.05) * max(1.0, float(expected.abs().max())):
        raise RecipeError(f"model {name!r} cannot keep the documents of a row apart, not even in rows of their own")
