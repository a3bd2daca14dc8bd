"""A tiny twin has the architecture of its model: nothing that the model has not, and all its kinds of layers."""

from typing import Any

import pytest
import torch
from architectures import ROWS, alone
from transformers import CONFIG_MAPPING, AutoConfig

from posttrain.blocks.layout import lay
from posttrain.blocks.models.causal import CausalLM
from posttrain.blocks.models.documents import probe
from posttrain.blocks.models.documents.tiny import MOST, parameters, tiny
from posttrain.blocks.models.documents.ways import decoder_of, head_of
from posttrain.blocks.models.model import HFModel
from posttrain.blocks.models.vision.parts import parts_of
from posttrain.errors import RecipeError


def small(kind: str, **changes: Any) -> Any:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    return tiny(AutoConfig.for_model(kind, **changes), vocabulary=97, window=8)


def test_towers_inside_of_towers_become_tiny() -> None:
    config = small("unlimited_ocr")
    inside = config.vision_config.encoder_config
    assert inside.hidden_size == config.text_config.hidden_size == 64
    assert parameters(config) < MOST / 5
    assert small("t5gemma2").encoder.text_config.vocab_size == 97  # it shares the decoder's


def test_widths_that_are_given_one_by_one_stay_as_many() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [22, 22, 20]}
    text = small("ernie4_5_vl_moe", text_config={"rope_parameters": rope}).text_config
    assert text.moe_intermediate_size == [32, 32]
    first, second, last = text.rope_parameters["mrope_section"]
    assert first == second != last


@pytest.mark.parametrize("kind", ["mistral4", "deepseek_v3", "dots3_note_text"])
def test_heads_of_which_a_part_turns_stay_in_proportion(kind: str) -> None:
    """Some configurations call the width of all of a head its `head_dim`, some that of the part that turns."""
    after, before = (config.to_dict() for config in (small(kind), AutoConfig.for_model(kind)))
    for name in ("qk_nope_head_dim", "v_head_dim", "head_dim"):
        assert after[name] * before["qk_rope_head_dim"] == before[name] * after["qk_rope_head_dim"] > 0


def test_a_model_whose_heads_do_not_turn_has_a_twin_whose_heads_do_not() -> None:
    config = small("glm5_next").text_config
    assert config.qk_rope_head_dim == config.head_dim == 0
    assert set(config.layer_types) == {"linear_attention", "indexed_attention"}


def test_a_language_model_that_is_kept_whole_gives_its_hidden_states_and_its_head() -> None:
    """Nemotron 3 Omni has no head of its own: it keeps a causal model, which has one."""
    tower = {"model_type": "radio", "max_img_size": 64, "video_temporal_patch_size": 2}
    config = small("nemotron_h_omni", vision_config=tower, projector_hidden_size=64)
    torch.manual_seed(0)
    hf = probe.auto_of(config).from_config(config, dtype=torch.float32).eval()
    assert decoder_of(hf) is hf.language_model.model
    assert head_of(hf) is hf.language_model.lm_head
    parts = parts_of(hf)
    assert parts is not None
    assert parts.of("language_model.lm_head.weight") == "language" != parts.of("multi_modal_projector.linear_1.weight")
    way = probe.find_way(config, "nemotron_h_omni", None)
    assert way.plain_head
    assert not way.unfolds
    expected = alone(hf).item()
    probe.set_attention(hf, way.attention)
    net = CausalLM(hf)
    net.keep_apart(way)
    with torch.no_grad():
        assert net.eval()(lay(ROWS, 0)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("blip", r"'.*' cannot be trained on tokens alone: TypeError: Blip.* 'pixel_values'"),
        ("pix2struct", r"writes with a decoder what it reads with an encoder"),
        ("reformer", r"cannot be trained on tokens alone: \w+Error: .*train"),
        ("diffusion_gemma", r"looks at later tokens"),
    ],
)
def test_a_model_that_cannot_be_trained_on_text_is_refused_for_what_it_is(tmp_path: Any, kind: str, said: str) -> None:
    changes = {
        "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
        "reformer": {"is_decoder": True},
    }
    small(kind, **changes.get(kind, {})).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=said):
        HFModel(name_or_path=str(tmp_path), random_init=True).make(empty=False)


@pytest.mark.parametrize(("kind", "said"), [("musicgen", "Multiple valid text configs"), ("evolla", "Unrecognized")])
def test_what_transformers_does_not_load_as_one_language_model_is_refused_in_few_words(
    tmp_path: Any, kind: str, said: str
) -> None:
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=said) as caught, torch.device("meta"):
        HFModel(name_or_path=str(tmp_path), random_init=True).make(empty=True)
    assert len(str(caught.value)) < 400
