"""Attack the commands with bad input: annotation files, specs, settings, weights and command lines.

Nearly every attack is a mistake that must be refused, so success counts as `silent`. A training must refuse it before its first
step. Random damage may also leave valid input: it is then `survived`, if the work with it succeeds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from sparseinst.config import Config
from sparseinst.data.shapes import write_shapes
from sparseinst.nested import flatten, leaf_paths
from sparseinst.overrides import load_config
from sparseinst.paths import RunPaths
from tests.attacks import wrong
from tests.attacks.report import Ended, Outcome, command, judge, options
from tests.attacks.runs import cut, flip
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
SETTINGS = {**TINY, "train.iterations": 2, "train.warmup_iterations": 1}
LIMIT = 60.0
"""Seconds. A refusal takes under two on an idle machine; another one may be busy."""


def never() -> bool:
    """The result of a command that must be refused is never right."""
    return False


class Lab:
    """A small data set, a trained model, and copies of them with mistakes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.trained = folder, folder / "data", folder / "trained"
        folder.mkdir(parents=True, exist_ok=True)
        write_shapes(self.data, train=24, val=4, side=64)
        for name in ("experiments", "slurm"):
            (folder / name).symlink_to(ROOT / name)
        os.mkfifo(folder / "pipe")
        assert self.train(self.data, output=self.trained).code == 0
        self.weights = RunPaths(self.trained).weights

    def call(self, *arguments: str) -> Ended:
        return command(*arguments, folder=self.folder, limit=LIMIT)

    def train(self, data: Path, *more: str, output: Path | None = None, **settings: Any) -> Ended:
        """Train in a fresh folder."""
        if output is None:
            output = self.folder / "run"
            shutil.rmtree(output, ignore_errors=True)
        own = options({**SETTINGS, **settings})
        return self.call("train", "--data", str(data), "--output", str(output), "--device", "cpu", *own, *more)

    def refused(self, ended: Ended, detail: str, right: Callable[[], bool] = never) -> Outcome:
        """Judge a training that must be refused before its first step."""
        outcome = judge(ended, right, detail)
        if outcome.word == "one line" and RunPaths(self.folder / "run").metrics.exists():
            return Outcome("silent", f"found after the work had begun: {outcome.detail}")
        return outcome

    def copy_data(self) -> Path:
        """Return a copy of the data whose annotation files can be changed."""
        copy = self.folder / "copy"
        if not copy.exists():
            shutil.copytree(self.data, copy)
        for file in (self.data / "annotations").iterdir():
            shutil.copy(file, copy / "annotations" / file.name)
        return copy


def attacks(folder: Path, count: int, seed: int) -> Iterator[tuple[str, Outcome]]:
    """Yield the kind and the outcome of each attack; `count` is the number of the rarest kind."""
    lab = Lab(folder / "lab")
    for kind, times, attack in (
        ("a mistake in an annotation file: data check", 3, _checked),
        ("a mistake in an annotation file: train", 3, _trained),
        ("a file that is no annotation file", 1, _no_json),
        ("random damage to an annotation file: data check, then train", 1, _damaged),
        ("a mistake in a spec, a profile or a cluster", 3, _spec),
        ("a mistake in a config file or an override", 2, _config),
        ("a path that settings extend", 1, _extends),
        ("a setting that cannot be: train", 3, _setting),
        ("a random value of a random setting: train", 2, _random_setting),
        ("metadata of weights", 2, _metadata),
        ("tensors and header of weights", 1, _header),
        ("a command line", 4, _command_line),
    ):
        for number in range(times * count):
            yield kind, attack(lab, random.Random(f"{kind} {seed} {number}"), number)


def _mistake(lab: Lab, chance: random.Random, number: int) -> tuple[Path, str]:
    names = list(wrong.CHANGES)
    name, data = names[number % len(names)], lab.copy_data()
    file = chance.choice(sorted((data / "annotations").iterdir()))
    content = json.loads(file.read_text(encoding="utf-8"))
    wrong.CHANGES[name](content, chance)
    file.write_text(json.dumps(content), encoding="utf-8")
    return data, f"{file.name} {name}"


def _checked(lab: Lab, chance: random.Random, number: int) -> Outcome:
    data, detail = _mistake(lab, chance, number)
    return judge(lab.call("data", "check", str(data)), never, detail)


