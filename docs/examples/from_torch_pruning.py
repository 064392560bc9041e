"""From Torch-Pruning: one call gives a smaller module, and batches get it repaired."""

import torch
from digits_cnn import build_model, load_data

import deploypipe

model, data = build_model(), load_data()
images, _ = next(iter(data.calib))
small = deploypipe.prune(model, images, ratio=0.5)  # half of the channels of every group, by magnitude
repaired = deploypipe.prune(model, images, macs="0.5x", calib=data.calib)  # half of the work, repaired


def accuracy(network: torch.nn.Module) -> float:
    with torch.no_grad():
        return torch.cat([network(images).argmax(1) == labels for images, labels in data.test]).float().mean().item()


for name, network in {"dense": model, "ratio=0.5": small, 'macs="0.5x", repaired': repaired}.items():
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{name:24} {parameters:8,} parameters   {100 * accuracy(network):5.1f} % of the test digits")
