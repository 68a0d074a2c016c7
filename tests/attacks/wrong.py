"""Wrong values for `inputs`: each list holds what must be refused wherever it stands."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Content = dict[str, Any]
Change = Callable[[Content, random.Random], None]
"""Puts a mistake into the content of an annotation file, at a random place."""

NAN, INFINITE = float("nan"), float("inf")
NO_IDS: list[Any] = [1.5, 2.0, -1, 2**64, None, True, "1", [1], {}, NAN]
NO_NAMES: list[Any] = [None, 5, True, [], {}, ["a"], "\ud800", "a\udfffb"]
NO_CROWDS: list[Any] = ["no", "0", None, 2, -1, 0.5, 1.0, [], {}]
NO_COORDINATES: list[Any] = [NAN, INFINITE, -INFINITE, 1e300, -1e30, 10**30, "12", None, True, [1], {}]
NO_SEGMENTATIONS: list[Any] = [
    None, [], "", "text", 5, True, {}, [[]], [5], [None], [["a"] * 6], [[1, 2]], [[1, 2, 3, 4, 5, 6, 7]], [1, 2, 3, 4, 5, 6],
    [[[1, 2], [3, 4], [5, 6]]], [{}],
]  # fmt: skip
NO_COUNTS: list[Any] = [
    None, [], [5], [4096, 1], [-1, 4097], [4096.0], ["4096"], [True, 4095], [2**70], 5, {}, "", "0", "zzz",
    "   ", "é", "0" * 99, "\ud800",
]  # fmt: skip
NO_SIZES: list[Any] = [None, [], [64], [65, 64], [64.5, 64], [64.0, 64], "64", 64, {}, [64, 64, 1]]
NO_SIDES: list[Any] = [None, 0, -64, 64.0, "64", [], 10**9, 2**70, NAN, True]
NO_AREAS: list[Any] = ["5", -1, NAN, INFINITE, [], {}, True]
NO_BOXES: list[Any] = [[], [1, 2, 3], [1, 2, 3, None], [NAN] * 4, "text", 5, {}, [1, 2, 3, "4"]]
NO_ENTRIES: list[Any] = [None, 5, "text", [], {}, True]


def _entry(content: Content, chance: random.Random, kind: str = "annotations") -> Content:
    found: Content = chance.choice(content[kind])
    return found


def _put(kind: str, key: str, values: list[Any]) -> Change:
    return lambda content, chance: _entry(content, chance, kind).update({key: chance.choice(values)})


def _coordinate(content: Content, chance: random.Random) -> None:
    entry = _entry(content, chance)
    entry["segmentation"] = [[1, 1, 20, 1, 20, 20, 1, 20]]
    entry["segmentation"][0][chance.randrange(8)] = chance.choice(NO_COORDINATES)


def _runs(content: Content, chance: random.Random) -> None:
    right = {"size": [64, 64], "counts": [100, 50, 4096 - 150]}
    wrong = chance.choice([{"counts": chance.choice(NO_COUNTS)}, {"size": chance.choice(NO_SIZES)}])
    _entry(content, chance)["segmentation"] = {**right, **wrong}


def _replace(content: Content, chance: random.Random) -> None:
    kind = chance.choice(["images", "annotations", "categories"])
    content[kind][chance.randrange(len(content[kind]))] = chance.choice(NO_ENTRIES)


def _remove(content: Content, chance: random.Random) -> None:
    kind, keys = chance.choice(
        [
            ("images", ["id", "file_name", "height", "width"]),
            ("annotations", ["id", "image_id", "category_id", "segmentation"]),
            ("categories", ["id", "name"]),
        ]
    )
    _entry(content, chance, kind).pop(chance.choice(keys))


def _twice(content: Content, chance: random.Random) -> None:
    kind = chance.choice(["images", "categories"])
    content[kind].append({**_entry(content, chance, kind)})


CHANGES: dict[str, Change] = {
    "coordinate": _coordinate,
    "run lengths": _runs,
    "segmentation": _put("annotations", "segmentation", NO_SEGMENTATIONS),
    "annotation id": _put("annotations", "id", NO_IDS),
    "image id of an annotation": _put("annotations", "image_id", [*NO_IDS, 999]),
    "category id of an annotation": _put("annotations", "category_id", [*NO_IDS, 999]),
    "iscrowd": _put("annotations", "iscrowd", NO_CROWDS),
    "area": _put("annotations", "area", NO_AREAS),
    "bbox": _put("annotations", "bbox", NO_BOXES),
    "image id": _put("images", "id", NO_IDS),
    "file name": _put("images", "file_name", [*NO_NAMES, "\0.png"]),
    "height": _put("images", "height", NO_SIDES),
    "width": _put("images", "width", NO_SIDES),
    "category id": _put("categories", "id", NO_IDS),
    "category name": _put("categories", "name", NO_NAMES),
    "entry": _replace,
    "missing key": _remove,
    "same id twice": _twice,
    "annotations": lambda content, chance: content.update(annotations=chance.choice([None, {}, "text", 5, True])),
    "images": lambda content, chance: content.update(images=chance.choice([None, {}, "text", 5, []])),
    "categories": lambda content, chance: content.update(categories=chance.choice([None, {}, "text", 5, []])),
}
HARMLESS: dict[str, Change] = {
    "supercategory": _put("categories", "supercategory", [5, [], {}]),
    "license": _put("images", "license", ["text", -1, []]),
    "info": lambda content, chance: content.update(info=chance.choice([5, "text", {"year": "2017"}])),
    "licenses": lambda content, chance: content.update(licenses=chance.choice([5, "text", {}, [5]])),
}
"""Changes of parts that nothing reads. They must be accepted, although hotcoco alone would refuse the file."""

NO_JSON: list[bytes] = [
    b"", b"null", b"5", b"[]", b"{}", b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000, b"9" * 5000,
    b'{"images": [' + b"9" * 5000 + b']}', b"\xff\xfe\x00", b"\x00" * 1000, b'{"images": [', b"images: []",
    b'{"images": "\\ud800"}',
]  # fmt: skip
"""Whole files that are no annotations."""

BOMB = "&a [x, x, x, x, x, x, x, x, x]"
for _number in range(9):
    BOMB = f"&{chr(98 + _number)} [{BOMB}" + f", *{chr(97 + _number)}" * 8 + "]"
NO_YAML_VALUES: list[str] = [
    "2024-01-01", "2024-01-01 10:00:00", "2024-13-45", "!!set {a, b}", "!!binary aGVsbG8=", "!!omap [a: 1]", "!!pairs [a: b]",
    "!!python/object:os.system x", "!!python/tuple [1]", "!foo x", "!!bool maybe", "!!int x", "!!float x", "!!timestamp x",
    "&r [*r]", "&r {r: *r}", BOMB, "[" * 100_000, "[" * 50 + "]" * 50, "{a: " * 3000, "- " * 3000, '"\\ud800"', '"\\0"',
    "A" * 5000, "A" * 1_000_000, "9" * 5000, "0x" + "f" * 6000, ".nan", ".inf", "? [1, 2]\n: 3", "{[1]: 2}",
    "{null: 1}", "{1.5: 1}",
    "*missing", "<<: 5", "`", "@", "%", "\t", "a: b: c", "'", '"', "!!merge x",
]  # fmt: skip
"""Values that no setting, label or name takes."""

SPEC = "title: {0}\ncolumns: [{1}]\nfigures: [AP]\nrows: [{{name: {2}, labels: {{loss: {3}}}, set: {4}, paper: {{AP: {5}}}}}]\n"
SPEC_PARTS = ["A table", "loss", "one", "dice", "{loss.pixel: none}", "30.1"]
"""Parts of a valid spec. A wrong value takes the place of one."""

NO_SETTINGS: list[str] = [
    "model.decoder.mask_scale=1e30", "model.decoder.mask_scale=1e-30", "model.decoder.mask_scale=0",
    "model.decoder.depth=1000000",
    "model.decoder.width=1000000000", "model.encoder.channels=1000000000", "model.decoder.kernel_dim=99999999",
    "model.decoder.iam.num_maps=1000000000000", "model.decoder.iam.groups=100000", "model.width_factor=1e30",
    "model.num_classes=1000000000", "data.long_side=1000000000", "data.short_sides=[1000000000]", "data.short_sides=[]",
    "data.workers=100000", "train.batch_size=1000", "train.batch_size=1000000000", "train.iterations=1e30",
    "train.iterations=99999999999999999999", "inference.size_factor=1e30", "inference.short_side=1000000000",
    "inference.long_side=0", "train=3", "model=3", "model.decoder={depth: 2}", "data={}", "train.seed=-1", "train.seed=1.5",
    "train.accumulate=3", "data.train_images=none", "data.val_images=none", "data.val_annotations=none",
    "data.val_annotations=/dev/zero", "data.train_annotations=/dev/zero", "data.root=''", "data.root=/dev/zero", "data.root=5",
    "model.backbone.name=none", "model.backbone.name=''", "model.backbone.weights=/dev/zero", "model.backbone.weights=none",
    "train.start=/dev/zero", "train.start=none", "train.learning_rate=.nan", "train.learning_rate=.inf", "train.precision=fp8",
    "data.source=shapes", "a=1", "=1", "train", "train.=1", ".=1", "model.decoder.depth=[[[[[",
]  # fmt: skip
"""Settings that a training of a tiny model on 24 images cannot have. (`data.source=shapes` refuses a folder of another size.)"""

NO_METADATA: list[Any] = [
    "", "null", "5", "[]", '"text"', "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "{", "\0", "true",
    '{"id": 1}', "[5]", "[null]",
]  # fmt: skip
NO_CATEGORIES: list[str] = [
    *NO_METADATA,
    *(json.dumps([{"id": wrong, "name": "a"}]) for wrong in NO_IDS),
    *(json.dumps([{"id": 1, "name": wrong}]) for wrong in NO_NAMES),
    json.dumps([{"id": 1, "name": "a"}]),
    json.dumps([{"id": 1, "name": "a"}] * 6),
    json.dumps([{"name": "a"}]),
    json.dumps([]),
]
