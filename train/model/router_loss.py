"""The auxiliary loss that keeps the router of a mixture-of-experts model from using only a few
experts."""

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

from shared.errors import ConfigError


def load_balancing_loss(router_logits: Sequence[torch.Tensor], *, top_k: int) -> torch.Tensor:
    """Return E x sum over experts of f_e P_e, fp32 []: `top_k` if all experts are used alike, else
    more.

    f_e: how often expert e is among the `top_k` of a token, over all tokens and layers. P_e: the
    router's mean probability for e. Fedus et al. 2021 (Switch Transformers), eq. 4 to 6, over all
    layers together as in transformers. `router_logits`: [N, E] for each layer.
    """
    # [layers x N, E]
    logits = torch.cat([layer.reshape(-1, layer.shape[-1]) for layer in router_logits]).float()
    num_experts = logits.shape[-1]
    probabilities = logits.softmax(dim=-1)
    # The counts have no gradient; the router learns through the probabilities.
    experts = probabilities.topk(top_k, dim=-1).indices
    counts = torch.zeros(num_experts, device=logits.device).index_add_(
        0, experts.reshape(-1), torch.ones(experts.numel(), device=logits.device)
    )
    return num_experts * torch.dot(counts / len(logits), probabilities.mean(dim=0))


def experts_per_token(config: PretrainedConfig) -> int:
    """Return the number of experts of each token. Raises ConfigError for a model without router
    logits."""
    values = config.to_dict()
    if "output_router_logits" not in values or not values.get("num_experts_per_tok"):
        raise ConfigError(
            f"loss.load_balancing_weight is set, but model type {config.model_type!r} has no router"
            " with logits; set it to 0"
        )
    return int(values["num_experts_per_tok"])
