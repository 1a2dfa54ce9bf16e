"""`VoraImageProcessor`: inputs, outputs and files."""

from __future__ import annotations

import builtins
import importlib
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from lora_ext.methods.vora import VoraImageProcessor, smart_resize

PLAIN = {"do_rescale": False, "do_normalize": False}


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return a smooth image, ``(H, W, 3)`` uint8."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def test_all_forms_of_an_image_give_equal_pixels(tmp_path):
    array = pixels(100, 200)
    image = Image.fromarray(array)
    image.save(tmp_path / "image.png")
    tensor = torch.from_numpy(array.copy())
    opaque = np.concatenate([array, np.full((100, 200, 1), 7, np.uint8)], -1)
    forms = [
        image,
        image.convert("RGBA"),
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        array,
        array.transpose(2, 0, 1),
        opaque,
        tensor,
        tensor.movedim(2, 0),
        tensor.float(),
        tensor.long(),
        array.astype(">i4"),
    ]
    processor = VoraImageProcessor()
    first, *others = processor(forms)["pixel_values"]
    assert first.shape == (3, 98, 196) and first.dtype == torch.float32
    for other in others:
        torch.testing.assert_close(other, first, atol=0.05, rtol=0)  # Float images are not clamped.
    for other in (*others[:8], *others[9:]):
        assert torch.equal(other, first)


def test_grey_images_have_three_equal_channels():
    grey = pixels(56, 70)[..., 0]
    processor = VoraImageProcessor(**PLAIN)
    for form in (grey, grey[None], grey[..., None], Image.fromarray(grey)):
        (found,) = processor(form)["pixel_values"]
        assert torch.equal(found, torch.from_numpy(grey.copy()).float().expand(3, -1, -1))


# Pillow resizes in two passes and rounds after each; a cubic kernel multiplies the first pass's
# rounding error by 1.25.
@pytest.mark.parametrize(("resample", "worst"), [(2, 1.0), (3, 1.125)])
@pytest.mark.parametrize("size", [(1000, 700), (40, 30)])
def test_resizing_equals_pillow_up_to_one_level(size: tuple[int, int], resample: int, worst: float):
    array = pixels(*size)
    (found,) = VoraImageProcessor(resample=resample, **PLAIN)(array)["pixel_values"]
    height, width = smart_resize(*size)
    expected = Image.fromarray(array).resize((width, height), Image.Resampling(resample))
    expected = torch.from_numpy(np.array(expected)).movedim(2, 0).float()
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= worst


def test_image_of_a_valid_size_keeps_its_pixels():
    array = pixels(56, 70)
    (found,) = VoraImageProcessor(**PLAIN)(array)["pixel_values"]
    assert torch.equal(found, torch.from_numpy(array.copy()).movedim(2, 0).float())


