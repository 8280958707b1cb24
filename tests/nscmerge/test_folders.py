"""Folders appear whole or not at all."""

import errno

import pytest
from safetensors import SafetensorError

from nscmerge.errors import OutputError, OutputExistsError
from nscmerge.folders import check_absent, new_folder, sha256_file


def test_folder_appears_with_its_files_only_at_the_end(tmp_path):
    target = tmp_path / "new" / "out"
    with new_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
        assert folder.parent == target.parent
        assert not target.exists()
    assert (target / "sub" / "a.txt").read_text() == "a"
    assert [entry.name for entry in target.parent.iterdir()] == ["out"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "out") as folder:
        (folder / "half.txt").write_text("half")
        raise KeyError("stop")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "full",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, full):
    with pytest.raises(OutputError, match=r"out cannot be written \(.*No space left.*nothing of it was kept"):  # noqa: SIM117
        with new_folder(tmp_path / "out"):
            raise full
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["out", "sub/out"])
def test_a_parent_that_is_a_file_is_named(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"), new_folder(tmp_path / "file" / below):
        pass


@pytest.mark.parametrize("make", ["mkdir", "touch"])
def test_an_existing_path_is_refused_before_the_block_runs(tmp_path, make):
    getattr(tmp_path / "out", make)()
    entered = []
    with pytest.raises(OutputExistsError, match=r"out is there already.*new folder"), new_folder(tmp_path / "out"):
        entered.append(1)
    assert entered == []


def test_a_dangling_link_counts_as_there(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError):
        check_absent(tmp_path / "link")


def test_a_path_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(OutputExistsError), new_folder(tmp_path / "out") as folder:
        (folder / "mine.txt").write_text("mine")
        (tmp_path / "out").mkdir()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []


def test_sha256_of_known_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
