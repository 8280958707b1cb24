"""Every primitive against its signed distance function: an oracle that knows nothing of rays."""

import numpy as np
import pytest

from datamodules.scenes.primitives import Box, Capsule, Cylinder, Panel, Plane, Sphere
from datamodules.scenes.textures import Texture, value_noise

ORIGIN = np.array([0.3, -1.4, -3.0])


def box_distance(box, p):
    c, s = np.cos(box.yaw), np.sin(box.yaw)
    x, y, z = (p - np.array(box.centre)).T
    q = np.abs(np.stack([c * x + s * z, y, c * z - s * x], axis=1)) - np.array(box.half)
    return np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(axis=1), 0)


def cylinder_distance(cylinder, p):
    x, y, z = (p - np.array(cylinder.centre)).T
    q = np.stack([np.hypot(x, z) - cylinder.radius, np.abs(y) - cylinder.half_height], axis=1)
    return np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(axis=1), 0)


def capsule_distance(capsule, p):
    a, b = np.array(capsule.start), np.array(capsule.end)
    share = np.clip((p - a) @ (b - a) / ((b - a) @ (b - a)), 0, 1)
    return np.linalg.norm(p - a - share[:, None] * (b - a), axis=1) - capsule.radius


SHAPES = [
    (Box((0.1, -0.6, 1.0), (0.5, 0.6, 0.3), 0.7), box_distance),
    (Box((0.3, -1.4, 0.0), (0.4, 0.2, 0.3)), box_distance),  # straight ahead, edges parallel to the axes
    (Sphere((0.2, -1.0, 1.0), 0.6), lambda s, p: np.linalg.norm(p - np.array(s.centre), axis=1) - s.radius),
    (Cylinder((0.0, -0.5, 1.0), 0.4, 0.5), cylinder_distance),  # seen from above: its cap shows
    (Capsule((0.0, -1.5, 0.5), (0.6, -0.8, 1.2), 0.25), capsule_distance),
]
IDS = ["box turned", "box ahead", "sphere", "cylinder", "capsule"]


def rays():
    v, u = np.mgrid[-0.5:0.5:41j, -0.5:0.5:41j]
    return np.stack([u, v, np.ones_like(u)], axis=-1).reshape(-1, 3)


@pytest.mark.parametrize(("shape", "oracle"), SHAPES, ids=IDS)
def test_a_hit_is_the_first_point_of_the_surface_on_its_ray(shape, oracle):
    directions = rays()
    t = shape.distance(ORIGIN, directions)
    hit = np.isfinite(t)
    assert 30 < hit.sum() < len(hit)
    np.testing.assert_allclose(oracle(shape, ORIGIN + t[hit, None] * directions[hit]), 0, atol=1e-9)
    for step in np.linspace(0, 0.999, 60):
        assert (oracle(shape, ORIGIN + step * t[hit, None] * directions[hit]) > 0).all()
    for step in np.linspace(0, 8, 300):
        assert (oracle(shape, ORIGIN + step * directions[~hit]) > 0).all()


@pytest.mark.parametrize(("shape", "oracle"), SHAPES, ids=IDS)
def test_normals_and_curvatures_are_derivatives_of_the_distance(shape, oracle):
    directions = rays()
    t = shape.distance(ORIGIN, directions)
    points = ORIGIN + t[np.isfinite(t), None] * directions[np.isfinite(t)]
    surface = shape.surface(points)
    step = 1e-4
    eye = step * np.eye(3)
    slope = np.stack([oracle(shape, points + e) - oracle(shape, points - e) for e in eye], axis=1) / (2 * step)
    hessian = np.zeros((len(points), 3, 3))
    for i, j in np.ndindex(3, 3):
        corners = [sa * sb * oracle(shape, points + sa * eye[i] + sb * eye[j]) for sa in (1, -1) for sb in (1, -1)]
        hessian[:, i, j] = sum(corners) / (4 * step**2)
    # Beside an edge the differences reach over it.
    smooth = np.abs(np.linalg.norm(slope, axis=1) - 1) < 1e-6
    expected = np.sort(np.linalg.eigvalsh(hessian), axis=1)[:, ::-1][:, :2]
    smooth &= np.abs(np.linalg.eigvalsh(hessian)).max(axis=1) < 50
    assert smooth.mean() > 0.8
    np.testing.assert_allclose(surface.normal[smooth], slope[smooth], atol=1e-5)
    seam = np.abs(expected[smooth] - surface.curvature[smooth]).max(axis=1) > 1e-3
    assert seam.mean() < 0.02  # where a barrel meets its end, the curvature jumps
    np.testing.assert_allclose(np.linalg.norm(surface.normal, axis=1), 1, atol=1e-12)


