"""Use SparseInst in detectron2 with the reference implementation's configs and checkpoints, on a current torch.

    from sparseinst.integrations.detectron2 import Trainer, add_sparseinst_config

    cfg = get_cfg()
    add_sparseinst_config(cfg)
    cfg.merge_from_file("sparse_inst_r50_giam.yaml")

The import registers the meta-architecture `SparseInst`. Its state dict uses the reference's names, so that each side loads the
other's checkpoints, and detectron2's ImageNet weights load as well. detectron2 is optional; no other part of this package imports
this one.
"""

from sparseinst.integrations.detectron2.data import MaskEvaluator, SparseInstDatasetMapper
from sparseinst.integrations.detectron2.model import SparseInst
from sparseinst.integrations.detectron2.settings import add_sparseinst_config, from_detectron2
from sparseinst.integrations.detectron2.trainer import Trainer

__all__ = ["MaskEvaluator", "SparseInst", "SparseInstDatasetMapper", "Trainer", "add_sparseinst_config", "from_detectron2"]
