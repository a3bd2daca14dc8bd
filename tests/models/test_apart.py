"""Packed documents are what each is alone, in every architecture, or the model is refused with the reason.

The reference is transformers' own network, with its own attention, on one document at a time.
"""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import KINDS, ROWS, alone, config_of, networks
from toy import trainer
from transformers import AutoConfig

import posttrain
from posttrain.blocks.layout import lay
from posttrain.blocks.models.documents import probe
from posttrain.blocks.models.documents.known import known_way, named
from posttrain.blocks.models.documents.tiny import tiny
from posttrain.blocks.models.documents.trial import auto_of, gradients_differ
from posttrain.blocks.models.documents.ways import Bounds, ByDocument, Way, by_document, groups, short_chunks
from posttrain.blocks.models.model import HFModel
from posttrain.errors import RecipeError


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_give_the_loss_and_gradients_of_each_document_alone(kind: str) -> None:
    net, theirs = networks(kind)
    assert KINDS[kind][1] in str(probe.find_way(config_of(kind), kind, None))
    loss, expected = net(lay(ROWS, 0)), alone(theirs)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = {name: p.grad for name, p in net.hf.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert ours.keys() == found.keys()
    differ, whole = (math.sqrt(sum(float(x.square().sum()) for x in each)) for each in (
        [ours[name] - found[name] for name in found], found.values()))  # fmt: skip
    assert differ <= 1e-5 * whole


@pytest.mark.parametrize("kind", ["qwen3_next", "jamba"])
def test_recomputed_activations_see_the_same_documents(kind: str) -> None:
    from posttrain.blocks.models.activations import checkpoint_activations

    net, _ = networks(kind)
    plain = net(lay(ROWS, 0))
    plain.backward()
    expected = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    net.train()
    checkpoint_activations(net.hf, selective=False)
    net(lay(ROWS, 0)).backward()
    for one, other in zip([p.grad for p in net.parameters() if p.grad is not None], expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_copy_computes_with_its_own_weights() -> None:
    """References are deep copies: their modules must not call those of the network in training."""
    net, _ = networks("mamba")
    before = net(lay(ROWS, 0)).item()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    assert twin(lay(ROWS, 0)).item() == before
    assert net(lay(ROWS, 0)).item() != before


def test_generation_knows_of_no_documents() -> None:
    net, theirs = networks("qwen3_next")
    net(lay(ROWS, 0))
    ids = torch.from_numpy(ROWS[0][0][0])[None]
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    torch.testing.assert_close(net.generate(**call), theirs.generate(**call))


def test_a_leak_would_be_seen() -> None:
    """Without the way that was found, documents leak: the tests above can fail."""
    net, theirs = networks("jamba")
    expected = alone(theirs).item()
    for module in net.modules():
        if isinstance(module, ByDocument):
            module.__class__ = type(module).__mro__[2]
    assert abs(net(lay(ROWS, 0)).item() - expected) > 1


def test_a_model_that_looks_ahead_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"model 'bert' looks at later tokens"):
        probe.find_way(AutoConfig.for_model("bert"), "bert", None)
    probe.find_way(AutoConfig.for_model("bert", is_decoder=True), "bert", None)


def test_a_gradient_that_is_not_a_number_is_not_that_of_each_document_alone() -> None:
    one, lost = torch.ones(3), torch.full((3,), math.nan)
    assert not gradients_differ([2 * one, None], [[one, None], [one, None]])
    assert gradients_differ([lost, one], [[one, one]])
    assert not gradients_differ([one], [[lost]])  # transformers' own is none


def test_documents_of_like_length_share_a_batch_and_little_of_it_is_padding() -> None:
    lengths = [100, 3, 80, 41, 9, 1, 76, 40]
    bounds = [0, *np.cumsum(lengths).tolist()]
    found = list(groups(bounds, singly=False))
    assert sorted(np.concatenate([index[real] for index, real in found]).tolist()) == list(range(sum(lengths)))
    assert len(found) == 3
    assert sum(real.size for _, real in found) < 1.3 * sum(lengths)
    assert all(len(index) == 1 for index, _ in groups(bounds, singly=True))


def test_what_a_module_gives_by_document_lies_where_its_tokens_were() -> None:
    x = torch.arange(24.0).view(2, 12, 1)
    found, other = by_document(
        lambda x, positions, flag, attention_mask: ((x.cumsum(1), positions), flag),
        Bounds([0, 5, 12, 13, 24]),
        False,
        (x,),
        {"positions": torch.arange(24).view(2, 12), "flag": 7, "attention_mask": torch.ones(2, 12)},
    )  # type: ignore[misc]
    cumulated, positions = found
    assert other == 7
    expected = torch.cat([part.cumsum(0) for part in x.flatten().split([5, 7, 1, 11])]).view(2, 12, 1)
    assert torch.equal(cumulated, expected)
    assert torch.equal(positions, torch.arange(24).view(2, 12))


def test_a_scan_in_chunks_fills_no_document_up_to_a_whole_chunk() -> None:
    mixer = torch.nn.Identity()
    mixer.chunk_size = 16  # type: ignore[assignment]
    for longest, expected in ((1, 1), (5, 5), (16, 16), (17, 9), (40, 14)):
        with short_chunks(mixer, torch.zeros(2, longest, 8)):
            assert mixer.chunk_size == expected
            assert -(-longest // mixer.chunk_size) == -(-longest // 16)  # as many of them as before
    assert mixer.chunk_size == 16


@pytest.mark.parametrize("packing", [True, False])
def test_a_hybrid_model_trains_and_says_how(tmp_path: Path, packing: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "posttrain")
    config = {"model_type": "jamba", **{k: v for k, v in config_of("jamba").to_dict().items() if k != "model_type"}}
    made = trainer(tmp_path, packing=packing, max_steps=3)
    model = HFModel(name_or_path="toy", random_init=True, config=config)
    import attrs

    run = attrs.evolve(made, model=model).train()
    assert math.isfinite(run.last["loss"])
    assert "attention, JambaMambaMixer by document" in caplog.text


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3", "llava", "qwen3_5"])
def test_the_language_part_of_a_model_of_images_and_text_is_trained_and_the_whole_exported(
    tmp_path: Path, kind: str
) -> None:
    import attrs
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    folder = tmp_path / "model"
    small = tiny(AutoConfig.for_model(kind), vocabulary=97)
    with torch.random.fork_rng():
        auto_of(small).from_config(small).save_pretrained(folder)
    model = HFModel(name_or_path=str(folder))
    run = attrs.evolve(trainer(tmp_path / "run", max_steps=2), model=model).train()
    trained = [name for name, p in run.model.module.hf.named_parameters() if p.requires_grad]
    assert trained
    assert not [name for name in trained if "vision" in name or "visual" in name or "projector" in name]
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "run" / "huggingface"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed
    assert not [name for name in changed if "vision" in name or "visual" in name]
    AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "huggingface")


def test_the_way_is_looked_for_once_and_kept_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    probe._find_way.cache_clear()
    way = Way("packed", (("JambaMambaMixer", False),))
    for _ in range(3):
        assert probe.find_way(config_of("jamba"), "m", None) == way
    assert probe._find_way.cache_info().misses == 1
    probe._find_way.cache_clear()  # another process
    assert probe.find_way(config_of("jamba"), "m", None) == way
    assert probe._find_way.cache_info().misses == 0
    assert probe.find_way(config_of("jamba"), "m", "sdpa").attention == "sdpa"  # something else is asked
    assert probe._find_way.cache_info().misses == 1
    for file in (tmp_path / "ways").iterdir():
        file.write_text("{")  # damaged
    assert probe.find_way(config_of("jamba"), "m", None) == way
    assert probe._find_way.cache_info().misses == 2


def test_what_could_not_be_proven_or_kept_is_tried_again(tmp_path: Path) -> None:
    found = iter([Way("eager", proven=False), Way("packed")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_CACHE", str(tmp_path))
        assert not known_way(["m"], lambda: next(found)).proven
        assert known_way(["m"], lambda: next(found)).proven
        assert known_way(["m"], lambda: next(found)).proven  # from the disk
        patch.setenv("POSTTRAIN_CACHE", "/proc/nothing")
        assert known_way(["m"], lambda: Way("sdpa")) == Way("sdpa")


@pytest.mark.parametrize("file", ["packed.py", "causal.py", "documents/probe.py", "vision/parts.py"])
def test_what_is_known_is_forgotten_when_code_that_was_tried_changes(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, read = named(["m"]), Path.read_bytes
    changed = Path(posttrain.__file__).parent / "blocks" / "models" / file
    assert changed.is_file()
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"#" if path == changed else b""))
    assert named(["m"]) != before
