"""Check that a record with values of wrong types or sizes counts as damaged, and that valid records load."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sparseinst.ablation.store import Kind, Record, Store
from sparseinst.checked import with_checksum

RESULTS: dict[Kind, dict[str, Any]] = {
    "train": {"steps": 2, "losses": {"loss": math.nan}, "history": [{"iteration": 1, "AP": None, "APl": 1.0}]},
    "evaluate": {"figures": {"AP": 30, "APl": None}, "mechanism": {"own": 0.5, "lift": None}, "images": 4},
    "latency": {"whole_ms": {"median": 2.0}, "modules_ms": {"post": 0.0}},
    "peer": {"peer": "x", "short_side": 640},
}
ABOUT: dict[str, Any] = {"commit": None, "seconds": 1, "arithmetic": None, "trained": {"commit": None, "earlier": [{}]}}


@pytest.mark.parametrize("kind", list(RESULTS))
def test_valid_records_load(kind: Kind, tmp_path: Path) -> None:
    for about in ({}, ABOUT):
        store = Store(tmp_path / str(len(about)))
        store.write(Record(kind, "k", RESULTS[kind], {"train": {}}, about))
        assert store.load("k") is not None


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        *(("evaluate", "result.figures.AP", value) for value in (math.nan, math.inf, 1e300, -5, 100.1, "50", [], True)),
        *(("evaluate", "result.mechanism", value) for value in (None, {"own": "x"}, {"own": math.nan}, [])),
        *(("evaluate", "result.resampled", value) for value in (None, {"AP": ["x"]}, {"AP": [math.inf]}, {"AP": 1})),
        ("evaluate", "result.images", []),
        *(("evaluate", "provenance", value) for value in (None, [], "x")),
        *(("evaluate", "provenance.trained", value) for value in ([], None, {"earlier": [1]}, {"earlier": {}})),
        *(("evaluate", f"provenance.{name}", []) for name in ("data", "weights", "device", "seed", "versions", "commit")),
        *(("train", "provenance.seconds", value) for value in (None, "1", -1)),
        *(("evaluate", "config", value) for value in (None, [], 1)),
        ("evaluate", "kind", "train"),
        ("train", "kind", "evaluate"),
        ("train", "kind", []),
        *(("train", "result.history", value) for value in ([{}], [{"iteration": 1, "AP": "x"}], {})),
        ("train", "result.not_trained", "why"),
        *(("latency", "result.whole_ms", value) for value in ({}, {"median": 0.0}, {"median": "1"}, {"p5": 1.0})),
        ("peer", "result.figures", {"AP": 101}),
    ],
)
def test_a_record_with_wrong_values_is_set_aside(
    kind: Kind, path: str, value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content: dict[str, Any] = {"kind": kind, "key": "k", "result": RESULTS[kind], "config": {}, "provenance": ABOUT}
    content = json.loads(json.dumps(content))
    *groups, name = path.split(".")
    place = content
    for group in groups:
        place = place[group]
    place[name] = value
    store = Store(tmp_path)
    store.folder.mkdir()
    store.path("k").write_text(json.dumps(content))
    assert store.load("k") is None
    assert [file.name for file in store.folder.iterdir()] == ["k.damaged"]
    assert len(caplog.messages) == 1
    assert "its stage counts as not done" in caplog.text


@pytest.mark.parametrize("kind", list(RESULTS))
def test_a_flipped_bit_is_damage(kind: Kind, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(Record(kind, "k", RESULTS[kind], {"a": "b"}, ABOUT))
    whole = store.path("k").read_bytes()
    for place in range(len(whole)):
        store.path("k").write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert store.load("k") is None, place
    store.path("k").write_bytes(whole)
    assert store.load("k") is not None


@pytest.mark.parametrize("change", [{"kind": "calibrate"}, {"notes": []}], ids=str)
def test_a_record_of_a_newer_version_stays(change: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An older version must not rename it, and must not do its stage again."""
    store = Store(tmp_path)
    store.write(Record("train", "k", {"steps": 1}))
    path = store.path("k")
    content = {name: value for name, value in json.loads(path.read_text()).items() if name != "checksum"}
    path.write_text(with_checksum({**content, **change}))
    assert store.load("k") is None
    assert store.has("k")
    assert path.exists()
    assert "a newer version of this package wrote" in caplog.text


def test_the_checksum_is_that_of_the_content(tmp_path: Path) -> None:
    """Other spaces change nothing, records without a checksum are accepted, and a checksum of another type is damage."""
    store = Store(tmp_path)
    record = Record("evaluate", "k", RESULTS["evaluate"], {"x": 1e-7, "y": '\u00e9 "checksum": '}, ABOUT)
    store.write(record)
    content = json.loads(store.path("k").read_text())
    assert store.load("k") == record
    store.path("k").write_text(json.dumps(content))
    assert store.load("k") == record
    content["result"]["figures"]["AP"] = 70
    store.path("k").write_text(json.dumps(content))
    assert store.load("k") is None
    for checksum, accepted in ((None, True), (5, False), ([], False)):
        store.path("k").write_text(json.dumps({**content, "checksum": checksum}))
        assert (store.load("k") is not None) == accepted
