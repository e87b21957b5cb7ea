"""Mixed precision, clipping and the optimizer step as one object, so that full precision is not a second code path."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch


class Amp:
    """Autocast, loss scaling (float16 only) and gradient clipping around an optimizer step.

    Args:
        device: where the model is.
        enabled: False computes in the parameters' own precision; None: on CUDA alone.
        dtype: torch.bfloat16, which needs no loss scaling, or torch.float16.
        clip_grad: largest L2 norm of all gradients together, or None.
    """

    def __init__(self, device: torch.device, enabled: bool | None, dtype: torch.dtype, clip_grad: float | None = None):
        self.device, self.dtype, self.clip_grad = device, dtype, clip_grad
        self.enabled = device.type == "cuda" if enabled is None else enabled
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.enabled and dtype == torch.float16)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.enabled)

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(
        self, optimizer: torch.optim.Optimizer, with_norm: bool, leave_out: Callable[..., bool] | None = None
    ) -> torch.Tensor | None:
        """Step and clear the gradients; their norm before clipping, on the device, if it was needed or asked for.

        The norm costs one more pass over the gradients, which is why it is not taken on every step.
        leave_out: of the norm, whether to leave the step out; of None where infinite gradients are the scaler's affair.
        """
        norm = None
        if self.clip_grad is not None or with_norm or leave_out:
            self.scaler.unscale_(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            if self.clip_grad is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
        if leave_out and leave_out(None if self.scaler.is_enabled() else norm):
            self.scaler.update(self.scaler.get_scale())  # as it was, and ready for the next step
        else:
            self.scaler.step(optimizer)
            self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm
