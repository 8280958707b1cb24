"""Maps computed from frames, against numbers by hand and a few lines of plain loops."""

import numpy as np
import pytest
from skimage.graph import cut_normalized, rag_mean_color

from datamodules.scenes.camera import Camera
from datamodules.scenes.cues import (
    keypoints_2d,
    keypoints_3d,
    luma,
    occlusion_edge,
    principal_curvature,
    reshading,
    texture_edge,
)
from datamodules.scenes.encode import depth_code, opposite_normal_code, response_code, taskonomy_normal_code
from datamodules.scenes.labels import context_categories, nyud_classes, salient, voc_classes, with_void_rims
from datamodules.scenes.normalized_cut import normalized_cut
from datamodules.scenes.primitives import Box, Cylinder, Panel, Plane, Sphere
from datamodules.scenes.render import cast
from datamodules.scenes.scene import Scene
from datamodules.scenes.segments import segments_2d, segments_25d
from datamodules.scenes.solid import Solid
from datamodules.scenes.textures import Texture

GREY = Texture("flat", (0.5, 0.5, 0.5))
WALL = Plane((0, 0, 4), (0, 0, -1))


def frame(*shapes, kinds=None, size=(33, 33), fov=60):
    kinds = kinds or ["wall"] * len(shapes)
    solids = [Solid(s, GREY, k, i, open=k == "window") for i, (s, k) in enumerate(zip(shapes, kinds, strict=True))]
    return cast(Scene(tuple(solids), (6, 3, 6)), Camera(field_of_view=fov), size)


def sobel_by_hand(values):
    kernel = np.outer([1, 2, 1], [-1, 0, 1]) / 4
    out = np.zeros_like(values)
    for y in range(1, len(values) - 1):
        for x in range(1, values.shape[1] - 1):
            window = values[y - 1 : y + 2, x - 1 : x + 2]
            across, down = (window * kernel).sum(), (window * kernel.T).sum()
            out[y, x] = np.hypot(across, down) / np.sqrt(2)
    return out


def test_depth_survives_its_code_within_a_512th():
    metres = np.random.default_rng(0).uniform(0, 127.9, (40, 50))
    hole = np.zeros(metres.shape, bool)
    hole[3, 4] = True
    code = depth_code(metres, hole)
    assert code.dtype == np.uint16
    assert code[3, 4] == 65535
    assert (code == 65535).sum() == 1
    assert np.abs(code[~hole] / 512 - metres[~hole]).max() <= 0.5 / 512 + 1e-12
    assert depth_code(np.array([[200.0, 1.0]]), np.zeros((1, 2), bool)).tolist() == [[65534, 512]]


def test_normals_survive_both_codes_within_half_a_step():
    normal = np.random.default_rng(0).normal(size=(20, 30, 3))
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    hole = np.zeros((20, 30), bool)
    hole[0, 0] = True
    code = taskonomy_normal_code(normal, hole)
    assert code[0, 0].tolist() == [128, 128, 128]
    assert np.abs((code / 127.5 - 1) - normal)[~hole].max() <= 0.5 / 127.5 + 1e-12
    # NYUD and PASCAL decode as 2 v / 255 - 1 and point the other way on all three axes.
    assert np.abs((2.0 * opposite_normal_code(normal) / 255 - 1) + normal).max() <= 1 / 255 + 1e-12


def test_responses_saturate():
    assert response_code(np.array([[-0.1, 0, 0.5, 1, 1.2]])).tolist() == [[0, 0, 32768, 65535, 65535]]


def test_curvature_codes_by_hand():
    seen = principal_curvature(frame(WALL, Sphere((-0.5, 0, 2), 0.25), Cylinder((0.5, 0, 2), 0.25, 1.0)))
    solid = frame(WALL, Sphere((-0.5, 0, 2), 0.25), Cylinder((0.5, 0, 2), 0.25, 1.0)).solid
    curved = round((0.03 * 4 + 1) * 127)  # 1 / 0.25 m
    assert np.unique(seen[solid == 0], axis=0).tolist() == [[127, 127, 0]]
    assert np.unique(seen[solid == 1], axis=0).tolist() == [[curved, curved, 0]]
    assert np.unique(seen[solid == 2], axis=0).tolist() == [[curved, 127, 0]]
    tiny = principal_curvature(frame(Sphere((0, 0, 0.5), 0.02)))
    assert tiny[16, 16].tolist() == [254, 254, 0]  # clipped at 1 / 0.03
    assert tiny[0, 0].tolist() == [127, 127, 0]  # hole


