"""Split a COCO-format folder into training and validation images anew (`sparseinst data split`). Imports no torch.

Only two annotation files and a config file are written. They refer to the images where these are.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparseinst.config import DataConfig
from sparseinst.data.coco import annotation_files, read_split, train_annotations
from sparseinst.data.coco_folder import SPLITS
from sparseinst.errors import DataError, UserError
from sparseinst.files import atomic

Entry = dict[str, Any]
"""An entry of a COCO file."""

_FILE, _NAME = "_file", "_name"
"""Keys that a pooled entry has in addition: the number of its annotation file, and an image's original `file_name`."""


@dataclass
class Report:
    """The counts of a new split."""

    config: Path
    """The config file that selects the split."""
    images: dict[str, int] = field(default_factory=dict)
    instances: dict[str, int] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    """For each split, the categories that have an instance in the other split only."""


def split_folder(config: DataConfig, *, by: str = "image", name: str = "split", val: float = 0.2, seed: int = 0) -> Report:
    """Pool the images of a COCO-format folder and split them anew, so that no group is on both sides. Return the counts.

    Writes `annotations/{name}_train.json`, `annotations/{name}_val.json` and `{name}.yaml`, a config with their paths. The order
    of the images stays, and so do the ids unless two files use the same ones.

    Args:
        config: names the folder and its annotation files; one of the two may be missing.
        by: `image`; `field:KEY`, a field of the image's entry, such as `field:video_id`; or `name:REGEX`, a regular expression
            that finds the group in the `file_name` as it was: its first bracketed part, or else all that it matches.
        val: the share of the images in the validation split. Groups stay whole, so it holds only about.
        seed: chooses the groups.

    Raises:
        UserError: `by` or `name` is not valid, an image has no group, there is only one group, or the files exist.
        DataError: an annotation file cannot be used, or two entries are the same image.
    """
    if Path(name).name != name or name.startswith("."):
        raise UserError(f"--name {name}: cannot be used in file names; use letters and digits")
    root = Path(config.root)
    files = {split: root / "annotations" / f"{name}_{split}.json" for split in SPLITS}
    report = Report(root / f"{name}.yaml")
    for file in (*files.values(), report.config):
        if file.exists():
            raise UserError(f"{file}: exists already; choose another --name or delete it")
    images, annotations, rest = _pool(config)
    groups = _groups(images, _key(by), by)
    for image in images:
        del image[_NAME]
    chosen = _choose(groups, val, seed)
    used: dict[str, Counter[Any]] = {}
    for split, file in files.items():
        inside = [index for key, members in groups.items() if (key in chosen) == (split == "val") for index in members]
        ids = {images[index]["id"] for index in inside}
        part = [entry for entry in annotations if entry["image_id"] in ids]
        content = {**rest, "images": [images[index] for index in sorted(inside)], "annotations": part}
        with atomic(file) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
        used[split] = Counter(entry["category_id"] for entry in part if not entry.get("iscrowd"))
        report.images[split], report.instances[split] = len(inside), used[split].total()
        report.groups[split] = len(chosen) if split == "val" else len(groups) - len(chosen)
    for split, other in zip(SPLITS, reversed(SPLITS), strict=True):
        report.missing[split] = [c["name"] for c in rest["categories"] if used[other][c["id"]] and not used[split][c["id"]]]
    with atomic(report.config) as temporary:
        temporary.write_text(_config_text(files, by, val, seed, root), encoding="utf-8")
    return report


def _pool(config: DataConfig) -> tuple[list[Entry], list[Entry], Entry]:
    """Return the image entries, the annotation entries, and the rest of the annotation files, such as the categories."""
    root = Path(config.root)
    places = dict(zip(annotation_files(config), (root / config.train_images, root / config.val_images), strict=True))
    existing = {file: folder for file, folder in places.items() if file.is_file()}
    if not existing:
        existing = {train_annotations(config): root / config.train_images}  # raises a `DataError` that says what to do
    contents = []
    for file, folder in existing.items():
        read_split(file, folder)  # raises a `DataError` that names the entry
        contents.append((json.loads(file.read_text(encoding="utf-8")), folder))
    first = contents[0][0]
    for file, (content, _) in zip(existing, contents, strict=True):
        if [(c["id"], c["name"]) for c in content["categories"]] != [(c["id"], c["name"]) for c in first["categories"]]:
            raise DataError(f"{file}: its categories are not those of {next(iter(existing))}")
    images, annotations = [], []
    for number, (content, folder) in enumerate(contents):
        prefix = os.path.relpath(folder, root)
        for entry in content["images"]:
            name = os.path.normpath(f"{prefix}/{entry['file_name']}")
            images.append({**entry, "file_name": name, _FILE: number, _NAME: entry["file_name"]})
        annotations += [{**entry, _FILE: number} for entry in content.get("annotations", [])]
    [(path, uses)] = Counter(entry["file_name"] for entry in images).most_common(1)
    if uses > 1:
        raise DataError(f"{root}: {path} is listed {uses} times, so a split could have it on both sides")
    rest = {key: value for key, value in first.items() if key not in ("images", "annotations")}
    return *_with_unique_ids(images, annotations), rest


