"""Linear probing: a linear classifier on a frozen encoder, with the batch norm that MAE puts before it.

MAE (arXiv 2111.06377, appendix A.1) standardises the features by a batch norm without affine parameters, so that one
learning rate suits every encoder.
"""

import torch
from torch import nn

from .convnextv2 import ConvNeXtV2

EPS, MOMENTUM = 1e-6, 0.1


class ProbeHead(nn.Linear):
    """A linear layer on features that a batch norm has standardised: (N, in_features) -> (N, num_classes).

    Weights start as truncated normal with std 0.01: LARS takes steps in proportion to their size.

    full_batch: images of a training batch; a smaller one, an epoch's last, weighs less in the running statistics.
    """

    def __init__(self, in_features: int, num_classes: int, full_batch: int = 1):
        super().__init__(in_features, num_classes)
        self.full_batch = full_batch
        self.batch_norm = nn.BatchNorm1d(in_features, eps=EPS, affine=False)
        nn.init.trunc_normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.batch_norm.momentum = MOMENTUM * min(1.0, len(x) / self.full_batch)
        return super().forward(self.batch_norm(x))


class LinearProbe(ConvNeXtV2):
    """A `ConvNeXtV2` of which the head alone is trained; the encoder computes as in evaluation, without gradients."""

    def __init__(self, num_classes: int, full_batch: int = 1, **kwargs):
        super().__init__(num_classes=num_classes, **kwargs)
        self.requires_grad_(False)
        self.head = ProbeHead(self.dims[-1], num_classes, full_batch)

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(False)
        self.head.train(mode)
        self.training = mode
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.forward_features(x)
        return self.head(x)