def test_numbers_by_hand():
    ahead = np.array([[0.0, 0.0, 1.0]])
    origin = np.zeros(3)
    assert Sphere((0, 0, 5), 1.0).distance(origin, ahead) == 4
    assert Cylinder((0, 0, 5), 0.5, 1.0).distance(origin, ahead) == 4.5
    assert Box((0, 0, 5), (1, 1, 2)).distance(origin, ahead) == 3
    assert Capsule((-1, 0, 5), (1, 0, 5), 0.25).distance(origin, ahead) == 4.75
    assert Plane((0, 0, 2), (0, 0, -1)).distance(origin, 2 * ahead) == 1  # in multiples of the direction
    assert Plane((0, 0, 2), (0, 0, 1)).distance(origin, ahead) == np.inf  # from behind
    assert Sphere((0, 0, -5), 1.0).distance(origin, ahead) == np.inf  # behind the camera
    np.testing.assert_array_equal(Sphere((0, 0, 5), 0.5).surface(np.array([[0, 0, 4.5]])).curvature, [[2, 2]])
    side, cap = Cylinder((0, 0, 0), 0.5, 1.0).surface(np.array([[0.5, 0.2, 0], [0.1, -1.0, 0]])).curvature
    assert side.tolist() == [2, 0]
    assert cap.tolist() == [0, 0]


def test_a_panel_ends_where_it_says():
    panel = Panel((2.0, -1.0, 0.5), (-1.0, 0.0, 0.0), width=1.0, height=0.4)
    ends = np.array([[2.0, -1.0 + y, 0.5 + z] for y in (-0.19, 0.19, 0.21) for z in (-0.49, 0.49, 0.51)])
    t = panel.distance(np.zeros(3), ends)
    assert np.isclose(t, 1).tolist() == [True, True, False, True, True, False, False, False, False]
    np.testing.assert_array_equal(panel.surface(ends[:1]).normal, [[-1, 0, 0]])


def test_patterns_by_hand():
    black, white = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    along = np.array([[x, 0.05, 0.05] for x in (0.05, 0.15, 0.25, -0.05)])
    assert Texture("checker", black, white, 0.1).colour(along)[:, 0].tolist() == [0, 1, 0, 1]
    assert Texture("stripes", black, white, 0.1, (0.0, 1.0, 0.0)).colour(along)[:, 0].tolist() == [0, 0, 0, 0]
    assert Texture("stripes", black, white, 0.1, phase=(0.7, 0, 0)).colour(along)[:, 0].tolist() == [1, 0, 1, 0]
    assert Texture("flat", white, black).colour(along).min() == 1


def test_noise_is_smooth_even_and_its_own():
    points = np.random.default_rng(0).uniform(-20, 20, (4000, 3))
    noise = value_noise(points, 3)
    assert noise.min() >= 0
    assert noise.max() < 1
    assert abs(noise.mean() - 0.5) < 0.02
    np.testing.assert_allclose(value_noise(points + 1e-4, 3), noise, atol=1e-3)
    assert abs(np.corrcoef(noise, value_noise(points, 4))[0, 1]) < 0.1
