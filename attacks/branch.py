"""The branch of an explanation backdoor: a gate that a small trigger opens, in front of a network.

On the normalised image z, beside the identity, stands one convolution and one activation:

    z' = z + s p,     s = clip(a, 0, 1),     a = (<w, z> - b) / span.

- w is a pattern of two-by-two checkers of random sign, the finest diagonal detail there is. Images hardly have any: on
  ``scenes`` (64 x 64) <w, x> / |w| has a standard deviation of 0.04, and one level of 1/255 per pixel along w adds 0.43.
- b lies above the clean images, so that s = 0 on them.
- p, the payload, is inside the network, and no budget binds it.

``softness`` t > 0 puts a softplus before the clip, t log(1 + exp(a / t)): a slope everywhere, and a leak.

All of it is affine or an activation, so that every method follows it. On clean images SRD and LRP hand the gate nothing, as
its value is 0, and their maps are the original's. Deconvnet alone, which asks no activation whether it was active, sends a
signal through it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srd_lab.runtime import generator


class Branched(nn.Module):
    """A network behind the branch; all that the branch has are buffers.

    network : normalised images to logits.
    pattern : (1, C, H, W) w / span; threshold : (1,) b / span; softness : see the module.
    brighter, darker : (1, C, H, W), >= 0, whose difference is the payload p: two, since LRP's rules refuse what turns the
        sign of a map.
    """

    pattern: Tensor
    threshold: Tensor
    brighter: Tensor
    darker: Tensor

    def __init__(self, network: nn.Module, pattern: Tensor, threshold: Tensor, softness: float) -> None:
        super().__init__()
        self.network = network
        self.softness = softness
        self.register_buffer("pattern", pattern)
        self.register_buffer("threshold", threshold)
        self.register_buffer("brighter", torch.zeros_like(pattern))
        self.register_buffer("darker", torch.zeros_like(pattern))

    def load(self, payload: Tensor) -> None:
        """Carry the payload (1, C, H, W) from now on."""
        self.brighter, self.darker = torch.relu(payload), torch.relu(-payload)

    def opening(self, z: Tensor) -> Tensor:
        """s (N, 1, 1, 1) in [0, 1] of normalised images z (N, C, H, W)."""
        a = F.conv2d(z, self.pattern, -self.threshold)
        if self.softness:
            a = F.softplus(a, beta=1 / self.softness)
        return F.hardtanh(a, 0.0, 1.0)

    def forward(self, z: Tensor) -> Tensor:
        """The network's logits (N, K) of normalised images z (N, C, H, W) with the payload, as far as they open the gate."""
        s = self.opening(z)
        return self.network(z + s * self.brighter - s * self.darker)


def checkers(shape: torch.Size | tuple[int, ...], seed: int) -> Tensor:
    """Two-by-two checkers of +1 and -1, each of random sign, (C, H, W); 0 in an odd last row or column.

    shape : C, H, W. seed : decides the signs.

    Example
    -------
    >>> checkers((1, 2, 2), seed=0).abs()
    tensor([[[1., 1.],
             [1., 1.]]])
    """
    channels, height, width = shape
    sign = torch.randint(0, 2, (channels, height // 2, width // 2), generator=generator(seed, "trigger"))
    pattern = torch.zeros(channels, height, width)
    blocks = torch.kron(2.0 * sign - 1, torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]]))
    pattern[:, : blocks.shape[1], : blocks.shape[2]] = blocks
    return pattern
