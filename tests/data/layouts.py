"""Write one small data set in each format that `data convert` reads: three images with the same two objects."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 20, 30
BOXES = {"car": (3, 2, 9, 7), "person": (20, 10, 26, 15)}
"""The instances of each image: left, top, right and bottom in pixels."""
CITY_IDS = {"car": 26, "person": 24}
VOC_IDS = {"car": 7, "person": 15}


def photo(file: Path, number: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (200 - 40 * number, 0, 90)).save(file)


def painted(values: dict[str, int], dtype: type = np.uint8) -> np.ndarray:
    """Return a label map (H, W) with a number for each instance."""
    labels = np.zeros((HEIGHT, WIDTH), dtype=dtype)
    for name, (left, top, right, bottom) in BOXES.items():
        labels[top:bottom, left:right] = values[name]
    return labels


def save(file: Path, values: np.ndarray) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(file)
    return file


def polygon(name: str) -> list[list[float]]:
    left, top, right, bottom = BOXES[name]
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def shape(name: str, **more: object) -> dict[str, object]:
    return {"label": name, "points": polygon(name), "group_id": None, "shape_type": "polygon", "flags": {}, **more}


def write_json(file: Path, shapes: list[object], **more: object) -> Path:
    content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"{file.stem}.png", "imageData": None}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**content, "imageHeight": HEIGHT, "imageWidth": WIDTH, **more}))
    return file


def make_masks(root: Path) -> None:
    for number in range(3):
        photo(root / f"i{number}" / "images" / "a.png", number)
        for index in range(2):
            ids = {"car": 255 * (index == 0), "person": 255 * (index == 1)}
            save(root / f"i{number}" / "masks" / f"{index}.png", painted(ids))


def make_labelme(root: Path) -> None:
    for number in range(3):
        photo(root / f"i{number}.png", number)
        write_json(root / f"i{number}.json", [shape("car"), shape("person")])


def make_voc(root: Path) -> None:
    for number in range(3):
        photo(root / "JPEGImages" / f"i{number}.jpg", number)
        objects = painted({"car": 1, "person": 2})
        objects[0] = 255  # the border
        save(root / "SegmentationObject" / f"i{number}.png", objects)
        save(root / "SegmentationClass" / f"i{number}.png", painted(VOC_IDS))
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("i0\ni2\n")
    (lists / "val.txt").write_text("i1\n")


def make_cityscapes(root: Path) -> None:
    for number in range(3):
        place = f"{'val' if number == 1 else 'train'}/ulm"
        photo(root / "leftImg8bit" / place / f"ulm_{number}_leftImg8bit.png", number)
        ids = painted({name: 1000 * label + number for name, label in CITY_IDS.items()}, np.uint16)
        ids[0] = 7  # road, which has no instances
        save(root / "gtFine" / place / f"ulm_{number}_gtFine_instanceIds.png", ids)


def make_label_maps(root: Path) -> None:
    for number in range(3):
        photo(root / "images" / f"i{number}.png", number)
        save(root / "masks" / f"i{number}.png", painted({"car": 3, "person": 700}, np.uint16))


def make_yolo(root: Path) -> None:
    for number in range(3):
        place = "val" if number == 1 else "train"
        photo(root / "images" / place / f"i{number}.png", number)
        lines = []
        for index, name in enumerate(BOXES):
            lines.append(" ".join([str(index), *(f"{x / WIDTH} {y / HEIGHT}" for x, y in polygon(name))]))
        text = root / "labels" / place / f"i{number}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("\n".join(lines) + "\n")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [car, person]\n")


MAKERS: dict[str, Callable[[Path], None]] = {
    "masks": make_masks,
    "labelme": make_labelme,
    "voc": make_voc,
    "cityscapes": make_cityscapes,
    "label_maps": make_label_maps,
    "yolo": make_yolo,
}