def test_reshading_by_hand():
    for depth, expected in ((2.0, 255), (4.0, 133), (8.0, 44)):  # 400 * 8 / (8 + d^2) is 267, 133.3, 44.4
        assert reshading(frame(Plane((0, 0, depth), (0, 0, -1))))[16, 16] == expected
    slanted = frame(WALL)
    cosine = 4 / slanted.distance[0, 0]
    assert slanted.cosine[0, 0] == pytest.approx(cosine)
    assert reshading(slanted)[0, 0] == round(400 * cosine * 8 / (8 + slanted.distance[0, 0] ** 2))
    assert reshading(frame(Sphere((0, 0, 3), 0.1)))[0, 0] == 0


def test_occlusion_edges_are_sobel_of_the_root_and_stop_at_holes():
    code = np.full((9, 12), 512, np.uint16)
    code[:, 6:] = 2048
    expected = sobel_by_hand(np.sqrt(code.astype(float)) / 256)
    assert expected.max() > 0.05
    np.testing.assert_allclose(occlusion_edge(code)[1:-1, 1:-1], expected[1:-1, 1:-1], atol=1e-12)
    code[4, 6] = 65535
    edges = occlusion_edge(code)
    assert np.all(edges[3:6, 5:8] == 0)
    np.testing.assert_allclose(edges[1:-1, 9], expected[1:-1, 9])


def test_texture_edges_smooth_first_and_leave_borders_alone():
    assert texture_edge(np.full((32, 40), 0.7)).max() < 1e-9
    ramp = np.tile(np.linspace(0, 1, 41), (64, 1))
    # A ramp of 1/40 per pixel stays one under smoothing (sigma 3 * 64 / 512).
    np.testing.assert_allclose(texture_edge(ramp)[8:-8, 8:-8], sobel_by_hand(ramp)[8:-8, 8:-8], rtol=1e-6)
    step = np.zeros((64, 40))
    step[:, 20:] = 1
    assert texture_edge(step).max() < sobel_by_hand(step).max()


def test_luma_is_pillows():
    # L = (299 R + 587 G + 114 B) / 1000
    assert luma(np.array([[[255, 0, 0], [0, 255, 0], [10, 20, 30]]], np.uint8))[0] * 255 == pytest.approx([76, 150, 18])


def test_key_points_in_2d_are_blobs():
    grey = np.zeros((64, 64))
    grey[30:35, 40:45] = 1
    response = keypoints_2d(grey)
    # Scikit-image's filters sit a pixel to the upper left.
    assert np.abs(np.array(np.unravel_index(response.argmax(), response.shape)) - [32, 42]).max() <= 1
    assert response.min() >= 0
    assert keypoints_2d(np.full((64, 64), 0.4))[20:-20, 20:-20].max() < 1e-9  # borders answer, as in the released files


def test_key_points_in_3d_are_corners():
    assert keypoints_3d(frame(WALL)).max() < 1e-9
    corner = frame(
        Plane((0, 0, 4), (-np.sqrt(0.5), 0, -np.sqrt(0.5))), Plane((0, 0, 4), (np.sqrt(0.5), 0, -np.sqrt(0.5)))
    )
    # Half the window each way: the mean of two perpendicular unit vectors has length sqrt(1/2). The windows' half
    # width is 0.15 m at 4 m, one pixel of 28.6 to the metre and metre away; nearest pixel: 1, so 3 columns, 2 + 1.
    expected = 0.85 * (1 - np.hypot(2, 1) / 3)
    assert keypoints_3d(corner).max() == pytest.approx(expected, rel=1e-6)
    assert keypoints_3d(corner)[:, 0].max() < 1e-9
    holed = frame(WALL, Panel((0, 0, 3.99), (0, 0, -1), 1, 1), kinds=["wall", "window"])
    assert keypoints_3d(holed).max() < 1e-9


