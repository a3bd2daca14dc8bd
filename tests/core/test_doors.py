"""What a method of one's own can reach: columns of rows, terms of a loss, updates, optimizers, tensors in checkpoints."""

import json
from pathlib import Path
from typing import Any, Protocol

import attrs
import numpy as np
import pytest
import torch
from ranks import on_two_ranks
from toy import LLAMA, InMemory, document, losses, metrics, network, pair, trainer

import posttrain
from posttrain import EMA, Batch, HFModel, JoinedOptimizer, SFTData, SFTTrainer, Term, block, kind
from posttrain.blocks.data.encoding.encoders import ChatEncoder
from posttrain.blocks.data.loader import MapLoader
from posttrain.blocks.layout import Column, Example, collate, collate_groups, collate_pairs, lay
from posttrain.errors import CheckpointError, RecipeError, TrainingError
from posttrain.interfaces import Loaders

# -- batches --------------------------------------------------------------------------


def test_a_batch_reads_like_a_mapping_and_says_what_it_has() -> None:
    batch = lay([[document(1)]], 0).but(reward=torch.ones(3))
    assert batch["weight"] == batch.weight == len(batch["targets"])
    assert {**batch}["reward"] is batch["reward"]
    assert "branch" not in batch
    assert batch.get("branch", 5) == 5
    with pytest.raises(KeyError, match="no 'rewards'; it has .*reward"):
        batch["rewards"]


def test_every_tensor_of_a_batch_moves() -> None:
    columns = {"w": Column("token"), "types": Column("token", "int64", argument=True)}
    groups = [Example((document(n), document(n + 1)), values_of(n, n + 1)) for n in (1, 5)]
    batch = collate_groups([groups], columns=columns).but(nested={"pixels": torch.ones(2)})
    moved = batch.map(lambda x: x.to("meta"))
    assert moved.branch is not None
    found = [
        moved.input_ids, moved["w"], moved.arguments["types"].values, moved["nested"]["pixels"],
        moved.branch.kv_index, moved.branch.arguments["types"].values,
    ]  # fmt: skip
    assert all(tensor.is_meta for tensor in found)


def values_of(*seeds: int) -> dict[str, Any]:
    """Values per token that say where they came from."""
    ids = [document(seed)[0] for seed in seeds]
    return {"w": tuple(one.astype(np.float32) for one in ids), "types": tuple(one % 2 for one in ids)}


def test_values_per_token_end_up_at_their_tokens() -> None:
    columns = {"w": Column("token"), "types": Column("target", "int64")}
    rows = [[Example((document(n),), values_of(n)) for n in row] for row in ((1, 2), (3,))]
    batch = collate(rows, 4, columns=columns)
    real = torch.arange(batch.input_ids.shape[1]) < batch.row_lengths[:, None]
    assert torch.equal(batch["w"], batch.input_ids.float() * real)
    assert torch.equal(batch["types"], batch.targets % 2)
    parts = [batch.columns(place, 4, None) for place in range(4)]
    assert torch.equal(torch.cat([part["w"] for part in parts], -1), batch["w"])
    assert all(torch.equal(part["types"], part.targets % 2) for part in parts)


