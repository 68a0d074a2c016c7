"""Convert annotations in other formats to a COCO-format folder. Imports no torch.

`run.convert` is the entry. A reader (one file for each format) lists the images of a source. `writer` checks and writes them.

The readers are our own. The libraries that convert such formats bring OpenCV or a labelling program with them, and they do not
report which objects they leave out.
"""

from sparseinst.data.convert.run import convert, detect
from sparseinst.data.convert.source import KINDS, Kind, Report

__all__ = ["KINDS", "Kind", "Report", "convert", "detect"]
