import numpy as np
import pytest

from datamodules.dense.boundaries import evaluation_boundaries, seg2bmap, training_boundaries
from datamodules.dense.files import Pixels, read_array, read_image, read_mat
from datamodules.dense.lists import check_list, halves, list_hash, read_ids
from nscmerge.errors import DataError, DatasetNotFoundError
from tests.fakes.dense_trees import save_png, write_list


def test_seg2bmap_looks_east_south_and_south_east():
    labels_ = np.array([[1, 1, 2], [1, 1, 2], [3, 3, 3]])
    expected = [[0, 1, 0], [1, 1, 1], [0, 0, 0]]
    assert seg2bmap(labels_).astype(int).tolist() == expected


def test_boundaries_of_two_halves_are_one_line():
    halves_ = np.repeat([[0] * 6 + [9] * 6], 8, axis=0)
    assert np.flatnonzero(evaluation_boundaries(halves_).any(0)).tolist() == [5]
    assert evaluation_boundaries(halves_)[:, 5].all()
    # The Laplacian is not 0 on both sides, two pixels wide; thinning leaves one of them.
    columns = np.flatnonzero(training_boundaries(halves_).sum(0) > 4)
    assert len(columns) == 1
    assert columns[0] in (5, 6)
    assert not evaluation_boundaries(np.full((5, 5), 7)).any()
    assert not training_boundaries(np.full((5, 5), 7)).any()


def test_the_laplacian_is_that_of_four_neighbours_with_a_mirrored_border():
    from scipy.ndimage import laplace
    from skimage.morphology import thin

    rng = np.random.default_rng(0)
    map_ = np.kron(rng.integers(0, 459, (5, 6)), np.ones((4, 4), np.uint16)).astype(np.uint16)
    oracle = thin(laplace(map_.astype(np.float64), mode="mirror") != 0)
    assert np.array_equal(training_boundaries(map_), oracle)
    assert 0.05 < oracle.mean() < 0.5


def test_an_edge_map_moves_by_at_most_one_pixel():
    edges = np.zeros((12, 12), np.uint8)
    edges[:, 6] = 255
    found = evaluation_boundaries(edges)
    assert set(np.flatnonzero(found.any(0)).tolist()) <= {5, 6, 7}
    assert found[1:].any(1).all()  # thinning may eat the end of a line


def test_halves_are_the_permutation_of_the_sorted_list():
    ids = [f"{i:04d}" for i in range(11)]
    order = np.random.default_rng(5).permutation(11)
    expected = [ids[i] for i in order]
    assert halves(reversed(ids), 5) == (expected[:5], expected[5:])
    assert halves(ids, 6) != halves(ids, 5)


def test_a_list_is_known_by_the_hash_of_its_sorted_ids(tmp_path):
    import hashlib

    expected = hashlib.sha256(b"0001\n0002\n").hexdigest()
    assert list_hash(["0002", "0001"]) == expected
    check_list(tmp_path, "D", ["0002", "0001"], 2, expected[:16])
    with pytest.raises(DatasetNotFoundError, match=r"D: .* SHA-256 [0-9a-f]{16}\.\.\., .* starts with " + "0" * 16):
        check_list(tmp_path, "D", ["0002", "0001"], 2, "0" * 16)
    with pytest.raises(DatasetNotFoundError, match=r"holds 2 ids, the published list 3"):
        check_list(tmp_path, "D", ["0002", "0001"], 3, None)


def test_broken_lists_are_named(tmp_path):
    write_list(tmp_path / "a.txt", ["1", "2", "1"])
    with pytest.raises(DataError, match=r"a\.txt holds '1' twice"):
        read_ids(tmp_path / "a.txt", "D")
    write_list(tmp_path / "b.txt", [])
    with pytest.raises(DataError, match=r"b\.txt holds no id"):
        read_ids(tmp_path / "b.txt", "D")
    with pytest.raises(DatasetNotFoundError, match=r"c\.txt is missing.*root"):
        read_ids(tmp_path / "c.txt", "D")


def test_broken_images_are_named(tmp_path):
    file = tmp_path / "a.png"
    save_png(file, np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    assert np.asarray(read_image(file, Pixels.RGB, (30, 40))).shape == (30, 40, 3)
    with pytest.raises(DataError, match=r"a\.png is 30 x 40 pixels .* expected 40 x 30 as its image"):
        read_image(file, Pixels.RGB, (40, 30))
    with pytest.raises(DataError, match=r"a\.png holds .* mode RGB, expected 16-bit grey"):
        read_image(file, Pixels.GREY16)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.png cannot be read .*truncated"):
        read_image(file, Pixels.RGB)
    file.write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.png cannot be read"):
        read_image(file, Pixels.RGB)
    with pytest.raises(DatasetNotFoundError, match=r"b\.png is missing"):
        read_image(tmp_path / "b.png", Pixels.RGB)


def test_sixteen_bits_stay_sixteen_bits(tmp_path):
    values = np.array([[0, 1, 255], [256, 65534, 65535]], np.uint16)
    save_png(tmp_path / "a.png", values)
    image = read_image(tmp_path / "a.png", Pixels.GREY16)
    assert np.asarray(image).astype(int).tolist() == values.tolist()
    save_png(tmp_path / "b.png", values.astype(np.uint8))
    with pytest.raises(DataError, match=r"b\.png .* mode L, expected 16-bit grey"):
        read_image(tmp_path / "b.png", Pixels.GREY16)


def test_broken_arrays_and_structures_are_named(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 3, 1)))
    with pytest.raises(DataError, match=r"a\.npy holds an array of shape \(2, 3, 1\)"):
        read_array(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.ones((2, 3)))
    with pytest.raises(DataError, match=r"a\.npy is 2 x 3 .* expected 3 x 2"):
        read_array(tmp_path / "a.npy", (3, 2))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:-8])
    with pytest.raises(DataError, match=r"a\.npy cannot be read"):
        read_array(tmp_path / "a.npy")
    (tmp_path / "a.mat").write_bytes(b"not a mat file" * 20)
    with pytest.raises(DataError, match=r"a\.mat cannot be read"):
        read_mat(tmp_path / "a.mat", "anno")
    with pytest.raises(DatasetNotFoundError, match=r"b\.mat is missing"):
        read_mat(tmp_path / "b.mat", "anno")
