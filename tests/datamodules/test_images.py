"""Pictures against transformers' own processor with Pillow, and what cannot be decoded."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from datamodules.images import ImageTransform, read_image
from nscmerge.errors import ConfigError, DataError, DatasetNotFoundError


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


PROCESSORS = {
    "clip": {},
    "llava": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
    "odd crop": {"size": {"shortest_edge": 40}, "crop_size": {"height": 31, "width": 33}},
    "crop larger than the picture": {"size": {"shortest_edge": 20}, "crop_size": {"height": 31, "width": 33}},
    "both edges": {"size": {"height": 30, "width": 50}, "crop_size": {"height": 28, "width": 28}},
    "bilinear": {"resample": 2},
}


@pytest.mark.parametrize("options", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("size", [(60, 45), (45, 60), (500, 41), (37, 37)])
def test_equals_the_processor_of_transformers(options, size):
    image = noise(*size)
    processor = CLIPImageProcessorPil(**options)
    expected = processor(images=image, return_tensors="pt")["pixel_values"][0].float()
    torch.testing.assert_close(ImageTransform.of(processor)(image), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(50, 20), (20, 50), (33, 33)])
def test_pad_makes_a_square_of_the_mean_colour_first(size):
    processor = CLIPImageProcessorPil()
    image = noise(*size)
    width, height = size
    side = max(size)
    square = np.tile(np.uint8([122, 116, 104]), (side, side, 1))  # int(255 * mean), as the original LLaVA has it
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = np.array(image)
    expected = processor(images=Image.fromarray(square), return_tensors="pt")["pixel_values"][0].float()
    torch.testing.assert_close(ImageTransform.of(processor, "pad")(image), expected, rtol=0, atol=2e-6)


def test_modes_and_processors_that_are_not_known():
    with pytest.raises(ConfigError, match="image mode 'stretch'"):
        ImageTransform.of(CLIPImageProcessorPil(), "stretch")
    with pytest.raises(ConfigError, match="other than 1/255"):
        ImageTransform.of(CLIPImageProcessorPil(rescale_factor=1.0))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16"])
def test_every_kind_of_picture_becomes_rgb(mode):
    image = noise(9, 7).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = image.convert("I").convert("I;16")
    data = encoded(image, "TIFF")
    read = read_image(data, "x")
    assert read.mode == "RGB"
    assert np.array_equal(np.array(read), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def test_from_bytes_path_and_hugging_face(tmp_path):
    image = noise(9, 7)
    image.save(tmp_path / "a.png")
    for value in (image, encoded(image), {"bytes": encoded(image), "path": None}, tmp_path / "a.png"):
        assert np.array_equal(np.array(read_image(value, "x")), np.array(image))
    for value in ("a.png", {"bytes": None, "path": "a.png"}):
        assert np.array_equal(np.array(read_image(value, "x", tmp_path)), np.array(image))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_what_cannot_be_decoded_is_named(tmp_path, kind):
    whole = encoded(noise(64, 64), kind)
    for broken in (whole[: len(whole) // 2], b"no image", b""):
        with pytest.raises(DataError, match=r"VizWiz, sample 3: its image cannot be decoded.*fetch it again"):
            read_image(broken, "VizWiz, sample 3")
    (tmp_path / "b.png").write_bytes(whole[:100])
    with pytest.raises(DataError, match=r"sample 3: .*b\.png cannot be decoded"):
        read_image("b.png", "sample 3", tmp_path)
    with pytest.raises(DatasetNotFoundError, match=r"sample 3: its image .*c\.png is missing"):
        read_image("c.png", "sample 3", tmp_path)
    for nothing in (None, {"bytes": None, "path": None}, 5):
        with pytest.raises(DataError, match="sample 3: expected an image"):
            read_image(nothing, "sample 3")
