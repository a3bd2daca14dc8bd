"""Which way keeps the documents of a row apart in a network: tried, never guessed from names.

Three short documents are packed into rows of a tiny twin of the model, with random weights and short windows, and
compared with each alone. A module that leaks is found by its inputs, which are right, and its outputs, which are not.
"""

import functools
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from posttrain.batch import Batch
from posttrain.blocks.layout import lay
from posttrain.blocks.models.causal import CausalLM
from posttrain.blocks.models.documents.attention import NAME
from posttrain.blocks.models.documents.known import known_way
from posttrain.blocks.models.documents.tiny import tiny
from posttrain.blocks.models.documents.ways import Way, decoder_of, flat, head_of
from posttrain.errors import RecipeError

CLOSE = 1e-4
"""Of the largest number: float32 in another order differs less, a leak more."""
LENGTHS = (21, 13, 18)
"""Of the documents: longer than the windows of a twin, and none as long as another."""
WINDOW = 8
LEAKS = "each document gets other numbers than alone"
GRADIENTS = "its gradients are not those of each document alone"
STEEP = 1e-3
"""Of the whole gradient: some recurrences are badly conditioned in float32."""
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
    calls: "Calls"
    slopes: list[Tensor | None]
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


@attrs.frozen(eq=False)
class Held:
    """A configuration beside its text, by which a cache tells it from others."""

    config: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held)

    def __hash__(self) -> int:
        return 0


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


@contextmanager
def on_the_side() -> Iterator[None]:
    """Build and compute on the CPU, without gradients, and leave random numbers and libraries as they were."""
    from transformers.utils import logging as theirs

    level = theirs.get_verbosity()
    theirs.set_verbosity_error()
    try:
        with (
            torch.device("cpu"),
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            torch.autocast("cpu", enabled=False),
        ):
            torch.manual_seed(0)
            yield
    finally:
        theirs.set_verbosity(level)


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
            logits = hf(input_ids=ids[None], use_cache=False).logits[0].float()
        log_probs = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        with torch.enable_grad():
            again = hf(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
            slopes = slopes_of(hf, again.gather(1, ids[1:, None]).sum())
        found.append(Alone(ids, log_probs, calls, slopes))
    return hf, found


def slopes_of(hf: Any, total: Tensor) -> list[Tensor | None]:
    """Return the gradient of a number by each parameter that is trained; a bias that experts are chosen by is not."""
    trained = [parameter for parameter in hf.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(total, trained, allow_unused=True))


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
        with torch.no_grad():
            alone = []
            for ids in documents(hf.config):
                logits = hf(input_ids=ids[None], use_cache=False).logits[0].float()
                alone.append(logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0])
            rows = packed([Alone(ids, x, Calls(hf), []) for ids, x in zip(documents(hf.config), alone, strict=True)])
            found = network(rows, "log_probs").float()
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            network.train()
            if trained := [parameter for parameter in hf.parameters() if parameter.requires_grad]:
                torch.autograd.grad(network(rows), trained[0], allow_unused=True)
    except Exception as error:  # what a model wants besides tokens
        raise RecipeError(
            f"model {name!r} cannot be trained on tokens alone: {type(error).__name__}: {error}"
        ) from error
    finally:
        network.train(training)
    exact = hf.dtype == torch.float32
    expected = torch.cat(alone)
    if float((found - expected).abs().max()) > (CLOSE if exact else 0.05) * max(1.0, float(expected.abs().max())):
        raise RecipeError(f"model {name!r} cannot keep the documents of a row apart, not even in rows of their own")


def looks_ahead(hf: Any) -> bool:
    """Whether what a network says of a token depends on later ones."""
    ids = documents(hf.config)[0][None]
    other = torch.cat([ids[:, :10], ids.flip(1)[:, 10:]], 1)
    one, two = (hf(input_ids=given, use_cache=False).logits[0, :10].float() for given in (ids, other))
    return not close(one, two)


def auto_of(config: Any) -> Any:
    """Return the class of transformers that loads a language model, or one of images and text."""
    import transformers

    causal, both = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    return both if type(config) in both._model_mapping else causal


def documents(config: Any) -> list[Tensor]:
    """Return three documents of a model's tokens, int64 [tokens] each."""
    random = torch.Generator().manual_seed(0)
    known = config.get_text_config().vocab_size
    return [torch.randint(min(3, known - 1), known, (length,), generator=random) for length in LENGTHS]


def packed(alone: list[Alone]) -> Batch:
    """Return them in two rows, of which one has padding; random weights may be zero for the token that is for it."""
    import numpy as np

    first, second, third = ((one.ids.numpy(), np.ones(len(one.ids), dtype=bool)) for one in alone)
    return lay([[first, second], [third]], int(first[0][0]))


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
                return attrs.evolve(way, plain_head=right) if learns_alike(network, alone) else GRADIENTS
            problem, leak = LEAKS, first_leak(hf, calls, alone)
        except Exception as error:  # a module may say itself that it cannot, or not know what it is given
            problem, leak = f"{type(error).__name__}: {str(error)[:200]}", calls.inside()
        if unfolds or leak is None or separated.get(leak):
            return problem
        if isinstance(hf.get_submodule(name_of(hf, leak)), type(decoder_of(hf))):
            return "its documents leak between layers"
        separated[leak] = leak in separated  # the second time, each document by itself
    return f"documents leak in {', '.join(separated)}"


