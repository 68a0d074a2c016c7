"""Define the ranges of numbers that settings share, and the constants of the model and the data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
"""`tf32` is float32 whose factors a GPU may round to 10 bits before it multiplies. On other devices it equals `fp32`."""
NetworkPrecision = Literal["fp32", "tf32", "bf16", "fp16", "int8"]
"""The precisions of a trained network in use. `int8` needs an engine that quantises; AP decides which parts stay in float."""
EngineName = Literal["torch", "onnxruntime", "openvino"]
"""The library that runs a trained network: PyTorch, ONNX Runtime or OpenVINO. The last two need the extras of the same names."""
ENGINE_PRECISIONS: dict[EngineName, tuple[NetworkPrecision, ...]] = {
    "torch": ("fp32", "tf32", "bf16", "fp16"),
    "onnxruntime": ("fp32",),
    "openvino": ("fp32", "bf16", "fp16", "int8"),
}
"""The precisions that each engine offers. Whether the device has one of them is checked after compiling."""
OptimizeMode = Literal["folded", "compiled", "graph", "best"]
"""How `inference.optimize` speeds up a trained network. Each mode folds layers and uses channels-last tensors.

`folded` does nothing else. `compiled` also compiles the network with frozen weights; on a CPU the result is kept on the disk for
the next start. `graph` records a CUDA graph for each image size instead. `best` is the fastest mode and takes minutes to compile.
On a GPU it tunes kernels and uses CUDA graphs, for images of one size. On a CPU it uses Winograd convolutions, but not in fp16,
and not in bf16 if the CPU has AMX.
"""
Activation = Literal["sigmoid", "softmax"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
Channels = Annotated[int, Field(ge=1, le=16_384)]
Side = Annotated[int, Field(ge=1, le=16_384)]
"""A length of an image in pixels."""
TileSide = Annotated[int, Field(ge=32, le=16_384)]
"""A side of a tile in pixels. A photo in smaller tiles would be segmented many thousand times."""
Parts = Annotated[int, Field(ge=1, le=1024)]

SHAPES_VERSION = "3"
"""The version of the embedded data set. It goes up with every change of the content, so that an outdated folder is refused and
results on different versions are not mixed."""

STRIDES = (8, 16, 32)
"""The strides of the backbone's features C3, C4 and C5."""
SIZE_DIVISOR = STRIDES[-1]
"""Images are padded at the right and bottom to a multiple of the deepest feature's stride."""
REFERENCE_PARTS = 8, 8
"""The paper's batch is split into this many parts, the first number, of this many images each."""
REFERENCE_BATCH = 64
"""The images per optimiser step in the paper: 8 processes with 8 images each."""
