"""Networks of timm and transformers, as hosts that `fuse` works on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn


class Logits(nn.Module):
    """A classifier of transformers as one that returns its logits."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, x: Tensor) -> Tensor:
        return self.host(x).logits


def timm_network(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


def timm_names() -> list[str]:
    import timm

    return timm.list_models("mobilevit*")


# What the configurations of transformers have beside the defaults, which are mobilevit-small's.
SIZES = {
    "mobilevit-small": {},
    "mobilevit-x-small": {
        "hidden_sizes": [96, 120, 144],
        "neck_hidden_sizes": [16, 32, 48, 64, 80, 96, 384],
    },
    "mobilevit-xx-small": {
        "hidden_sizes": [64, 80, 96],
        "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320],
        "expand_ratio": 2.0,
    },
}


def transformers_network(name: str) -> nn.Module:
    """Dropouts are off."""
    from transformers import MobileViTConfig, MobileViTForImageClassification

    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob")
    config = MobileViTConfig(num_labels=1000, **dict.fromkeys(rates, 0.0), **SIZES[name])
    network = MobileViTForImageClassification(config)
    for module in network.modules():  # its own initial weights are so small that activations become denormal
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return Logits(network)


class Host(NamedTuple):
    make: Callable[[str], nn.Module]
    names: Callable[[], list[str]]
    default: str


HOSTS = {
    "timm": Host(timm_network, timm_names, "mobilevit_s"),
    "transformers": Host(transformers_network, lambda: list(SIZES), "mobilevit-small"),
}