def _trained(lab: Lab, chance: random.Random, number: int) -> Outcome:
    """The training's own file may have parts that only a library for metrics cannot read: nothing reads them."""
    data, detail = _mistake(lab, chance, number)
    unread = detail in {f"instances_train2017.json {name}" for name in ("info", "licenses", "license", "supercategory")}
    return lab.refused(lab.train(data), detail, lambda: unread)


def _no_json(lab: Lab, chance: random.Random, number: int) -> Outcome:
    data = lab.copy_data()
    file = chance.choice(sorted((data / "annotations").iterdir()))
    content = wrong.NO_JSON[number % len(wrong.NO_JSON)]
    file.write_bytes(content)
    ended = lab.train(data) if chance.random() < 0.5 else lab.call("data", "check", str(data))
    return judge(ended, never, f"{file.name} {content[:20]!r}")


def _damaged(lab: Lab, chance: random.Random, number: int) -> Outcome:
    """Whatever `data check` accepts must be trained and evaluated without an error."""
    data = lab.copy_data()
    for _ in range(chance.randrange(1, 9)):
        file = chance.choice(sorted((data / "annotations").iterdir()))
        file.write_bytes(chance.choice([flip] * 9 + [cut])(file.read_bytes(), chance))
    checked = judge(lab.call("data", "check", str(data)), lambda: True, f"{number}")
    if checked.word != "survived":
        return checked
    trained = judge(lab.train(data), lambda: True, f"{number} after data check")
    return replace(trained, word="silent") if trained.word == "one line" else trained


def _spec(lab: Lab, chance: random.Random, number: int) -> Outcome:
    value = wrong.NO_YAML_VALUES[number % len(wrong.NO_YAML_VALUES)]
    kind = chance.choice(["table", "table", "profile", "cluster"])
    file = lab.folder / "attack.yaml"
    if kind == "table":
        parts = list(wrong.SPEC_PARTS)
        place = chance.randrange(len(parts))
        parts[place] = value
        text = wrong.SPEC.format(*parts)
        arguments = ["plan", str(file), "--profile", "smoke"]
    elif kind == "profile":
        text, arguments = f"train: {{seed: 1}}\nmodel: {value}\n", ["plan", "table5", "--profile", str(file)]
    else:
        text, arguments = f"kind: local\nsetup: {value}\n", ["launch", "table5", "--cluster", str(file), "--dry-run"]
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    return judge(lab.call(*arguments), never, f"{kind} {value[:30]!r}")


def _config(lab: Lab, chance: random.Random, number: int) -> Outcome:
    value = chance.choice(wrong.NO_YAML_VALUES)
    path = chance.choice(sorted(leaf_paths(Config)))
    *groups, leaf = path.split(".")
    text = "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(groups)) + f"{'  ' * len(groups)}{leaf}: {value}\n"
    file = lab.folder / "attack.yaml"
    file.write_bytes(text.encode())
    source = chance.choice([["--config", str(file)], ["--override", f"{path}={value}"]])
    return judge(lab.call("config", *source), never, f"{source[0]} {path} {value[:30]!r}")


def _extends(lab: Lab, chance: random.Random, number: int) -> Outcome:
    file = lab.folder / "attack.yaml"
    for link in range(60):
        (lab.folder / f"chain{link}.yaml").write_text(f"extends: chain{link + 1}.yaml")
    paths = ["/dev/zero", "/dev/null", "/dev/random", "pipe", ".", "/", "attack.yaml", "chain0.yaml", "none.yaml", "A" * 5000,
             "a/" * 3000, "5", "null_", "[a]", "{a: 1}", '"\\0"', "trained/model.safetensors", "/proc/self/mem",
             "../" * 50, "''"]  # fmt: skip
    path = paths[number % len(paths)]
    file.write_text(f"extends: {path}\ntrain: {{seed: 1}}\n")
    arguments = chance.choice([["config", "--config", str(file)], ["plan", "table5", "--profile", str(file)]])
    return judge(lab.call(*arguments), never, path[:30])


def _setting(lab: Lab, chance: random.Random, number: int) -> Outcome:
    setting = wrong.NO_SETTINGS[number % len(wrong.NO_SETTINGS)]
    return lab.refused(lab.train(lab.data, "-o", setting), setting)


def _random_setting(lab: Lab, chance: random.Random, number: int) -> Outcome:
    """A value that is accepted must be the one that the run has."""
    path = chance.choice(sorted(leaf_paths(Config)))
    values = [None, True, False, 0, 1, 2, 7, -1, 0.5, -0.5, 1e30, 1e-30, 10**12, "none", "1", "../x", [], [1], [0], [7, 5], {},
              {"a": 1}]  # fmt: skip
    value: Any = chance.choice(values)
    ended = lab.train(lab.data, "-o", f"{path}={json.dumps(value)}")

    def right() -> bool:
        found = flatten(load_config(RunPaths(lab.folder / "run").config).model_dump(mode="json"))
        return bool(found[path] == value)

    return judge(ended, right, f"{path}={value!r}")


