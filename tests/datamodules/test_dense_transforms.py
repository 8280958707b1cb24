import colorsys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from datamodules.dense import labels
from datamodules.dense.photometric import distort, scale_contrast, scale_saturation, shift_brightness
from datamodules.dense.transforms import Augmentation, Draws, View, centre_pad, normalize, rescale


def picture(height=40, width=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def test_padding_is_around_and_its_odd_row_below():
    padded = centre_pad(torch.ones(1, 2, 3), (5, 5), 255)
    assert padded[0].tolist() == [
        [255] * 5,
        [255, 1, 1, 1, 255],
        [255, 1, 1, 1, 255],
        [255] * 5,
        [255] * 5,
    ]
    assert centre_pad(torch.ones(1, 7, 3), (5, 4), 0).shape == (1, 7, 4)


def test_normalisations():
    image = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(3, 1, 1)
    expected = [(0 - 0.485) / 0.229, (1 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(normalize(image, "imagenet").flatten(), torch.tensor(expected))
    torch.testing.assert_close(normalize(image, "half").flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def test_what_counts_nowhere():
    classes = torch.tensor([[[0.0, 3.0], [255.0, 1.0]]])
    assert labels.as_classes(classes).tolist() == [[0, 3], [255, 1]]
    assert labels.as_parts(classes).tolist() == [[0, 3], [255, 1]]
    nobody = torch.tensor([[[0.0, 255.0]]])
    assert labels.as_parts(nobody).tolist() == [[255, 255]]
    assert labels.as_depth(torch.tensor([[[0.0, 2.5]]])).tolist() == [[255, 2.5]]
    normals = torch.tensor([[[0.0, 0.0]], [[0.0, 0.6]], [[0.0, 0.8]]])
    assert labels.as_normals(normals)[:, 0, 0].tolist() == [255] * 3
    assert labels.as_normals(normals)[:, 0, 1].tolist() == pytest.approx([0, 0.6, 0.8])


@pytest.mark.parametrize("kind", [labels.CLASSES, labels.PARTS, labels.SALIENCY, labels.DEPTH, labels.EDGES])
def test_padding_counts_nowhere(kind):
    label = torch.full((1, 2, 2), 1.0)
    target = View((4, 6), "imagenet").label(label, kind).reshape(4, 6)
    assert (target == 1).sum() == 4
    assert (target == 255).sum() == 20


def test_padding_of_normals_counts_nowhere_and_of_images_is_the_mean_colour():
    view = View((4, 6), "imagenet")
    target = view.label(torch.full((3, 2, 2), 0.5), labels.NORMALS)
    assert ((target == 255).all(0)).sum() == 20
    assert (view.image(picture(2, 2))[:, 0] == 0).all()


def test_mirrored_twice_is_the_same_and_normals_turn_their_x():
    normals = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    once = labels.flip_normals(normals)
    torch.testing.assert_close(once[0], -normals[0].flip(-1))
    torch.testing.assert_close(once[1:], normals[1:].flip(-1))
    torch.testing.assert_close(labels.flip_normals(once), normals)
    zero = labels.flip_normals(torch.zeros(3, 1, 1))
    assert (labels.as_normals(zero) == 255).all()


def test_scaling_is_nearest_for_labels_and_divides_depth():
    label = torch.arange(6.0).reshape(1, 2, 3)
    image, depth = rescale(picture(2, 3), label, 2.0, labels.DEPTH)
    assert image.shape == (3, 4, 6)
    assert depth[0].tolist() == [[0, 0, 0.5, 0.5, 1, 1]] * 2 + [[1.5, 1.5, 2, 2, 2.5, 2.5]] * 2
    _, classes = rescale(picture(2, 3), label, 0.5, labels.CLASSES)
    assert classes.tolist() == [[[0.0]]]


def test_image_and_label_share_the_draw():
    # Every pixel's label is computed from its colour, before and after.
    label = torch.arange(24 * 32).reshape(1, 24, 32)
    image = torch.cat([label // 32, label % 32, label * 0]).to(torch.uint8)
    same_size = Augmentation((16, 20), scale=(1.0, 1.0), colours=False)
    flipped = 0
    for seed in range(20):
        seen, found = same_size(image, label.float(), labels.EDGES, np.random.default_rng(seed))
        assert seen.shape == (3, 16, 20)
        assert torch.equal(seen[0].long() * 32 + seen[1].long(), found[0].long())
        flipped += bool(found[0, 0, 0] > found[0, 0, 1])
    assert 3 < flipped < 17


def test_augmentation_never_invents_a_label():
    label = torch.randint(0, 5, (1, 30, 40), generator=torch.Generator().manual_seed(0)).float() * 7
    for seed in range(10):
        image, found = Augmentation((25, 25))(picture(30, 40), label, labels.CLASSES, np.random.default_rng(seed))
        assert set(found.unique().tolist()) <= set(label.unique().tolist())
        assert image.dtype == torch.uint8
        assert image.shape[1:] == found.shape[1:]
        assert max(found.shape[1:]) <= 25


def test_a_crop_of_one_label_is_drawn_again_for_classes_only():
    label = torch.zeros(1, 40, 400)
    label[:, :, 200:] = 1
    augmentation = Augmentation((40, 40), scale=(1.0, 1.0), colours=False)

    def mixed(kind):
        crops = (augmentation(picture(40, 400), label, kind, np.random.default_rng(seed))[1] for seed in range(60))
        return sum(len(crop.unique()) > 1 for crop in crops)

    # One crop in ten shows both; of eleven drawn, two in three at least one.
    assert mixed(labels.SALIENCY) < 15
    assert mixed(labels.CLASSES) > 20


def test_ignored_pixels_do_not_make_a_crop_balanced():
    label = torch.full((1, 8, 8), 255.0)
    label[0, 0, 0] = 3
    assert not Augmentation((4, 4))._balanced(label)
    label[0, 0, 1] = 4
    assert Augmentation((4, 4))._balanced(label)  # 50 % each of the two that count
    label[0, 1, :4] = 4
    assert not Augmentation((4, 4))._balanced(label)  # 5 of 6


def test_brightness_and_contrast_by_hand():
    image = torch.tensor([0, 100, 250], dtype=torch.uint8).reshape(3, 1, 1)
    assert shift_brightness(image, 20.0).flatten().tolist() == [20, 120, 255]
    assert shift_brightness(image, -20.0).flatten().tolist() == [0, 80, 230]
    assert scale_contrast(image, 1.5).flatten().tolist() == [0, 150, 255]
    assert scale_contrast(image, 0.5).flatten().tolist() == [0, 50, 125]


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3, 1.5])
def test_saturation_is_that_of_hsv(factor):
    image = picture(6, 6)
    image[:, 0, 0], image[:, 0, 1] = 0, 77  # black and grey have no colour to scale
    found = scale_saturation(image, factor).permute(1, 2, 0).reshape(-1, 3)
    for before, after in zip(image.permute(1, 2, 0).reshape(-1, 3).tolist(), found.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in before))
        expected = [255 * c for c in colorsys.hsv_to_rgb(h, min(s * factor, 1), v)]
        assert after == pytest.approx(expected, abs=0.51)


def test_colours_change_within_bounds_and_by_the_generator_alone():
    image = picture()
    seen = [distort(image, np.random.default_rng(seed)) for seed in range(20)]
    assert all(torch.equal(a, distort(image, np.random.default_rng(i))) for i, a in enumerate(seen))
    assert len({a.float().mean().item() for a in seen}) > 10
    assert all(a.dtype == torch.uint8 and a.shape == image.shape for a in seen)
    assert torch.equal(image, picture())


class Numbers(Dataset):
    def __init__(self):
        self.draws = Draws(3)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor(self.draws(index).random())


@pytest.mark.parametrize("workers", [0, 2])
def test_draws_differ_by_sample_visit_and_worker_and_repeat_with_the_seed(workers):
    def epochs():
        loader = DataLoader(Numbers(), batch_size=2, num_workers=workers, generator=torch.Generator().manual_seed(0))
        return torch.cat([batch for _ in range(3) for batch in loader]).tolist()

    drawn = epochs()
    assert len(set(drawn)) == 12
    assert drawn == epochs()


def test_resizing_the_image_is_opencvs_bilinear():
    # OpenCV and torch without antialiasing sample at the same half-pixel centres: enlarged twice, weights are 1/4, 3/4.
    image = torch.tensor([[[0, 100]]], dtype=torch.uint8).expand(3, 1, 2)
    scaled, _ = rescale(image, torch.zeros(1, 1, 2), 2.0, labels.CLASSES)
    assert scaled[0, 0].tolist() == [0, 25, 75, 100]
    enlarged = Image.fromarray(np.uint8([[0, 100]])).resize((4, 1), Image.Resampling.BILINEAR)
    assert np.asarray(enlarged).tolist() == [[0, 25, 75, 100]]