def test_positions_may_have_more_axes() -> None:
    batch = collate_pairs([[pair(1), pair(2)]], columns={})
    many = batch.position_ids.expand(3, *batch.position_ids.shape)
    part = batch.but(position_ids=many[..., : batch.input_ids.shape[1] // 2 * 2]).columns(0, 2, None)
    assert part.position_ids.shape == (3, *part.input_ids.shape)
    from posttrain.blocks.layout import branched

    sizes = [len(ids) for example in (pair(1), pair(2)) for ids, _ in example.documents]
    one, three = (branched(x, sizes, [2, 2]) for x in (batch, batch.but(position_ids=many)))
    assert torch.equal(three.position_ids, one.position_ids.expand(3, *one.position_ids.shape))


def test_replies_to_one_prompt_are_computed_with_it_once() -> None:
    """Groups of several, one of a single document, one whose replies share nothing."""
    prompt, random = document(7)[0], np.random.default_rng(0)

    def reply(n: int) -> Any:
        ids = np.concatenate([prompt, random.integers(3, 90, n)])
        return ids, np.arange(len(ids)) >= len(prompt)

    group = Example(tuple(reply(n) for n in (3, 5, 2, 6)))
    rows = [[group, Example((document(2),)), Example((document(3), document(4), document(5)))]]
    batch = collate_groups(rows)
    assert batch.branch is not None
    assert batch.branch.input_ids.numel() == batch.tokens - 3 * len(prompt)
    net = network().build(None)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.3)
    apart = net(batch.but(branch=None), "log_probs")
    torch.testing.assert_close(net(batch, "log_probs"), apart, rtol=1e-5, atol=1e-5)
    sums = apart.new_zeros(8).index_add(0, batch["document"], torch.ones_like(apart))
    assert torch.equal(sums, batch["lengths"])
    assert batch.counts["documents"] == 8


def test_the_network_has_no_output_that_it_does_not_know(tmp_path: Path) -> None:
    net = network().build(None)
    with pytest.raises(TrainingError, match="no output 'logprobs'; did you mean 'log_probs'"):
        net(lay([[document(1)]], 0), "logprobs")


# -- from rows to the loss ------------------------------------------------------------


def chats(folder: Path, rows: int = 12) -> Path:
    file = folder / "chats.jsonl"
    lines = [{"prompt": f"what is {n}?", "completion": f"it is {n} " * (1 + n % 4), "answer": [n]} for n in range(rows)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@block("trainer", "with-answers")
class WithAnswers(SFTTrainer):
    """Looks at what came along with the rows."""

    seen: list[Any] = attrs.field(factory=list)

    def loss(self, batch: Batch) -> Any:
        said = [self.run.tokenizer.decode(ids) for _, ids, _ in batch.documents()]
        self.seen.extend(zip(said, batch["answer"], strict=True))
        return super().loss(batch)


@pytest.mark.parametrize("stream", [False, True])
def test_columns_of_the_rows_reach_the_loss(tmp_path: Path, tiny_model: Path, stream: bool) -> None:
    made = WithAnswers(
        model=HFModel(name_or_path=str(tiny_model)),
        data=SFTData(
            sources=[posttrain.Source(name_or_path=str(chats(tmp_path)), stream=stream)], keep=["answer"],
            max_length=128, cache_dir=tmp_path / "cache",
        ),
        max_steps=6, micro_batch_size=2, logger=[], output_dir=tmp_path / "run", accelerator="cpu",
    )  # fmt: skip
    made.train()
    assert len(made.seen) >= 12
    for text, (answer,) in made.seen:
        assert f"what is {answer}?" in text


def test_a_column_that_is_not_there_is_said(tmp_path: Path, tiny_model: Path) -> None:
    recipe = {
        "type": "sft", "model": {"name_or_path": str(tiny_model)},
        "data": {"sources": [str(chats(tmp_path))], "keep": ["label"], "cache_dir": str(tmp_path)},
    }  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    with pytest.raises(posttrain.DataError, match="12 x the column 'label' that data.keep names is missing"):
        posttrain.load(file).prepare()
    with pytest.raises(RecipeError, match="'weight' has a meaning in a batch"):
        posttrain.load(file, ["data.keep=[weight]"])


@block("data", "weighted-chats")
class WeightedChats(SFTData):
    """Gives each token a weight: how many letters it has."""

    @property
    def columns(self) -> Any:
        return {**super().columns, "letters": Column("target"), "size": Column("document", "int64")}

    def encoder(self, tokenizer: Any) -> Any:
        return Letters(self.sample, super().encoder(tokenizer), self.columns)


@attrs.define
class Letters:
    """Adds to what a chat encoder makes."""

    sample: Any
    inner: ChatEncoder
    columns: Any
    sides = ("",)

    @property
    def reading(self) -> Any:
        return self.inner.reading

    def encode(self, rows: list[Any]) -> list[Any]:
        def with_letters(example: Example) -> Example:
            ((ids, _),) = example.documents
            decode = self.inner.renderer.tokenizer.decode
            letters = np.array([len(decode([i])) for i in ids.tolist()], dtype=np.float32)
            return Example(example.documents, {"letters": (letters,), "size": (len(ids),)})

        self.inner.columns = {}
        return [with_letters(example) for example in self.inner.encode(rows)]

    def fingerprint(self) -> str:
        return "letters " + self.inner.fingerprint()


@pytest.mark.parametrize("packing", [True, False])
def test_values_per_token_are_stored_cut_and_laid_out_with_their_tokens(
    tmp_path: Path, tiny_model: Path, packing: bool
) -> None:
    data = WeightedChats(
        sources=[chats(tmp_path)], max_length=24, overflow="split", packing=packing, cache_dir=tmp_path / "cache"
    )
    tokenizer = posttrain.HFTokenizer().build(HFModel(name_or_path=str(tiny_model)))
    for _ in range(2):  # made, then read from the cache
        loader = data.build(tokenizer, 2, 0, 1, 0).train
        cut = 0
        for batch in loader.one_pass():
            expected = [len(tokenizer.decode([i])) for i in batch.targets.tolist()]
            assert batch["letters"].tolist() == expected
            cut += int((batch["size"] > 24).sum())
        assert cut


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_made_ahead_are_the_same(threads: int) -> None:
    shape: dict[str, Any] = {"max_length": 64, "packing": True, "micro_batch_size": 2, "rank": 0, "world_size": 1}
    plain, ahead = (MapLoader(examples=InMemory(range(40)), seed=1, ahead=n, **shape) for n in (0, threads))
    for one, other in zip(plain.one_pass(), ahead.one_pass(), strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
    both = zip(plain.batches(plain.start()), ahead.batches(ahead.start()), range(30), strict=False)
    assert all(torch.equal(one.input_ids, two.input_ids) and at == there for (one, at), (two, there), _ in both)


def test_an_error_in_a_thread_is_that_of_the_batch_it_was_made_for() -> None:
    def collate(rows: Any, multiple: int) -> Batch:
        if any(len(row[0]) == len(InMemory(range(10))[7]) for row in rows):
            raise posttrain.DataError("this one cannot be read")
        return lay([[d for e in row for d in e.documents] for row in rows], 0)

    shape: dict[str, Any] = {"max_length": 64, "packing": False, "micro_batch_size": 1, "rank": 0, "world_size": 1}
    loader = MapLoader(examples=InMemory(range(10)), seed=1, ahead=2, collate=collate, **shape)
    with pytest.raises(posttrain.DataError, match="this one cannot be read"):
        list(loader.one_pass())


@block("data", "plain-dicts")
class PlainDicts:
    """A data block that knows nothing of batches."""

    def build(self, tokenizer: Any, micro_batch_size: int, rank: int, world_size: int, seed: int) -> Loaders:
        return Loaders(train=Lines())


class Lines:
    """Points of a line."""

    def start(self) -> dict[str, Any]:
        return {"epoch": 0, "row": 0}

    def rows(self, epochs: int) -> int:
        return 100

    def batches(self, position: Any) -> Any:
        for n in range(position["row"], 10**6):
            x = torch.linspace(0, 1, 8)
            yield {"x": x, "y": 3 * x, "weight": 8}, {"epoch": 0, "row": n + 1}

    def one_pass(self) -> Any:
        return iter(())


@block("model", "a-line")
class ALine:
    """One number."""

    name_or_path: str = "line"

    def build(self, fabric: Any) -> Any:
        return torch.nn.Linear(1, 1, bias=False)


@block("trainer", "regression")
class Regression(posttrain.Trainer):
    """Least squares: not even a language model."""

    def loss(self, batch: Batch) -> Any:
        return ((self.run.model(batch["x"][:, None])[:, 0] - batch["y"]) ** 2).sum() / batch["weight"]


def test_a_data_block_of_ones_own_may_give_dicts(tmp_path: Path) -> None:
    from toy import ToyTokenizer

    made = Regression(
        model=ALine(), data=PlainDicts(), tokenizer=ToyTokenizer(), checkpoint=[], logger=[], max_steps=60,
        optimizer=posttrain.AdamW(lr=0.2), output_dir=tmp_path, accelerator="cpu", log_every=1,
    )  # fmt: skip
    assert made.train().last["loss"] < 1e-2


# -- terms ----------------------------------------------------------------------------


@block("trainer", "two-terms")
class TwoTerms(SFTTrainer):
    """A mean over supervised tokens, and one over all tokens, whose ratio differs from row to row."""

    def loss(self, batch: Batch) -> Any:
        nll = self.run.model(batch)
        hidden = self.run.model(batch, "hidden").flatten(0, 1)
        real = torch.arange(batch.input_ids.shape[1]) < batch.row_lengths[:, None]
        self.run.log(norm=Term(hidden.detach()[real.flatten()].norm(dim=-1).sum(), "tokens"))
        return {
            "nll": Term(nll, "supervised_tokens"),
            "size": Term(hidden[real.flatten()].square().sum(), "tokens", weight=0.1),
        }


def two_terms(folder: Path, **keys: Any) -> Any:
    return trainer(folder, TwoTerms, **{"eval_rows": 7, "eval_every": 4, **keys})


def test_each_term_has_its_own_count_however_a_step_is_cut(tmp_path: Path) -> None:
    whole = two_terms(tmp_path / "whole").train()
    two_terms(tmp_path / "cut", micro_batch_size=1, gradient_accumulation_steps=4).train()
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "cut"), strict=True):
        assert one == pytest.approx(other, abs=1e-6, rel=1e-5)
    last = whole.last
    assert last["loss"] == pytest.approx(last["nll"] + 0.1 * last["size"], rel=1e-5)
    assert last["eval_loss"] == pytest.approx(last["eval_nll"] + 0.1 * last["eval_size"], rel=1e-5)
    assert last["eval_norm"] > 0


def test_each_term_has_its_own_count_on_two_ranks(tmp_path: Path) -> None:
    two_terms(tmp_path / "one").train()
    on_two_ranks(tmp_path, "test_doors", "two_terms(folder, devices=2, micro_batch_size=2).train()")
    for one, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one == pytest.approx(other, abs=1e-6, rel=1e-5)


def test_a_term_over_something_that_nobody_counts_is_an_error(tmp_path: Path) -> None:
    @posttrain.after("trainer.loss")
    def over_replies(trainer: Any, loss: Any) -> Any:
        return {"loss": Term(loss, "replies")}

    with pytest.raises(TrainingError, match="'replies'.* weight, tokens, supervised_tokens"):
        trainer(tmp_path).train(callbacks=[over_replies])


@block("model", "with-router")
class WithRouter(HFModel):
    """A network that has something to add to any loss."""

    def wrap(self, hf: Any) -> Any:
        from posttrain.blocks.models.causal import CausalLM

        class Routed(CausalLM):
            def hidden_states(self, layout: Any) -> Any:
                hidden = super().hidden_states(layout)
                real = torch.arange(layout.input_ids.shape[1]) < layout.row_lengths[:, None]
                self.add("router", Term(hidden[real].square().sum(), "tokens", weight=0.1))
                return hidden

        return Routed(hf)


def test_what_a_network_adds_takes_part_in_loss_gradient_and_metrics(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"eval_rows": 7, "eval_every": 4, "max_steps": 4}
    by_hand = two_terms(tmp_path / "hand", max_steps=4).train()
    model = WithRouter(name_or_path="toy", random_init=True, config=LLAMA)
    for name, cut in {"whole": (4, 1), "cut": (1, 4)}.items():
        made = trainer(tmp_path / name, micro_batch_size=cut[0], gradient_accumulation_steps=cut[1], **keys)
        run = attrs.evolve(made, model=model).train()
        for theirs, ours in {
            "loss": "loss",
            "eval_loss": "eval_loss",
            "size": "router",
            "eval_size": "eval_router",
        }.items():
            assert run.last[ours] == pytest.approx(by_hand.last[theirs], rel=1e-5), (name, ours)
        for one, other in zip(run.model.parameters(), by_hand.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# -- steps of several updates ---------------------------------------------------------


@block("trainer", "twice")
class Twice(SFTTrainer):
    """Two updates on the same rows, which it turns round first."""

    updates_per_step = 2

    def made(self, batches: list[Batch]) -> list[Batch]:
        return [batch.but(made=True) for batch in batches]

    def step(self, batches: list[Batch]) -> Any:
        assert all(batch["made"] for batch in batches)
        return (self.update(batches) + self.update(batches)) / 2


def test_a_step_may_make_several_updates(tmp_path: Path) -> None:
    seen: list[float] = []

    @posttrain.after("trainer.loss")
    def note(trainer: Any, loss: torch.Tensor) -> None:
        trainer.run.log(seen=loss.detach())
        seen.append(loss.item())

    run = trainer(tmp_path, Twice, scheduler=posttrain.Linear(), max_steps=3).train(callbacks=[note])
    assert run.step == 3
    assert run.scheduler.last_epoch == 6
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)  # the schedule ends with the run
    assert len(seen) == 6
    assert [m["seen"] for m in metrics(tmp_path)] == pytest.approx(
        [(a + b) / 2 for a, b in zip(seen[::2], seen[1::2], strict=True)]
    )


def test_a_crash_shows_what_was_trained_on(tmp_path: Path) -> None:
    """Also where a method had made it: there it is not what the data gave."""

    @posttrain.after("trainer.made")
    def others(trainer: Any, batches: list[Batch]) -> list[Batch]:
        return [lay([[(np.array([5, 6, 7]), np.array([False, True, True]))]], 0)]

    @posttrain.before("trainer.loss")
    def fail(trainer: Any, batch: Batch) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        trainer(tmp_path).train(callbacks=[others, fail])
    (line,) = map(json.loads, (tmp_path / "failure-rows.jsonl").read_text().splitlines())
    assert line["input_ids"] == [5, 6, 7]


# -- optimizers -----------------------------------------------------------------------


@block("optimizer", "two-kinds")
class TwoKinds:
    """SGD with momentum for matrices, AdamW for vectors."""

    def build(self, model: Any) -> Any:
        trained = [p for p in model.parameters() if p.requires_grad]
        return JoinedOptimizer(
            momentum=torch.optim.SGD([p for p in trained if p.ndim > 1], lr=1e-2, momentum=0.9),
            adamw=torch.optim.AdamW([p for p in trained if p.ndim == 1], lr=1e-3),
        )


class Lookahead(torch.optim.Optimizer):
    """Every other step, what is trained goes half the way back (arXiv:1907.08610)."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.optimizer = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.detach().clone())
                if group["count"] % 2 == 0:
                    p.data.copy_(slow.lerp_(p.data, 0.5))


@block("optimizer", "lookahead")
class LookaheadAdam:
    """AdamW inside of Lookahead."""

    def build(self, model: Any) -> Any:
        return Lookahead(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))


@pytest.mark.parametrize("optimizer", [TwoKinds(), LookaheadAdam()], ids=["joined", "wrapped"])
def test_optimizers_of_ones_own_resume_to_the_last_bit(tmp_path: Path, optimizer: Any) -> None:
    trainer(tmp_path / "whole", optimizer=optimizer).train()
    for _ in range(4):
        trainer(tmp_path / "cut", optimizer=optimizer, stop_after=2).train()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_the_learning_rate_of_every_named_group_is_logged(tmp_path: Path) -> None:
    run = trainer(tmp_path, optimizer=TwoKinds(), scheduler=posttrain.Linear(), max_steps=4).train()
    assert run.last["lr/momentum"] == pytest.approx(run.last["lr"]) == pytest.approx(10 * run.last["lr/adamw"])


class Forgetful(torch.optim.SGD):
    """Keeps its momentum where nobody looks."""

    def step(self, closure: Any = None) -> None:
        self.velocity = getattr(self, "velocity", {})
        for group in self.param_groups:
            for p in group["params"]:
                v = self.velocity.setdefault(id(p), torch.zeros_like(p))
                p.data.add_(v.mul_(0.9).add_(p.grad), alpha=-group["lr"])


@block("optimizer", "forgetful")
class ForgetfulBlock:
    """An optimizer that could not go on."""

    def build(self, model: Any) -> Any:
        return Forgetful([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def test_an_optimizer_whose_state_cannot_be_saved_says_so_at_the_first_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Forgetful keeps tensors in velocity.*self.state\[parameter\]"):
        trainer(tmp_path, optimizer=ForgetfulBlock(), max_steps=2).train()


# -- tensors in checkpoints -----------------------------------------------------------


def test_the_moving_average_is_what_its_equation_says_and_is_exported(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights: list[dict[str, torch.Tensor]] = []

    @posttrain.before("trainer.fit")
    @posttrain.after("trainer.count")
    def remember(trainer: Any, *_: Any) -> None:
        weights.append({n: p.detach().clone() for n, p in trainer.run.model.module.hf.named_parameters()})

    run = trainer(tmp_path, callbacks=[EMA(decay=0.8)], max_steps=5).train(callbacks=[remember])
    average = weights[0]
    for now in weights[1:]:
        average = {name: 0.8 * old + 0.2 * now[name] for name, old in average.items()}
    exported = load_file(tmp_path / "huggingface-ema" / "model.safetensors")
    assert exported.keys() == load_file(tmp_path / "huggingface" / "model.safetensors").keys()
    for name, value in exported.items():
        torch.testing.assert_close(value, average[name], rtol=1e-6, atol=1e-6)
    for name, parameter in run.model.module.hf.named_parameters():  # training goes on with its own
        torch.testing.assert_close(parameter, weights[-1][name], rtol=0, atol=0)


def test_what_a_callback_keeps_goes_on_with_the_run(tmp_path: Path) -> None:
    trainer(tmp_path / "whole", callbacks=[EMA(decay=0.8)]).train()
    for _ in range(4):
        trainer(tmp_path / "cut", callbacks=[EMA(decay=0.8)], stop_after=2).train()
    whole, cut = ((tmp_path / name / "huggingface-ema/model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


# -- kinds ----------------------------------------------------------------------------


@kind("greeting")
class GreetingBlock(Protocol):
    """Says how a run begins."""

    def greet(self, name: str) -> str: ...


@block("greeting", "hello")
class Hello:
    """Says hello."""

    mark: str = "!"

    def greet(self, name: str) -> str:
        return f"hello {name}{self.mark}"


@block("trainer", "greeting")
class Greeting(SFTTrainer):
    """Takes a block of a new kind."""

    greeting: GreetingBlock = posttrain.default(Hello)
    more: list[GreetingBlock] = attrs.field(factory=list)


def test_a_kind_of_block_of_ones_own_works_in_recipes(tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"type: greeting\nmodel: {{name_or_path: {tiny_model}}}\ndata: {{sources: [{chats(tmp_path)}]}}\n"
        'more: [{type: hello, mark: "?"}, hello]\n'
    )
    made: Any = posttrain.load(file)
    assert made.greeting.greet("x") == "hello x!"
    assert [one.greet("x") for one in made.more] == ["hello x?", "hello x!"]
    with pytest.raises(RecipeError, match="there is no greeting 'helo'; did you mean 'hello'"):
        posttrain.load(file, ["greeting=helo"])
    from posttrain.recipes.explain import explain

    assert "Says hello." in explain("greeting", "hello")


def test_a_block_that_does_not_fit_its_new_kind_is_refused() -> None:
    with pytest.raises(posttrain.RegistryError, match="is not a greeting: it has no method greet"):

        @block("greeting", "silent")
        class Silent:
            """Says nothing."""