def test_two_colours_are_two_segments():
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32], image[:, 32:] = (250, 20, 20), (20, 20, 250)
    segments = segments_2d(image)
    assert segments.dtype == np.uint8
    assert segments[10, 5] != segments[10, 60]
    assert {segments.min(), segments.max()} == {0, 255}
    np.testing.assert_array_equal(segments, segments_2d(image))
    assert segments_2d(np.full((64, 64, 3), 90, np.uint8)).max() == 0  # one segment alone


def test_geometry_makes_segments_too():
    seen = frame(WALL, Box((0.2, 0.1, 2.5), (0.5, 0.5, 0.2), 0.5), size=(64, 64))
    z = depth_code(seen.depth, seen.hole)
    segments = segments_25d(z, taskonomy_normal_code(seen.normal, seen.hole), response_code(occlusion_edge(z)))
    assert {segments.min(), segments.max()} == {0, 255}
    box = seen.solid == 1
    wall_segment = np.bincount(segments[~box]).argmax()
    assert (segments[box] == wall_segment).mean() < 0.3


def test_classes_of_every_numbering():
    seen = frame(WALL, Box((0, 0, 2.5), (0.5, 0.5, 0.2)), kinds=["wall", "sofa"])
    centre, corner = (16, 16), (0, 0)
    assert [f(seen)[centre] for f in (nyud_classes, voc_classes, context_categories)] == [6, 18, 368]
    assert [f(seen)[corner] for f in (nyud_classes, voc_classes, context_categories)] == [1, 0, 440]
    nothing = frame(Sphere((0, 0, 3), 0.3))
    assert [f(nothing)[corner] for f in (nyud_classes, voc_classes, context_categories)] == [0, 0, 0]


def test_void_rims_are_two_pixels_on_either_side():
    classes = np.zeros((5, 12), np.uint8)
    classes[:, 6:] = 15
    assert with_void_rims(classes)[2].tolist() == [0] * 4 + [255] * 4 + [15] * 4


def test_salient_objects_are_large_and_central():
    big, far_off = Sphere((0, 0, 3), 0.6), Sphere((1.2, 0.9, 3), 0.3)
    seen = frame(WALL, big, far_off, kinds=["wall", "ball", "ball"])
    np.testing.assert_array_equal(salient(seen), seen.solid == 1)
    seen = frame(WALL, Sphere((-0.5, 0, 3), 0.4), Sphere((0.5, 0, 3), 0.4), kinds=["wall", "ball", "dog"])
    np.testing.assert_array_equal(salient(seen), seen.solid >= 1)
    assert not salient(frame(WALL)).any()


def test_cuts_are_those_of_scikit_image():
    rng = np.random.default_rng(0)
    image = np.zeros((40, 40, 3))
    image[:, 22:], image[25:, :], image[25:, 22:] = (200, 30, 30), (20, 180, 40), (40, 40, 220)
    image += rng.normal(0, 3, image.shape)
    cells = np.arange(40) // 5
    superpixels = cells[:, None] * 8 + cells
    graph = rag_mean_color(image, superpixels, mode="similarity")
    weights = np.zeros((64, 64))
    for one, other, edge in graph.edges(data=True):
        weights[one, other] = weights[other, one] = edge["weight"]
    np.fill_diagonal(weights, 2.0)
    ours = normalized_cut(weights, threshold=0.005, cuts=10)[superpixels]
    theirs = cut_normalized(superpixels, graph, thresh=0.005, num_cuts=10, max_edge=2.0, rng=0)
    assert len(np.unique(ours)) == len(np.unique(theirs)) > 3
    for label in np.unique(ours):
        assert len(np.unique(theirs[ours == label])) == 1


def test_cuts_by_hand():
    pair = np.array([[0, 1, 0, 0], [1, 0, 0.01, 0], [0, 0.01, 0, 1], [0, 0, 1, 0]])
    # The cut through the weak edge costs 2 * 0.01 / 2.01.
    assert normalized_cut(pair, threshold=0.02 / 2.01 + 1e-9, cuts=10).tolist() == [0, 0, 2, 2]
    assert normalized_cut(pair, threshold=0.02 / 2.01 - 1e-9, cuts=10).tolist() == [0, 0, 0, 0]
    assert normalized_cut(np.eye(2), threshold=2.0, cuts=10).tolist() == [0, 0]  # too few to cut
