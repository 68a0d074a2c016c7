"""Check that other systems (peers) get the same photos, the same metrics and the same plot as our models."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparseinst.ablation.peers import find_peers, keep_peer
from sparseinst.ablation.store import Record, Store
from sparseinst.ablation.study import read_profile, read_tables
from sparseinst.cli import run_cli
from sparseinst.config import EngineName
from sparseinst.data.coco import read_split
from sparseinst.engines.artifact_files import artifact_identity
from sparseinst.errors import UserError
from sparseinst.integrations import peers
from sparseinst.integrations.peers import MASK_RCNN, build_peer
from sparseinst.integrations.peers.engines import prepare_peer
from sparseinst.integrations.peers.evaluate import category_ids, evaluate_peer
from sparseinst.integrations.peers.peer import Peer, PeerInput
from sparseinst.postprocess import Instances
from sparseinst.report.collect import collect
from sparseinst.report.pages import write_report
from sparseinst.report.tables import frame
from tests.conftest import CPU, REAL_COCO, annotation, box, needs_coco, write_coco

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def test_torchvisions_mask_rcnn_is_complete() -> None:
    peer = build_peer(MASK_RCNN, device=CPU, pretrained=False)
    assert (len(peer.categories), peer.categories[1], peer.parameters) == (91, "person", 44_401_393)
    assert peer.published is not None
    assert peer.published.AP == 34.6


def peer_of_a_package(name: str) -> Peer:
    if name != MASK_RCNN:
        pytest.importorskip("rfdetr" if name.startswith("rfdetr") else "ultralytics", reason="needs the peer's package")
    return build_peer(name, device=CPU, sides=(96, 128), pretrained=False)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(60, 90), (10, 300), (300, 7)])
@pytest.mark.parametrize("name", [MASK_RCNN, "yolo11n-seg", "yolo26n-seg", "rfdetr-seg-nano"])
def test_peers_give_masks_of_the_photos_size(name: str, size: tuple[int, int]) -> None:
    peer = peer_of_a_package(name)
    photo = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    with torch.no_grad():
        found = peer.segment(peer.prepare(photo))
    assert found.masks.shape[1:] == size
    assert found.masks.dtype == torch.bool
    assert len(found.scores) == len(found.labels) == len(found.masks) > 0
    assert len(found.scores) <= 100
    assert int(found.labels.max()) < max(len(peer.categories), 91)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", [MASK_RCNN, "yolo11n-seg", "rfdetr-seg-nano"])
def test_peers_find_the_same_in_every_engine(
    name: str, engine: EngineName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra export")
    pytest.importorskip(engine, reason=f"needs the extra {engine}")
    monkeypatch.setenv("SPARSEINST_CACHE", str(tmp_path))
    peer = peer_of_a_package(name)
    random = np.random.default_rng(0)
    # These photos need no padding, at which the exported Mask R-CNN clips boxes.
    shapes = [(72, 96), (96, 72)] if peer.exportable is not None and peer.exportable.any_size else [(72, 96)]
    prepared = None
    for shape in shapes:
        inputs = peer.prepare(random.integers(0, 256, (*shape, 3), dtype=np.uint8))
        prepared = prepared or prepare_peer(peer, inputs, engine, "fp32")
        with torch.no_grad():
            expected, found = peer.run(inputs), prepared.peer.run(inputs)
            assert prepared.peer.segment(inputs).masks.shape[1:] == inputs.original
        for ours, theirs in zip(found, expected, strict=True):
            # Mask R-CNN sorts its outputs by scores, which are nearly equal further down.
            torch.testing.assert_close(ours[:10], theirs[:10], rtol=1e-3, atol=1e-3)
    assert prepared is not None
    assert (prepared.facts.engine, prepared.facts.precision) == (engine, "fp32")
    [artifact] = tmp_path.glob("peers/*/network.onnx")
    assert prepared.facts.artifact == artifact_identity(artifact)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolo11n-seg", "rfdetr-seg-nano"])
def test_peers_are_quantised(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only their time means something: the ranges of a network with random weights come from noise."""
    pytest.importorskip("nncf", reason="needs the extra int8")
    monkeypatch.setenv("SPARSEINST_CACHE", str(tmp_path))
    peer = peer_of_a_package(name)
    inputs = peer.prepare(np.random.default_rng(0).integers(0, 256, (72, 96, 3), dtype=np.uint8))
    exact, quantised = (prepare_peer(peer, inputs, "openvino", precision) for precision in ("fp32", "int8"))
    assert quantised.facts.precision == "int8"
    assert quantised.facts.layers["int8"] > quantised.facts.layers.get("fp32", 0)
    assert quantised.facts.bytes < exact.facts.bytes / 2
    [artifact] = tmp_path.glob("peers/*/int8-*.xml")
    before = artifact.stat().st_mtime_ns
    assert prepare_peer(peer, inputs, "openvino", "int8").facts.artifact == quantised.facts.artifact
    assert artifact.stat().st_mtime_ns == before, "the second start makes nothing"
    found = quantised.peer.segment(inputs)
    assert found.masks.shape[1:] == inputs.original
    for ours, theirs in zip(quantised.peer.run(inputs), exact.peer.run(inputs), strict=True):
        assert ours.shape == theirs.shape


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_engines_are_compared_for_a_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra export")
    pytest.importorskip("onnxruntime", reason="needs the extra onnxruntime")
    monkeypatch.setenv("SPARSEINST_CACHE", str(tmp_path))
    command = ["bench", "--model", MASK_RCNN, "--size", "64", "--repetitions", "3", "--warmup", "1", "--engine", "torch"]
    assert run_cli([*command, "--engine", "onnxruntime", "--engines", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["engine"], row["mode"], row["precision"]) for row in (first, second)] == [
        ("torch", "eager", "fp32"),
        ("onnxruntime", "compiled", "fp32"),
    ]
    assert first["ratio"]["median"] == 1.0
    assert "published" not in first, "the published AP is that of another size"
    assert 0 < second["post_ms"] < second["whole_ms"]["p95"]
    assert second["AP"] is None
    assert run_cli([*command, "--engines", "--precision", "bf16"]) == 2
    assert "is a peer, which is timed in batch 1 and fp32" in capsys.readouterr().err
    assert run_cli([*command[:-2], "--engine", "openvino", "--engines", "--precision", "int8"]) == 2
    assert "is a peer, which is timed in batch 1 and fp32" in capsys.readouterr().err