def set_attention(hf: Any, attention: str) -> None:
    """Let the language model use an attention; what sees images keeps its own."""
    text = next(
        (name for name in hf.config.sub_configs if getattr(hf.config, name) is hf.config.get_text_config()), None
    )
    hf.set_attn_implementation(attention if text is None else {text: attention})


def agrees(network: Any, alone: list[Alone], plain_head: bool = True) -> bool:
    """Whether packed documents get the log-probabilities that each gets alone."""
    expected = torch.cat([one.log_probs for one in alone])
    network.plain_head = plain_head and type(head_of(network.base)) is nn.Linear
    if plain_head:
        hidden = network.hidden_states(packed(alone)).flatten(0, 1)
        head = head_of(network.base)
        if not network.plain_head or hidden.shape[-1] != head.in_features:
            return False
    return close(network(packed(alone), "log_probs"), expected)


def learns_alike(network: Any, alone: list[Alone]) -> bool:
    """Whether packed documents have the gradient that they have together, each alone."""
    with torch.enable_grad():
        ours = slopes_of(network.base, network(packed(alone), "log_probs").sum())
    return not slopes_differ(ours, [one.slopes for one in alone])


def slopes_differ(ours: list[Tensor | None], each: list[list[Tensor | None]]) -> bool:
    """Whether a gradient differs from the sum of some others."""
    differ = whole = 0.0
    for slope, *others in zip(ours, *each, strict=True):
        theirs = sum((x for x in others if x is not None), start=torch.zeros(()))
        differ += float(((0.0 if slope is None else slope) - theirs).square().sum())
        whole += float(theirs.square().sum())
    if not math.isfinite(whole):  # transformers' own is not a number: nothing can be said
        return False
    return not differ <= STEEP**2 * whole  # also if ours is not a number


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors hold the same numbers, but for the order of sums."""
    return bool((found - expected).abs().max() <= CLOSE * max(1.0, float(expected.abs().max())))


class Calls:
    """What each module of a network was given and gave, meanwhile."""

    def __init__(self, hf: nn.Module) -> None:
        self.hf, self.seen, self.entered = hf, list[tuple[str, list[Tensor], list[Tensor]]](), list[str]()

    def __enter__(self) -> "Calls":
        self.hooks = []
        for name, module in self.hf.named_modules():
            note = functools.partial(self.note, name)
            self.hooks.append(module.register_forward_pre_hook(functools.partial(self.enter, name)))
            self.hooks.append(module.register_forward_hook(note, with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        """Remember that a call has begun."""
        self.entered.append(name)

    def inside(self) -> str | None:
        """Return the class of the innermost module whose call has not come to its end."""
        return type(self.hf.get_submodule(self.entered[-1])).__name__ if self.entered else None

    def note(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Remember a call."""
        self.entered.pop()
        outputs = output.values() if isinstance(output, dict) else (output,)
        self.seen.append((name, tensors((*args, *kwargs.values())), tensors(outputs)))

    def of(self, name: str) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Return the calls of one module."""
        return [(given, gave) for known, given, gave in self.seen if known == name]


def tensors(values: Any) -> list[Tensor]:
    """Return the floating-point tensors among values."""
    return [x for x in flat(tuple(values)) if isinstance(x, Tensor) and x.is_floating_point()]


def first_leak(hf: nn.Module, calls: Calls, alone: list[Alone]) -> str | None:
    """Return the class of the first module whose inputs are those of each document alone, and whose outputs are not."""
    counted: dict[str, int] = {}
    for name, given, gave in calls.seen:  # in the order in which they end, so the innermost comes first
        number = counted[name] = counted.get(name, -1) + 1
        theirs = [one.calls.of(name) for one in alone]
        if any(number >= len(found) for found in theirs):
            continue
        inputs = [same(given, [found[number][0] for found in theirs])]
        if inputs == [True] and same(gave, [found[number][1] for found in theirs]) is False:
            return type(hf.get_submodule(name)).__name__
    return None


def same(rows: list[Tensor], each: list[list[Tensor]]) -> bool | None:
    """Whether the tensors of rows hold what those of each document do; None if none of them holds tokens."""
    compared = None
    places = [(0, 0), (0, LENGTHS[0]), (1, 0)]
    for number, laid in enumerate(rows):
        if laid.ndim < 2 or laid.shape[:2] != (2, LENGTHS[0] + LENGTHS[1]):
            continue
        for (row, at), length, tensors_ in zip(places, LENGTHS, each, strict=True):
            one = tensors_[number] if number < len(tensors_) else None
            if one is None or one.shape[:2] != (1, length) or one.shape[2:] != laid.shape[2:]:
                continue
            if not close(laid[row, at : at + length], one[0]):
                return False
            compared = True
    return compared


def name_of(hf: nn.Module, kind: str) -> str:
    """Return the name of the first module of a class."""
    return next(str(name) for name, module in hf.named_modules() if type(module).__name__ == kind)
