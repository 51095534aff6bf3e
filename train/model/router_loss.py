"""The auxiliary loss of mixture-of-experts models, which keeps their router from using a few
experts only."""

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

from shared.errors import ConfigError


def load_balancing_loss(router_logits: Sequence[torch.Tensor], *, top_k: int) -> torch.Tensor:
    """Return E x sum over experts of f_e P_e, fp32 []: `top_k` where all experts are used alike,
    more otherwise.

    f_e: how often expert e is among the `top_k` of a token, over all tokens and layers. P_e: the
    router's mean probability for e. Fedus et al. 2021 (Switch Transformers), eq. 4 to 6, with the
    layers taken together as the models of transformers do. `router_logits`: [N, E] for each layer.
    """
    logits = torch.cat(
        [layer.reshape(-1, layer.shape[-1]) for layer in router_logits]
    ).float()  # [layers x N, E]
    num_experts = logits.shape[-1]
    probabilities = logits.softmax(dim=-1)
    chosen = probabilities.topk(top_k, dim=-1).indices
    counts = torch.zeros(num_experts, device=logits.device).index_add_(
        0, chosen.reshape(-1), torch.ones(chosen.numel(), device=logits.device)
    )
    return num_experts * torch.dot(counts / len(logits), probabilities.mean(dim=0))


def experts_per_token(config: PretrainedConfig) -> int:
    """Return how many experts each token takes. Raises ConfigError for a model without router
    logits."""
    values = config.to_dict()
    if "output_router_logits" not in values or not values.get("num_experts_per_tok"):
        raise ConfigError(
            f"loss.load_balancing_weight is set, but model type {config.model_type!r} has no router"
            " that tells its choices; set it to 0"
        )
    return int(values["num_experts_per_tok"])