@pytest.mark.slow
def test_the_timed_parts_equal_torchvisions_own_call(tmp_path: Path) -> None:
    """The peer reads its weights from a file."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    torch.manual_seed(3)
    model: Any = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=64, max_size=96).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 0.0
    model.roi_heads.box_predictor.cls_score.bias.data[5] += 4  # so that some scores exceed the threshold
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    peer = build_peer(MASK_RCNN, device=CPU, sides=(64, 96), weights=tmp_path / "weights.pth")
    photo = np.random.default_rng(0).integers(0, 256, (48, 72, 3), dtype=np.uint8)
    with torch.no_grad():
        found = peer.segment(peer.prepare(photo))
        [expected] = model([torch.from_numpy(photo).permute(2, 0, 1) / 255])
    assert len(found.scores) > 0
    torch.testing.assert_close(found.scores, expected["scores"])
    assert torch.equal(found.masks, expected["masks"][:, 0] > 0.5)


def test_mistakes_give_clear_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no peer is called 'mask-rcnn'.*did you mean 'mask-rcnn-r50-fpn'"):
        build_peer("mask-rcnn", device=CPU)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other.pth does not fit mask-rcnn-r50-fpn: Missing key"):
        build_peer(MASK_RCNN, device=CPU, weights=tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"nothing.pth: no such file"):
        build_peer(MASK_RCNN, device=CPU, weights=tmp_path / "nothing.pth")
    with pytest.raises(UserError, match="rfdetr-seg-nan: there is no such model; the sizes are nano, .*did you mean 'nano'"):
        build_peer("rfdetr-seg-nan", device=CPU)
    for package, name in (("ultralytics", "yolo11n-seg"), ("rfdetr", "rfdetr-seg-nano")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(UserError, match=f"{name} needs the package {package} .*pip install {package}"):
                build_peer(name, device=CPU)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(UserError, match="needs detectron2"):
        build_peer("detectron2:a.yaml", device=CPU)


def perfect(root: Path) -> Peer:
    """Return a peer that answers with the ground truth. It has the data's classes, and one that the data lack."""
    split = read_split(root / "annotations/instances_val2017.json", root / "val2017")
    names = ("nothing", *(category.name for category in split.categories), "unknown")
    images = iter(split.images)

    def finish(_outputs: Any, inputs: PeerInput) -> Instances:
        image, size = next(images), inputs.original
        masks = [decode(entry.segmentation, *size) for entry in image.annotations]
        stack = torch.from_numpy(np.stack([*masks, np.ones(size, np.uint8)])).bool()
        labels = [1 + entry.label for entry in image.annotations] + [len(names) - 1]
        return Instances(torch.ones(len(labels)), torch.tensor(labels), stack, torch.arange(len(labels)))

    from sparseinst.data.masks import decode

    prepare = lambda photo: PeerInput(None, photo.shape[:2], photo.shape[:2])  # noqa: E731
    return Peer("perfect", names, prepare, lambda inputs: None, finish, 0)