def _write_weights(lab: Lab, metadata: dict[str, str], tensors: dict[str, Any] | None = None) -> Path:
    file = lab.folder / "attack.safetensors"
    file.write_bytes(save(load_file(lab.weights) if tensors is None else tensors, metadata))
    return file


def _use(lab: Lab, file: Path, chance: random.Random) -> Ended:
    picture = next((lab.data / "val2017").iterdir())
    evaluate = ["evaluate", "--weights", str(file), "--device", "cpu"]
    predict = ["predict", str(picture), "--weights", str(file), "--output", "seen", "--device", "cpu"]
    return lab.call(*chance.choice([evaluate, predict]))


def _metadata(lab: Lab, chance: random.Random, number: int) -> Outcome:
    """Change the metadata of a file without a checksum, as earlier versions wrote it."""
    config = load_config(RunPaths(lab.trained).config)
    categories = [{"id": n + 1, "name": f"c{n}"} for n in range(6)]
    metadata = {"config": config.to_json(), "categories": json.dumps(categories)}
    kind = number % 3
    if kind == 0:
        metadata["config"] = chance.choice(wrong.NO_METADATA)
    elif kind == 1:
        metadata["categories"] = chance.choice(wrong.NO_CATEGORIES)
    else:
        content = json.loads(metadata["config"])
        path = chance.choice(sorted(leaf_paths(Config)))
        changes = [(path, {"x": 1}), (path, float("nan")), ("model.num_classes", 5), ("model.num_classes", 100_000),
                   ("model.decoder.width", 16_384), ("model.decoder.depth", 100), ("model.decoder.depth", 10**6),
                   ("model.encoder.channels", 16_384), ("model.decoder.iam.num_maps", 100_000), ("model.backbone.name", "none"),
                   ("model.backbone.name", "resnet50"), ("model.decoder.mask_scale", 1e30)]  # fmt: skip
        path, value = chance.choice(changes)
        *groups, leaf = path.split(".")
        node = content
        for name in groups:
            node = node[name]
        node[leaf] = value
        metadata["config"] = json.dumps(content)
    return judge(_use(lab, _write_weights(lab, metadata), chance), never, str(metadata)[:60] if kind < 2 else f"{path} {value!r}")


def _header(lab: Lab, chance: random.Random, number: int) -> Outcome:
    config = load_config(RunPaths(lab.trained).config)
    metadata = {"config": config.to_json(), "categories": json.dumps([{"id": n, "name": f"c{n}"} for n in range(6)])}
    tensors = load_file(lab.weights)
    name = chance.choice([name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.ndim > 1])
    kind = number % 10
    if kind == 0:
        tensors.pop(name)
    elif kind == 1:
        tensors["more"] = tensors[name].clone()
    elif kind == 2:
        tensors[name] = tensors[name][:1].clone().repeat(3, *[1] * (tensors[name].ndim - 1))
    elif kind == 3:
        tensors[name] = tensors[name] * float("nan")
    elif kind == 4:
        tensors[name] = tensors[name].int()
    file = _write_weights(lab, metadata, tensors)
    content = bytearray(file.read_bytes())
    if kind == 5:
        content[:8] = chance.choice([2**63, 2**64 - 1, 0, 1, len(content), 10**9]).to_bytes(8, "little")
    elif kind == 6:
        content = bytearray(content[: chance.randrange(9)])
    elif kind == 7:
        content = content.replace(b'"F32"', chance.choice([b'"F99"', b"null ", b"5.0  "]), 1)
    elif kind == 8:
        content = content.replace(b"data_offsets", b"data_offset_", 1)
    file.write_bytes(content)
    if kind == 9:
        file = chance.choice([Path("/dev/zero"), lab.folder / "pipe", Path("/"), Path("A" * 5000), Path("attack.yaml"), lab.data])
    return judge(_use(lab, file, chance), never, f"{kind} {name} {str(file)[-30:]}")


