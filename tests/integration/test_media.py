"""Models with image patches, video frames or sounds.

Each of these uses the adapter of the sequence that contains its tokens. An ambiguous batch raises.
"""

from typing import Any

import pytest
import torch
import transformers
from families import NAMES, TEXT, served
from tiny import VOCAB, tokens
from torch import Tensor

import lora_ext

IMAGE, VIDEO, AUDIO = VOCAB - 1, VOCAB - 2, VOCAB - 3
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
TILES = [[8, 8], [8, 16], [16, 8], [16, 16]]
AUDIO_SIZES = {"num_mel_bins": 8, "max_source_positions": 16}


def qwen2_vl() -> Any:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE,
        video_token_id=VIDEO, vision_start_token_id=93, vision_end_token_id=92,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


def onevision() -> Any:
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=transformers.Qwen2Config(**TEXT), image_token_id=IMAGE, video_token_id=VIDEO,
        vision_feature_layer=-1, vision_feature_select_strategy="full", image_grid_pinpoints=TILES,
    )  # fmt: skip
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def llava_next() -> Any:
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), image_token_id=IMAGE,
        text_config=transformers.LlamaConfig(**TEXT), vision_feature_layer=-1,
        image_grid_pinpoints=TILES,
    )  # fmt: skip
    return transformers.LlavaNextForConditionalGeneration(config)


def llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), image_token_id=IMAGE,
        text_config=transformers.LlamaConfig(**TEXT), vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def idefics3() -> Any:
    config = transformers.Idefics3Config(
        vision_config=VISION, text_config=transformers.LlamaConfig(**TEXT), image_token_id=IMAGE,
        scale_factor=2,
    )  # fmt: skip
    return transformers.Idefics3ForConditionalGeneration(config)


def voxtral() -> Any:
    audio = {
        **AUDIO_SIZES, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # fmt: skip
    config = transformers.VoxtralConfig(
        audio_config=audio,
        text_config=transformers.LlamaConfig(**TEXT).to_dict(), audio_token_id=AUDIO,
    )  # fmt: skip
    return transformers.VoxtralForConditionalGeneration(config)


def qwen2_audio() -> Any:
    audio = {
        "model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_ffn_dim": 48,
        "encoder_layers": 2, "encoder_attention_heads": 4, **AUDIO_SIZES,
    }  # fmt: skip
    config = transformers.Qwen2AudioConfig(
        audio_config=audio, text_config=transformers.Qwen2Config(**TEXT).to_dict(),
        audio_token_id=AUDIO,
    )  # fmt: skip
    return transformers.Qwen2AudioForConditionalGeneration(config)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def rows(token: int, counts: list[int], length: int = 16) -> Tensor:
    """Return sequences that begin with the given numbers of media tokens."""
    texts = [[token] * n + [*range(5 + i, 5 + i + length - n)] for i, n in enumerate(counts)]
    return torch.tensor(texts)


def split(given: Tensor, counts: list[int]) -> list[dict[str, Tensor]]:
    parts = given.split(counts)
    return [{"pixel_values": part} if len(part) else {} for part in parts]


def assert_rows_are_the_judges(
    build: Any, ids: Tensor, whole: Any, alone: list[Any], beams: int = 1
) -> None:
    """Check that each row equals that of the merged model.

    ``whole`` are the media inputs of the batch, and ``alone`` those of each sequence.
    """
    model, judges = served(build)
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": beams}
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=NAMES, **whole).logits
        said = model.generate(input_ids=ids, adapter_names=NAMES, **whole, **how)
        base = model(input_ids=ids, **whole).logits
        for row, (name, own) in enumerate(zip(NAMES, alone, strict=True)):
            one = ids[row : row + 1]
            expected = judges[name](input_ids=one, **own).logits[0]
            assert (mixed[row] - expected).abs().max() < 1e-8
            assert name is None or (mixed[row] - base[row]).abs().max() > 0.1
            answer = judges[name].generate(input_ids=one, **own, **how)
            assert torch.equal(said[row : row + 1], answer)