def _with_unique_ids(images: list[Entry], annotations: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Return the entries without the mark of their file. They get new ids, counted from 1, if two have the same one."""
    keys = [(entry[_FILE], entry["id"]) for entry in images]
    new_images = len({key for _, key in keys}) < len(keys)
    ids = {key: number if new_images else key[1] for number, key in enumerate(keys, start=1)}
    new_annotations = len({entry["id"] for entry in annotations}) < len(annotations)
    kept_images = [{**entry, "id": ids[entry[_FILE], entry["id"]]} for entry in images]
    kept = [
        {**entry, "id": number if new_annotations else entry["id"], "image_id": ids[entry[_FILE], entry["image_id"]]}
        for number, entry in enumerate(annotations, start=1)
    ]
    for entry in (*kept_images, *kept):
        del entry[_FILE]
    return kept_images, kept


def _key(by: str) -> Callable[[Entry], Any]:
    """Return the function that finds an image's group; it returns None for an image without one. Raises `UserError`."""
    kind, _, text = by.partition(":")
    if by == "image":
        return lambda entry: entry["id"]
    if kind == "field" and text:
        return lambda entry: entry.get(text)
    if kind == "name" and text:
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise UserError(f"--by {by}: not a regular expression ({error})") from None
        return lambda entry: _matched(pattern, entry[_NAME])
    raise UserError(f"--by {by}: use image, field:KEY (such as field:video_id) or name:REGEX (such as 'name:([^/]+)_\\d+')")


def _matched(pattern: re.Pattern[str], text: str) -> str | None:
    match = pattern.search(text)
    if match is None:
        return None
    return match.group(1) if pattern.groups else match.group()


def _groups(images: list[Entry], key: Callable[[Entry], Any], by: str) -> dict[str, list[int]]:
    """Return the indices of the images of each group. Raises `UserError` if an image has no group or there is only one."""
    groups: dict[str, list[int]] = {}
    without = []
    for index, entry in enumerate(images):
        group = key(entry)
        if group is None:
            without.append(entry[_NAME])
        groups.setdefault(str(group), []).append(index)
    if without:
        raise UserError(f"--by {by}: finds no group for {len(without)} of {len(images)} images, the first is {without[0]}")
    if len(groups) < 2:
        raise UserError(
            f"--by {by}: all {len(images)} images are in one group ({next(iter(groups))}), so there is nothing to split"
        )
    return groups


def _choose(groups: dict[str, list[int]], val: float, seed: int) -> set[str]:
    """Return the groups of the validation split: in random order, each that brings its size closer to the share."""
    names = sorted(groups)
    wanted = val * sum(map(len, groups.values()))
    order = [names[index] for index in np.random.default_rng(seed).permutation(len(names))]
    chosen: set[str] = set()
    size = 0
    for name in order:
        more = len(groups[name])
        if len(chosen) < len(groups) - 1 and abs(size + more - wanted) < abs(size - wanted):
            chosen.add(name)
            size += more
    return chosen or {min(order, key=lambda name: len(groups[name]))}


def _config_text(files: dict[str, Path], by: str, val: float, seed: int, root: Path) -> str:
    lines = [f"# sparseinst data split --by {json.dumps(by)} --val {val:g} --seed {seed}", "data:"]
    for split, file in files.items():
        lines += [f"  {split}_annotations: {json.dumps(file.relative_to(root).as_posix())}", f"  {split}_images: ."]
    return "\n".join(lines) + "\n"