def command_lines(lab: Lab) -> list[list[str]]:
    """Return command lines with one mistake each."""
    data, weights = str(lab.data), str(lab.weights)
    picture = str(next((lab.data / "val2017").iterdir()))
    tiny = options(SETTINGS)
    train = ["train", "--data", data, *tiny, "--output"]
    evaluate, predict = ["evaluate", "--weights", weights], ["predict", picture, "--weights", weights, "--output", "seen"]
    paths = ["", " ", "/dev/null/x", "A" * 5000, "attack.yaml/x", "/proc/x", "\udce9"]
    inputs = ["", "A" * 5000, "/dev/zero", "none", "pipe", "\udcff"]
    devices = ["meta", "gpu", "cuda:99", "cuda:-1", "", "vulkan", "hpu", "xla", "mps", "cpu ", "0", "privateuseone", "CPU",
               "cpu:x"]  # fmt: skip
    return [
        *([*train, path] for path in paths),
        [*train[:-1], "--output="],
        *([*train, "run", "--device", device] for device in devices),
        *([*evaluate, "--device", device] for device in devices[:6]),
        *([*predict, "--device", device] for device in devices[:6]),
        *([*train, "run", "--config", path] for path in inputs),
        *([*train, "run", "--weights", path] for path in inputs),
        *(["train", "--data", path, *tiny, "--output", "run"] for path in inputs),
        *(["data", "check", path] for path in inputs),
        *(["predict", path, "--weights", weights, "--output", "seen"] for path in inputs),
        *(["evaluate", "--weights", path] for path in inputs),
        *(["plan", path, "--profile", "smoke"] for path in [*inputs, "../x", "/dev/zero.yaml", ".yaml", "pipe.yaml"]),
        *(["plan", "table5", "--profile", path] for path in inputs),
        *(["launch", "table5", "--cluster", path, "--dry-run"] for path in inputs),
        *(["import-weights", path, "--output", "out.safetensors"] for path in [*inputs, weights, "attack.yaml", picture]),
        *(["curves", path, "--output", "curves.png"] for path in inputs),
        *(["logs", path] for path in inputs), *(["verify", path] for path in inputs),
        *([*predict, "--score", value] for value in ("nan", "inf", "2", "x", "-1", "")),
        *([*predict, "--top", value] for value in ("0", "-1", "1.5", "x")),
        *(["plan", "table5", "--budget", value, "--profile", "smoke"] for value in ("nan", "inf", "-1", "x")),
        *(["plan", "table5", "--seeds", value] for value in ("0", "13", "1e3", "x", "-1", "99999999999999999999")),
        *(["run", "table5", "--jobs", value] for value in ("0", "-1", "1000000", "x")),
        ["run", "table5", "--row", "no such row"], ["run", "table5", "--profile", "smoke", "--row", ""],
        *(["data", "split", data, "--val", value] for value in ("nan", "2", "-1", "x")),
        *(["data", "split", data, "--name", value] for value in ("../x", "a/b", "", "A" * 300, ".x")),
        *(["data", "split", data, "--by", value] for value in ("name:(", "field:", "x", "name:(a+)+$b")),
        *(["data", "shapes", "--output", "new", "--train", value] for value in ("0", "1e9", "10000000000")),
        *(["data", "shapes", "--output", "new", "--side", value] for value in ("0", "1e9", "10000000000")),
        *(["bench", "--size", value] for value in ("0", "-5", "x", "1000000000")),
        *(["bench", "--batch", value] for value in ("0", "-1", "x")), *(["bench", "--model", path] for path in inputs),
        ["bench", "--precision", "fp8"], ["bench", "--mode", "fast"], ["export", "--weights", weights, "--output", ""],
        [*evaluate, "--predictions", ""], [*evaluate, "--predictions", "/dev/null/x"],
        [*evaluate, "--data", ""], [*evaluate, "--engine", "x"],
        [], ["trian"], ["train"], ["train", "--output"], ["data"], ["--nonsense"], [*train, "run", "surplus"],
    ]  # fmt: skip


def _command_line(lab: Lab, chance: random.Random, number: int) -> Outcome:
    lines = command_lines(lab)
    random.Random("order").shuffle(lines)
    arguments = lines[number % len(lines)]
    shutil.rmtree(lab.folder / "run", ignore_errors=True)
    ended = lab.call(*arguments)
    detail = " ".join(part[:30] for part in arguments if not part.startswith(("-o", "model.", "data.", "train.", "inference.")))
    if ended.code == 2 and not ended.errors.startswith("error: ") and "Traceback" not in ended.errors:  # typer's own line
        return Outcome("one line", f"{detail} {ended.errors.strip().splitlines()[-1] if ended.errors.strip() else ''}")
    return judge(ended, never, ascii(detail))
