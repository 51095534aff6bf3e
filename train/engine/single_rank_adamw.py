"""AdamW for one rank, with what DeepSpeed's sharded optimizers do besides the update.

Like them, it keeps fp32 master weights and fp32 sums of gradients for bf16 weights, clips the
global norm, and skips the update if a gradient is not finite. DeepSpeed uses it unchanged (ZeRO
stage 0). Weights that are fp32 are their own masters, and nothing is copied.

No step waits for the device: the check for finite gradients runs there, and its result stays there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


class OneRankAdamW(torch.optim.AdamW):
    """AdamW in one fused pass over the weights, with clipping; it skips steps whose gradients are
    not finite."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        max_grad_norm: float,
        stop_after_skip: bool,
    ) -> None:
        """Take parameter groups as torch's AdamW does; a `max_grad_norm` of 0 does not clip.

        `stop_after_skip`: after a skipped step all later ones are skipped, until the host has
        looked.
        """
        self.max_grad_norm = max_grad_norm
        self.stop_after_skip = stop_after_skip
        self.skipped: Tensor | None = None  # whether the last step was; bool []
        # DeepSpeed reads the next two by these names. It would wait for an overflow that is a
        # tensor. The norm is that before clipping, fp32 [].
        self.overflow = False
        self._global_grad_norm: Tensor | float = 0.0
        self._masters = {
            parameter: (
                parameter
                if parameter.dtype == torch.float32
                else Parameter(parameter.detach().float())
            )
            for group in groups
            for parameter in group["params"]
        }
        masters = [
            {**group, "params": [self._masters[parameter] for parameter in group["params"]]}
            for group in groups
        ]
        super().__init__(masters, lr=lr, betas=betas, eps=eps, fused=True)
        for parameter, master in self._masters.items():
            if master is not parameter:
                # Sums in bf16 would lose small gradients; the hook frees them one by one.
                parameter.register_post_accumulate_grad_hook(_summing_into(master))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update masters and weights, or skip; either way the sums of gradients start again."""
        assert closure is None
        grads = [master.grad for master in self._masters.values() if master.grad is not None]
        # One gradient that is not finite makes the norm not finite, so one number decides the step.
        norm = torch.nn.utils.get_total_norm(grads)
        self._global_grad_norm = norm
        skips = ~norm.isfinite()
        if self.skipped is not None and self.stop_after_skip:
            skips = skips | self.skipped
        self.skipped = skips
        # The fused kernel changes nothing if found_inf is 1, and divides gradients by grad_scale as
        # it reads them, so that clipping needs no further pass. The formula is DeepSpeed's.
        self.found_inf = skips.float()
        if self.max_grad_norm > 0:
            self.grad_scale = ((norm + 1e-6) / self.max_grad_norm).clamp_(min=1.0)
        super().step()
        for parameter, master in self._masters.items():
            if master is not parameter:
                parameter.copy_(master)
        for master in self._masters.values():
            master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state, and the masters that are separate from the weights."""
        return {**super().state_dict(), "masters": self._separate_masters()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(
            {key: value for key, value in state_dict.items() if key != "masters"}
        )
        for master, saved in zip(self._separate_masters(), state_dict["masters"], strict=True):
            master.copy_(saved)

    def _separate_masters(self) -> list[Tensor]:
        # fp32 weights are their own masters, and the model saves them.
        return [master for parameter, master in self._masters.items() if master is not parameter]


def _summing_into(master: Parameter) -> Callable[[Tensor], None]:
    """Return a hook that adds each gradient to the fp32 sum and frees it during the backward
    pass."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return add
