"""AdamW for one rank: what DeepSpeed's sharded optimizers do besides the update, without sharding.

They keep fp32 master weights and fp32 sums of gradients for bf16 weights, clip the global norm, and
leave the weights alone if a gradient is not finite. So does this one; DeepSpeed takes it as it is
(ZeRO stage 0). Where weights are fp32 they are their own masters, and there is no copy of anything.

No step waits for the device: whether the gradients are finite is found, and obeyed, there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


class OneRankAdamW(torch.optim.AdamW):
    """AdamW, in one fused pass over the weights, that clips and refuses gradients which are not
    finite."""

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

        `stop_after_skip`: a skipped step makes all that follow skip, until the host has looked.
        """
        self.max_grad_norm = max_grad_norm
        self.stop_after_skip = stop_after_skip
        self.refused: Tensor | None = None  # whether the last step was; bool []
        self.overflow = False
        """DeepSpeed looks for this name, and would wait for a tensor."""
        self._global_grad_norm: Tensor | float = (
            0.0  # before clipping, fp32 []; DeepSpeed looks for this name
        )
        self._masters = {
            parameter: _master_of(parameter) for group in groups for parameter in group["params"]
        }  # of every weight that trains; fp32
        masters = [
            {**group, "params": [self._masters[parameter] for parameter in group["params"]]}
            for group in groups
        ]
        super().__init__(masters, lr=lr, betas=betas, eps=eps, fused=True)
        for parameter, master in self._masters.items():
            if master is not parameter:
                parameter.register_post_accumulate_grad_hook(_summing_into(master))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update masters and weights, or refuse; either way the sums of gradients start anew."""
        assert closure is None
        grads = [master.grad for master in self._masters.values() if master.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        self._global_grad_norm = norm
        refused = ~norm.isfinite()
        self.refused = (
            refused if self.refused is None or not self.stop_after_skip else refused | self.refused
        )
        self.found_inf = (
            self.refused.float()
        )  # the fused kernel leaves everything alone where it is 1
        if (
            self.max_grad_norm > 0
        ):  # and divides by this as it reads the gradients: no pass of its own
            self.grad_scale = ((norm + 1e-6) / self.max_grad_norm).clamp_(
                min=1.0
            )  # DeepSpeed's formula
        super().step()
        for parameter, master in self._masters.items():
            if master is not parameter:
                parameter.copy_(master)
        for master in self._masters.values():
            master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state and the masters that are not the weights themselves."""
        return {**super().state_dict(), "masters": self._separate_masters()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(
            {key: value for key, value in state_dict.items() if key != "masters"}
        )
        for master, saved in zip(self._separate_masters(), state_dict["masters"], strict=True):
            master.copy_(saved)

    def _separate_masters(self) -> list[Tensor]:
        return [master for parameter, master in self._masters.items() if master is not parameter]


def _master_of(parameter: Parameter) -> Parameter:
    return parameter if parameter.dtype == torch.float32 else Parameter(parameter.detach().float())


def _summing_into(master: Parameter) -> Callable[[Tensor], None]:
    """Return a hook that adds a gradient to the fp32 sum as soon as a backward pass has made it,
    and frees it."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return add
