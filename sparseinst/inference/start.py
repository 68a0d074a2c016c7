"""Start a training from the weights of another model: keep every tensor that fits, and the fitting parts of the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparseinst.data.coco import Category
from sparseinst.errors import UserError
from sparseinst.inference.weights import load_weights
from sparseinst.models.sparseinst import SparseInst

_BRANCH = "decoder.instance_branch."
_CLASSES = (f"{_BRANCH}classes.weight", f"{_BRANCH}classes.bias")
_IAM = f"{_BRANCH}iam."
_GROUPED_MAPS = (f"{_IAM}conv.weight", f"{_IAM}conv.bias")
_MAPS = (*_GROUPED_MAPS, f"{_IAM}queries")


class Start(NamedTuple):
    """The parts of the start weights that a model keeps."""

    fresh: list[str]
    """The names of the tensors that start from random weights as a whole."""
    classes: list[str]
    """The classes whose weights in the class head are kept, because both models have a class of this name."""
    maps: int
    """The number of instance activation maps that are kept, the first ones."""

    def describe(self) -> str:
        """Return one line for the log."""
        names = ", ".join(self.classes[:5]) + (", ..." if len(self.classes) > 5 else "")
        head = f" and the class head's weights of {len(self.classes)} classes ({names})" if names else ""
        anew = "" if names else ", and no class has the same name, so the class head starts anew"
        return f"{self.maps} maps{head} are kept{anew}; new random weights: {', '.join(self.fresh) or 'no whole tensor'}"


def start_from(model: SparseInst, path: Path, categories: Sequence[Category]) -> Start:
    """Copy the tensors of a weights file into a fresh model of the same kind, which may have other classes, maps and F_iam.

    The class head keeps the classes that both models have by name (upper and lower case are the same). If the numbers of
    maps differ, the first maps are kept, in each group. Another kind of F_iam starts from random weights.

    Args:
        categories: the new model's classes, in the order of its class head.

    Raises:
        UserError: the file is no weights file of this package, or it holds another kind of model, so that a tensor's name is
            unknown or missing.
    """
    source, config, known = load_weights(path)
    theirs, ours = source.state_dict(), model.state_dict()
    counters = {name for name in theirs.keys() ^ ours.keys() if name.endswith(".num_batches_tracked")}  # frozen norms have none
    unknown, missing = (
        sorted(name for name in names - counters if not name.startswith(_IAM))
        for names in (theirs.keys() - ours.keys(), ours.keys() - theirs.keys())
    )
    if unknown or missing:
        name, what = (unknown[0], "is not in the new model") if unknown else (missing[0], "is not in the file")
        raise UserError(
            f"{path} holds weights of another kind of model: {name} {what} (and {len(unknown) + len(missing) - 1} more tensors)"
        )
    places = {category.name.lower(): place for place, category in enumerate(known)}
    rows = {new: places[c.name.lower()] for new, c in enumerate(categories) if c.name.lower() in places}
    fresh, maps = [], config.model.decoder.iam.num_maps
    for name, tensor in ours.items():
        if name in counters:
            continue
        if name not in theirs:  # another kind of F_iam
            kept = None
        elif name in _CLASSES:
            kept = _with_rows(tensor, theirs[name], rows)
        elif tensor.shape == theirs[name].shape:
            kept = theirs[name]
        elif name in _MAPS and tensor.shape[1:] == theirs[name].shape[1:]:
            groups = config.model.decoder.iam.groups if name in _GROUPED_MAPS else 1
            kept = _with_maps(tensor, theirs[name], groups)
            maps = min(maps, len(tensor) // groups)
        else:
            kept = None
        if kept is None:
            fresh.append(name)
        else:
            ours[name] = kept
    model.load_state_dict(ours)
    kept_maps = 0 if any(name.startswith(_IAM) for name in fresh) else maps
    return Start(sorted(fresh), [categories[new].name for new in rows], kept_maps)


def _with_rows(new: Tensor, old: Tensor, rows: dict[int, int]) -> Tensor | None:
    """Return the tensor with rows of the old one (new index: old index), or None if no row can be kept."""
    if not rows or new.shape[1:] != old.shape[1:]:
        return None
    result = new.clone()
    result[list(rows)] = old[list(rows.values())].to(new.dtype)
    return result


def _with_maps(new: Tensor, old: Tensor, groups: int) -> Tensor:
    """Return the tensor with the first maps of the old one in each group; map g N + i belongs to group g of instance i."""
    result, source = new.clone().unflatten(0, (groups, -1)), old.unflatten(0, (groups, -1))
    both = min(result.shape[1], source.shape[1])
    with torch.no_grad():
        result[:, :both] = source[:, :both].to(new.dtype)
    return result.flatten(0, 1)