def test_values_are_rescaled_and_normalised():
    array = pixels(56, 56)
    (found,) = VoraImageProcessor(image_mean=(0.1, 0.2, 0.3), image_std=(1, 2, 4))(array)[
        "pixel_values"
    ]
    expected = torch.from_numpy(array.copy()).movedim(2, 0).double() / 255
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2, 4])
    expected = (expected - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(found, expected.float())


def test_samples_keep_their_images_and_grids_are_one_list():
    small, large = pixels(56, 70), pixels(84, 56)
    found = VoraImageProcessor()([[small, large], [], None, [large]])
    assert [len(sample) for sample in found["pixel_values"]] == [2, 0, 0, 1]
    assert found["image_grids"] == [(4, 5), (6, 4), (6, 4)]
    assert [tuple(i.shape) for i in found["pixel_values"][0]] == [(3, 56, 70), (3, 84, 56)]
    batches = [np.stack([small, small]), torch.from_numpy(large.copy())[None]]
    found = VoraImageProcessor()(batches)  # each array is one sample
    assert [len(sample) for sample in found["pixel_values"]] == [2, 1]


def test_return_tensors_gives_one_array():
    batch = np.stack([pixels(56, 70, seed) for seed in range(2)])
    found = VoraImageProcessor()(batch, return_tensors="pt")
    assert found["pixel_values"].shape == (2, 3, 56, 70)
    assert found["image_grids"].tolist() == [[4, 5], [4, 5]]
    as_numpy = VoraImageProcessor()(list(batch), return_tensors="np")
    assert isinstance(as_numpy["pixel_values"], np.ndarray)
    assert np.array_equal(as_numpy["pixel_values"], found["pixel_values"].numpy())


def test_settings_are_saved_and_may_be_overridden(tmp_path):
    processor = VoraImageProcessor(
        patch=8, min_pixels=64, max_pixels=4096, resample=2, image_mean=(0, 0.5, 1)
    )
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["image_processor_type"] == "VoraImageProcessor" and stored["patch"] == 8
    again = VoraImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    other = VoraImageProcessor.from_pretrained(tmp_path, patch=4)
    assert (other.patch, other.max_pixels) == (4, 4096)
    with pytest.raises(
        ValueError, match=r"VoraImageProcessor: patch: expected an integer from 1, found 0"
    ):
        VoraImageProcessor.from_pretrained(tmp_path, patch=0)
    image = pixels(50, 90)
    (one,), (two,) = (p(image)["pixel_values"] for p in (processor, again))
    assert torch.equal(one, two) and one.shape == (3, 40, 80)


def test_settings_of_a_call_apply_only_to_this_call():
    processor, image = VoraImageProcessor(), pixels(64, 64)
    (found,) = processor(image, patch=16, do_normalize=False)["pixel_values"]
    assert found.shape == (3, 64, 64) and found.min() >= 0
    assert processor.patch == 14 and processor.do_normalize


def test_rescaled_values_warn():
    with pytest.warns(UserWarning, match=r"expected values of 0 to 255 .* do_rescale=False"):
        VoraImageProcessor()(np.ones((56, 56), np.float32))
    (found,) = VoraImageProcessor(**PLAIN)(np.ones((56, 56), np.float32))["pixel_values"]
    assert (found == 1).all()


def test_inputs_are_unchanged():
    array = pixels(60, 80)
    before, tensor = array.copy(), torch.from_numpy(array.copy())
    VoraImageProcessor()([array, tensor])
    assert np.array_equal(array, before) and np.array_equal(tensor.numpy(), before)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"patch": 0}, ValueError, r"patch: expected an integer from 1, found 0"),
        ({"patch": 2.5}, ValueError, r"patch: expected an integer from 1, found 2.5"),
        (
            {"max_pixels": float("inf")},
            ValueError,
            r"max_pixels: expected an integer from 1, found inf",
        ),
        ({"resample": "bicubic"}, ValueError, r"resample: expected one of .*, found 'bicubic'"),
        ({"image_mean": 3}, ValueError, r"image_mean: expected a number for each .* found 3"),
        ({"image_std": (1, 1, float("nan"))}, ValueError, r"image_std: expected 3 numbers"),
        ({"rescale_factor": None}, ValueError, r"rescale_factor: .* finite number, found None"),
        ({"do_resize": "no"}, ValueError, r"do_resize: expected True or False, found 'no'"),
        (
            {"min_pixels": 0},
            ValueError,
            r"min_pixels: expected an integer from 1 to 784000, found 0",
        ),
        ({"resample": 1}, ValueError, r"resample: expected one of .*, found 1"),
        (
            {"image_mean": (0.5,)},
            ValueError,
            r"image_mean: expected a number for each of 3 channels",
        ),
        (
            {"image_std": (1, 0, 1)},
            ValueError,
            r"image_std: expected 3 numbers other than 0, found \(1, 0",
        ),
        ({"patch_size": 16}, TypeError, r"patch_size: expected one of .* found 'patch_size'"),
    ],
)
def test_errors_name_invalid_settings(fields: dict, error, message: str):
    with pytest.raises(error, match=f"VoraImageProcessor: {message}"):
        VoraImageProcessor(**fields)
    with pytest.raises(error, match=f"VoraImageProcessor: {message}"):
        VoraImageProcessor()(pixels(56, 56), **fields)


@pytest.mark.parametrize(
    ("images", "fields", "error", "message"),
    [
        (object(), {}, TypeError, r"images: expected Pillow images, .* found object"),
        (np.ones((20, 20), complex), {}, TypeError, r"images: .* of numbers, found complex128"),
        (torch.ones(20, 20) * 1j, {}, TypeError, r"images: .* of numbers, found torch.complex64"),
        (np.array([[None]]), {}, TypeError, r"images: expected .* of numbers, found object"),
        (np.ones((20, 20), bool), {}, TypeError, r"images: expected .* numbers, found torch.bool"),
        (np.ones((2, 20, 20), np.uint8), {}, ValueError, r"images: expected shape .* found \(2, 2"),
        (
            np.ones((56, 57), np.uint8),
            {"do_resize": False},
            ValueError,
            r"patch size 14 .*, found 56 x 57",
        ),
        (
            [pixels(56, 56), pixels(56, 70)],
            {"return_tensors": "pt"},
            ValueError,
            r"images of equal size",
        ),
        (
            pixels(56, 56),
            {"return_tensors": "tf"},
            ValueError,
            r"return_tensors: expected None, 'pt'",
        ),
    ],
)
def test_invalid_images_are_refused(images, fields: dict, error, message: str):
    with pytest.raises(error, match=f"VoraImageProcessor: .*{message}"):
        VoraImageProcessor()(images, **fields)


def reloaded_without(monkeypatch: pytest.MonkeyPatch, package: str):
    """Return the module, imported as if ``package`` were not installed."""
    importing = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return importing(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "lora_ext.methods.vora.processor", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    return importlib.import_module("lora_ext.methods.vora.processor")


def test_error_without_transformers_names_the_extra(monkeypatch):
    message = (
        r"VoraImageProcessor: transformers is not installed; "
        r"run `pip install --no-build-isolation '\.\[vision\]'`"
    )
    with pytest.raises(ModuleNotFoundError, match=message):
        reloaded_without(monkeypatch, "transformers")


def test_without_pillow_arrays_work_and_paths_name_the_extra(monkeypatch, tmp_path):
    module = reloaded_without(monkeypatch, "PIL")
    processor = module.VoraImageProcessor()
    assert processor(torch.zeros(3, 56, 56))["pixel_values"][0].shape == (3, 56, 56)
    message = (
        r"VoraImageProcessor: reading .*a.png needs Pillow; "
        r"run `pip install --no-build-isolation '\.\[vision\]'`"
    )
    with pytest.raises(ModuleNotFoundError, match=message):
        processor(tmp_path / "a.png")