@pytest.mark.parametrize(
    "grids",
    [
        [(1, 4, 4), None, None, None],  # 4 media tokens and 4 sequences
        [None, (1, 2, 2), None, None],  # 4 patches
        [(1, 2, 4), None, (1, 2, 4), None],
        [(1, 4, 4), (1, 2, 2), None, (1, 4, 2)],
    ],
)
def test_images_packed_into_one_row_use_the_adapter_of_their_sequence(
    grids: list[tuple[int, int, int] | None],
) -> None:
    counts = [h * w // 4 if grid else 0 for grid in grids for _, h, w in [grid or (0, 0, 0)]]
    ids = torch.cat([torch.full((4, 1), 93), rows(IMAGE, counts)], 1)
    patches = noise(4 * sum(counts), 3 * 2 * 16).split([4 * n for n in counts])
    alone: list[dict[str, Tensor]] = []
    for row, (grid, own) in enumerate(zip(grids, patches, strict=True)):
        alone.append({"mm_token_type_ids": (ids[row : row + 1] == IMAGE).int()})
        if grid:
            alone[-1] |= {"pixel_values": own, "image_grid_thw": torch.tensor([grid])}
    whole = {
        "pixel_values": torch.cat(patches),
        "image_grid_thw": torch.tensor([grid for grid in grids if grid]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    assert_rows_are_the_judges(qwen2_vl, ids, whole, alone)


@pytest.mark.parametrize("counts", [[2, 0, 0, 0], [1, 0, 2, 1]])
def test_videos_of_two_frames_use_the_adapter_of_their_sequence(counts: list[int]) -> None:
    """Check videos with four frames in total, which is also the number of sequences."""
    given = noise(sum(counts), 2, 3, 8, 8)
    alone = [{"pixel_values_videos": v["pixel_values"]} if v else {} for v in split(given, counts)]
    ids = rows(VIDEO, [3 * n for n in counts])
    assert_rows_are_the_judges(onevision, ids, {"pixel_values_videos": given}, alone)


def test_sounds_and_images_use_the_adapter_of_their_sequence_beside_blank_ones() -> None:
    counts = [2, 0, 1, 1]
    given = noise(4, 8, 32)
    alone = [{"input_features": v["pixel_values"]} if v else {} for v in split(given, counts)]
    ids = rows(AUDIO, [4 * n for n in counts])
    assert_rows_are_the_judges(voxtral, ids, {"input_features": given}, alone)
    counts = [2, 0, 1, 1]
    given, mask = torch.zeros(4, 2, 3, 8, 8).double(), torch.zeros(4, 2, 8, 8).bool()
    for row, count in enumerate(counts):
        given[row, :count], mask[row, :count] = noise(count, 3, 8, 8 + row)[..., :8], True
    alone = [
        {"pixel_values": given[i : i + 1, :n], "pixel_attention_mask": mask[i : i + 1, :n]} if n
        else {} for i, n in enumerate(counts)
    ]  # fmt: skip
    whole = {"pixel_values": given, "pixel_attention_mask": mask}
    assert_rows_are_the_judges(idefics3, rows(IMAGE, counts), whole, alone)


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [2, 0, 2, 0], [0, 3, 0, 1]])
def test_images_use_the_adapter_of_their_sequence_in_beam_search(counts: list[int]) -> None:
    """Check 4 images and 4 sequences, some of which have no image."""
    given = noise(4, 3, 8, 8)
    ids = rows(IMAGE, [4 * n for n in counts])
    assert_rows_are_the_judges(llava, ids, {"pixel_values": given}, split(given, counts), beams=2)


def test_ambiguous_batch_needs_one_name() -> None:
    """Check two images of different sizes with four tiles in total, as many as sequences."""
    model, judges = served(llava_next)
    sizes = torch.tensor([[8, 8], [7, 8]])
    given = noise(2, 2, 3, 8, 8)
    with torch.no_grad():
        found = [
            judges[None].get_image_features(given[i : i + 1], sizes[i : i + 1]).pooler_output[0]
            for i in range(2)
        ]
        ids = rows(IMAGE, [len(found[0]), 0, len(found[1]), 0])
        whole = {"input_ids": ids, "pixel_values": given, "image_sizes": sizes}
        for names in (["red"] * 4, "red"):
            with lora_ext.adapters(names):
                same = model(**whole).logits
            assert (same - judges["red"](**whole).logits).abs().max() < 1e-8
        with lora_ext.adapters(NAMES):
            with pytest.raises(
                ValueError, match=r"which sequence contains each image.* at 'model.vision"
            ):
                model(**whole)


def test_inseparable_tower_accepts_one_sound_per_sequence() -> None:
    given = {
        "input_features": noise(4, 8, 32),
        "feature_attention_mask": torch.ones(4, 32).long(),
    }
    model, judges = served(qwen2_audio)
    with torch.no_grad(), lora_ext.adapters(NAMES):
        ids = rows(AUDIO, [8] * 4)
        mixed = model(input_ids=ids, **given).logits
        for i, name in enumerate(NAMES):
            own = {key: value[i : i + 1] for key, value in given.items()}
            alone = judges[name](input_ids=ids[i : i + 1], **own).logits
            assert (mixed[i] - alone[0]).abs().max() < 1e-8
        with pytest.raises(ValueError, match="one entry of input_features in"):
            model(input_ids=rows(AUDIO, [16, 0, 8, 8], 24), **given)


@pytest.mark.slow
def test_compiled_model_runs_batches_with_media_uncompiled() -> None:
    """Check two videos in one sequence; only batches of text run compiled."""
    counts = [2, 0, 0, 0]
    model, _ = served(onevision)
    given, ids = noise(2, 2, 3, 8, 8), rows(VIDEO, [3 * n for n in counts])
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), lora_ext.adapters(NAMES):
        expected = model(input_ids=ids, pixel_values_videos=given).logits
        assert torch.equal(compiled(input_ids=ids, pixel_values_videos=given).logits, expected)
        text = tokens(4, 6)
        assert (compiled(input_ids=text).logits - model(input_ids=text).logits).abs().max() < 1e-9