def test_a_peer_is_evaluated_like_our_models(tmp_path: Path) -> None:
    things = [annotation(n + 1, n % 3 + 1, 7 if n % 2 else 1000, box(5 + 20 * (n // 3), 5, 15, 12)) for n in range(6)]
    root = write_coco(tmp_path, [{"id": n, "file_name": f"{n}.png", "width": 60, "height": 40} for n in (1, 2, 3)], things)
    split = read_split(root / "annotations/instances_val2017.json", root / "val2017")
    found = evaluate_peer(perfect(root), split, predictions=tmp_path / "out.json", progress=False)
    assert (found.figures["AP"], found.images) == (pytest.approx(100), 3)
    results = json.loads((tmp_path / "out.json").read_text())
    assert len(results) == 6, "the class that the split lacks is left out"
    with pytest.raises(UserError, match="knows none of the categories"):
        category_ids(("cat", "dog"), split)


@needs_coco
@pytest.mark.usefixtures("in_this_process")
def test_the_bench_and_evaluate_commands_and_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """bench and evaluate keep a peer's records. Figure 1 shows them beside our own results, and marks them."""
    results = ["--record", "--profile", "mini", "--results", str(tmp_path)]
    bench = ["bench", "--model", MASK_RCNN, "--size", "64", "--repetitions", "3", "--warmup", "1", "--device", "cpu"]
    assert run_cli([*bench, *results]) == 0
    monkeypatch.setattr(peers, "build_peer", lambda *_, **__: perfect(REAL_COCO))
    evaluate = ["evaluate", "--peer", MASK_RCNN, "--data", str(REAL_COCO), "--device", "cpu"]
    assert run_cli([*evaluate, "-o", "inference.short_side=64", *results]) == 0
    store = Store(tmp_path)
    [found] = find_peers(store, [MASK_RCNN], "mini", store.keys())
    assert found.figures["AP"] == pytest.approx(100, abs=0.1)
    assert len(found.whole_ms) == 1

    mini = read_profile("mini", EXPERIMENTS)
    [table] = read_tables(["figure1"], EXPERIMENTS)
    result = collect(table, mini, store, {}, {})
    row = frame(result).query("method == @MASK_RCNN").iloc[0]
    assert row["size"] == "64"
    assert row["AP"] == "measured 100.0"
    write_report([result], tmp_path)
    drawn = (tmp_path / "figures" / "figure1-mini-speed-accuracy.svg").read_text()
    assert f"{MASK_RCNN}, measured here" in drawn


def test_records_of_peers_are_replaced_and_kept_apart(tmp_path: Path) -> None:
    store = Store(tmp_path)
    about: dict[str, Any] = {"profile": "coco", "device": "A card", "seconds": 1.0}
    keys = {keep_peer(store, "x", 800, {"whole_ms": {"median": ms}}, **about) for ms in (9.0, 7.0)}
    assert len(keys) == 1
    keep_peer(store, "x", 640, {"whole_ms": {"median": 5.0}}, **about)
    keep_peer(store, "x", 800, {"figures": {"AP": 34.6}, "images": 9}, **about, data="d1")
    keep_peer(store, "x", 800, {"whole_ms": {"median": 1.0}}, **{**about, "profile": "mini"})
    small, large = find_peers(store, ["x"], "coco", store.keys())
    assert (small.whole_ms, large.whole_ms, large.figures) == ({"A card": 5.0}, {"A card": 7.0}, {"AP": 34.6})
    assert find_peers(store, ["y"], "coco", store.keys()) == []
    keep_peer(store, "x", 800, {"figures": {"AP": 10.0}, "images": 4}, **about, data="d1")
    keep_peer(store, "x", 800, {"figures": {"AP": 20.0}, "images": 9}, **about, data="d2")
    ours = find_peers(store, ["x"], "coco", store.keys(), {("d1", 9)})
    assert [peer.figures for peer in ours] == [{}, {"AP": 34.6}], "only what our models were evaluated on"
    store.write(Record("peer", "peer-broken", {"short_side": 3}))
    assert len(find_peers(store, ["x"], "coco", store.keys())) == 2, "a damaged record is set aside"


def test_options_for_only_peers_or_only_our_models(capsys: Any) -> None:
    assert run_cli(["bench", "--model", MASK_RCNN, "--precision", "bf16"]) == 2
    assert "a peer is timed as it is" in capsys.readouterr().err
    assert run_cli(["evaluate"]) == 2
    assert "give --weights to evaluate a model, or --peer" in capsys.readouterr().err
    assert run_cli(["evaluate", "--weights", "x", "--record"]) == 2
    assert "--record is for peers" in capsys.readouterr().err
    for option in (["--engine", "openvino"], ["--compare", "size=800", "size=640"]):
        assert run_cli(["bench", "--model", MASK_RCNN, "--record", *option]) == 2
        assert "--record keeps the time of a peer in torch and fp32" in capsys.readouterr().err
    assert run_cli(["evaluate", "--peer", MASK_RCNN, "--optimize", "best"]) == 2
    assert "leave out --engine, --precision and --optimize" in capsys.readouterr().err
