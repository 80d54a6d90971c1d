"""What deep-hashing methods share: a backbone, a linear hash layer, and codes that are its signs."""

from pydantic import Field
from torch import Tensor, nn

from ray_retrieval.descriptors import Codes, DescriptorKind, Form
from ray_retrieval.layers.backbones import BackboneConfig, build_backbone
from ray_retrieval.layers.sign import pack_signs
from ray_retrieval.methods.base import Method, MethodConfig, ParameterGroup


class HashingConfig(MethodConfig):
    """A method that learns binary codes."""

    bits: int = Field(default=48, ge=1, le=4096)
    """Length of a code."""
    backbone: BackboneConfig = BackboneConfig()
    """The network below the hash layer."""
    head_lr_factor: float = Field(default=1.0, gt=0)
    """Learning rate of what starts from random weights (hash layer, classifier), as a multiple of the
    backbone's."""

    @property
    def form(self) -> Form:
        return Form(DescriptorKind.CODES, self.bits)


class HashingMethod(Method):
    """A backbone and a hash layer; sub-classes add their objective."""

    config: HashingConfig

    def __init__(self, config: HashingConfig, *, classes: int, pretrained: bool = True) -> None:
        super().__init__(config, classes=classes, pretrained=pretrained)
        self.backbone, self.width = build_backbone(config.backbone, pretrained=pretrained)
        self.hash_layer = nn.Linear(self.width, config.bits)

    def relaxed(self, images: Tensor) -> Tensor:
        """Relaxed codes, float [n, bits], of uint8 images [n, 3, size, size]; their signs are the codes."""
        relaxed: Tensor = self.hash_layer(self.backbone(self.normalised(images)))
        return relaxed

    def describe(self, images: Tensor) -> Codes:
        return Codes(pack_signs(self.relaxed(images)).cpu().numpy(), self.config.bits)

    def parameter_groups(self) -> list[ParameterGroup]:
        backbone = {id(parameter) for parameter in self.backbone.parameters()}
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            ParameterGroup([p for p in trained if id(p) in backbone]),
            ParameterGroup([p for p in trained if id(p) not in backbone], self.config.head_lr_factor),
        ]
        return [group for group in groups if group.parameters]
