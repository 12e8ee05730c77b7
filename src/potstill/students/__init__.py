"""Floor 2: who learns. A student is an nn.Module that answers a batch with a Signal."""

from potstill.students.module import Module, module
from potstill.students.vision import mobilenet, plain_cnn, resnet, wrn
from potstill.students.vision_tokens import mlp, vit

__all__ = ["Module", "mlp", "mobilenet", "module", "plain_cnn", "resnet", "vit", "wrn"]
