"""Check that image files of every kind are read alike."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparseinst.config import DataConfig
from sparseinst.data.check import check_folder
from sparseinst.data.collage import find_backgrounds
from sparseinst.data.images import read_image
from sparseinst.errors import DataError
from sparseinst.inference.predict import as_image
from sparseinst.visualize.inputs import find_images
from tests.conftest import annotation, box, write_coco


def write_kind(path: Path, kind: str) -> None:
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, (40, 60), dtype=np.uint8)
    if kind == "grey":
        Image.fromarray(grey).save(path)
    elif kind == "16 bit":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    elif kind == "16-bit pgm":
        values = (grey.astype(np.uint16) * 257).astype(">u2").tobytes()
        path.write_bytes(b"P5\n60 40\n65535\n" + values)
    elif kind == "palette":
        Image.fromarray(grey).convert("P").save(path)
    elif kind == "transparent":
        Image.fromarray(np.stack([grey] * 4, axis=2)).save(path)
    elif kind == "cmyk":
        Image.fromarray(grey).convert("CMYK").save(path, format="JPEG", quality=95)


@pytest.mark.parametrize("kind", ["grey", "16 bit", "16-bit pgm", "palette", "transparent", "cmyk"])
def test_images_of_every_kind_become_rgb(tmp_path: Path, kind: str) -> None:
    write_kind(tmp_path / "grey.png", "grey")
    write_kind(tmp_path / "image.png", kind)
    image = read_image(tmp_path / "image.png", (40, 60))
    assert (image.mode, image.size) == ("RGB", (60, 40))
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(read_image(tmp_path / "grey.png"), dtype=int))
    assert difference.mean() < (4 if kind == "cmyk" else 1)


@pytest.mark.parametrize("values", [np.full((8, 8), 300, np.int32), np.full((8, 8), 0.5, np.float32)])
def test_images_of_unknown_range_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    """A scale that depends on the values would make similar images differ."""
    Image.fromarray(values).save(tmp_path / "image.tiff")
    with pytest.raises(DataError, match=r"image\.tiff: its pixels are signed or have 32 bits.* convert it to 8 or 16 bits"):
        read_image(tmp_path / "image.tiff")


def test_a_16_bit_picture_in_memory_is_read_as_its_file(tmp_path: Path) -> None:
    write_kind(tmp_path / "image.png", "16 bit")
    with Image.open(tmp_path / "image.png") as picture:
        assert np.array_equal(np.asarray(as_image(picture)), np.asarray(read_image(tmp_path / "image.png")))


def test_exif_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers turn the image by 90 degrees
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (40, 60)
    assert read_image(tmp_path / "turned.jpg", (60, 40)).size == (40, 60)
    assert read_image(tmp_path / "turned.jpg", (40, 60)).size == (60, 40), (
        "an image that is annotated as it is stored is not turned"
    )
    with pytest.raises(DataError, match="is 60 x 40, its annotations say 50 x 40"):
        read_image(tmp_path / "turned.jpg", (40, 50))


@pytest.fixture
def _no_hang() -> Iterator[None]:
    """Fail the test after a minute, since to open a pipe may wait forever."""

    def fail(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("_no_hang")
def test_a_pipe_among_the_images_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        os.mkfifo(tmp_path / split / "1.png")
        write_kind(tmp_path / split / "2.png", "grey")
    (tmp_path / "train2017" / "gone.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"1\.png: is a folder, a device or a pipe"):
        read_image(tmp_path / "train2017" / "1.png")
    images = [{"id": n, "file_name": f"{n}.png", "height": 40, "width": 60} for n in (1, 2)]
    write_coco(tmp_path, images, [annotation(1, 2, 7, box(1, 1, 5, 5))])
    assert "1.png: is a folder, a device or a pipe" in "".join(check_folder(DataConfig(root=str(tmp_path)))["train"].problems)
    assert [file.name for file in find_images([tmp_path / "train2017"])] == ["2.png", "gone.png"]
    assert "1.png: is a folder, a device or a pipe and left out" in caplog.text
    assert [file.name for file in find_backgrounds(tmp_path)] == ["2.png", "2.png"]


def test_dark_16_bit_images_are_read_alike_and_reported(tmp_path: Path) -> None:
    """The values 255 and 256 of 65535 are almost equal, so they must not become white and black."""
    for number, value in enumerate((255, 256, 3200), start=1):
        (tmp_path / "train2017").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / "train2017" / f"{number}.png")
    found = [np.asarray(read_image(tmp_path / "train2017" / f"{number}.png")).max() for number in (1, 2, 3)]
    assert found == [1, 1, 12]
    shutil.copytree(tmp_path / "train2017", tmp_path / "val2017")
    images = [{"id": n, "file_name": f"{n}.png", "height": 8, "width": 8} for n in (1, 2, 3)]
    write_coco(tmp_path, images, [annotation(1, 1, 7, box(1, 1, 5, 5))])
    reports = check_folder(DataConfig(root=str(tmp_path)))
    assert "brighter than 12 of 255; if 16-bit files hold 12-bit values" in "".join(reports["train"].problems)
