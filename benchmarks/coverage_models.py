"""The networks of `benchmarks/coverage.py`: how each is built, and at which image size it is tried."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

CLASSES = 10
NEEDED = 0.5
"""Share of MACs that must be prunable by width alone."""
LARGEST = 150e6
"""Parameters above which a torchvision network is left out."""

TIMM = (
    # family, name, image size (0: 64), options of the factory
    ("lcnet", "lcnet_050", 0), ("tinynet", "tinynet_e", 0), ("mnasnet", "mnasnet_small", 0),
    ("mobilenetv2", "mobilenetv2_050", 0), ("mobilenetv3", "mobilenetv3_small_075", 0), ("mixnet", "mixnet_s", 0),
    ("fbnet", "fbnetc_100", 0), ("ghostnet", "ghostnet_050", 0), ("hardcorenas", "hardcorenas_a", 0),
    ("rexnet", "rexnet_100", 0), ("efficientnet", "efficientnet_es", 0), ("efficientnet_lite", "efficientnet_lite0", 0),
    ("mobilenetv4", "mobilenetv4_conv_small_050", 0), ("repvgg", "repvgg_a0", 0), ("mobileone", "mobileone_s0", 0),
    ("repghost", "repghostnet_050", 0), ("repvit", "repvit_m0_9", 0), ("starnet", "starnet_s1", 0),
    ("resnet", "resnet18d", 0), ("seresnet", "legacy_seresnet18", 0), ("ecaresnet", "ecaresnet26t", 0),
    ("sknet", "skresnet18", 0), ("resnest", "resnest14d", 0), ("res2net", "res2net50_26w_4s", 0),
    ("dla", "dla34", 0), ("vovnet", "ese_vovnet19b_dw", 0), ("darknet", "darknet53", 0), ("csp", "cspresnet50", 0),
    ("gernet", "gernet_s", 0), ("regnetz", "regnetz_b16", 0), ("selecsls", "selecsls42b", 0), ("dpn", "dpn68", 0),
    ("hgnet", "hgnetv2_b0", 0), ("hrnet", "hrnet_w18_small", 0), ("densenet_blur", "densenetblur121d", 0),
    ("xception", "xception41", 0), ("inception", "inception_v4", 96), ("inception_resnet", "inception_resnet_v2", 96),
    ("resnetv2", "resnetv2_50", 0), ("bit", "resnetv2_50x1_bit", 0), ("nf_resnet", "nf_resnet26", 0),
    ("eca_nfnet", "eca_nfnet_l0", 0), ("convnext", "convnext_atto", 0), ("convnextv2", "convnextv2_atto", 0),
    ("convmixer", "convmixer_768_32", 0), ("inception_next", "inception_next_atto", 0),
    ("edgenext", "edgenext_xx_small", 0), ("poolformer", "poolformer_s12", 0), ("caformer", "caformer_s18", 0),
    ("vit", "vit_tiny_patch16_224", 64), ("deit", "deit_tiny_patch16_224", 64),
    ("deit3", "deit3_small_patch16_224", 64),
    ("eva02", "eva02_tiny_patch14_224", 56), ("cait", "cait_xxs24_224", 64), ("xcit", "xcit_nano_12_p16_224", 64),
    ("mixer", "mixer_s32_224", 224), ("resmlp", "resmlp_12_224", 224), ("gmlp", "gmlp_ti16_224", 224),
    ("swin", "swin_tiny_patch4_window7_224", 224), ("swinv2", "swinv2_tiny_window8_256", 256),
    ("pvt", "pvt_v2_b0", 64), ("twins", "twins_svt_small", 224), ("pit", "pit_ti_224", 224),
    ("levit", "levit_128s", 224), ("mobilevit", "mobilevit_xxs", 64), ("mobilevitv2", "mobilevitv2_050", 64),
    ("efficientformer", "efficientformer_l1", 224), ("efficientvit_mit", "efficientvit_b0", 64),
    ("coatnet", "coatnet_nano_rw_224", 224), ("maxvit", "maxvit_pico_rw_256", 256), ("davit", "davit_tiny", 224),
    ("focalnet", "focalnet_tiny_srf", 64), ("fastvit", "fastvit_t8", 64), ("tiny_vit", "tiny_vit_5m_224", 224),
    ("hiera", "hiera_tiny_224", 224), ("mambaout", "mambaout_femto", 64), ("visformer", "visformer_tiny", 224),
    ("convit", "convit_tiny", 224), ("crossvit", "crossvit_tiny_240", 240), ("rdnet", "rdnet_tiny", 64),
)  # fmt: skip
"""One network of each family, the small ones first."""

_SIZES = {"inception_v3": 96, "unet": 64, "maxvit_t": 224}
_SIZE_IS_AN_OPTION = ("vit", "deit", "deit3", "eva02", "cait")


@dataclass(frozen=True)
class Case:
    """A network to try.

    Attributes:
        name: In its library's registry.
        source: passdeploy, torchvision or timm.
        family: Networks that share code.
        task: classification or segmentation.
        size: Side of the images.
        options: For its factory.
    """

    name: str
    source: str
    family: str
    task: str = "classification"
    size: int = 64
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The network with random weights."""
        if self.source == "timm":
            from passdeploy._torchvision import torchvision

            torchvision()
            import timm

            network: nn.Module = timm.create_model(self.name, pretrained=False, num_classes=CLASSES, **self.options)
            return network
        from passdeploy import models

        return models.factory(self.name)(num_classes=CLASSES, **self.options)


def _torchvision_cases() -> list[Case]:
    from passdeploy._torchvision import torchvision

    models = torchvision().models
    cases = []
    for task, module in (("classification", models), ("segmentation", models.segmentation)):
        for name in models.list_models(module=module):
            parameters = next(iter(models.get_model_weights(name))).meta["num_params"]
            if parameters > LARGEST:
                continue
            size, family = _SIZES.get(name, 64), name.split("_")[0].rstrip("0123456789")
            key = {"vit": "image_size", "maxvit": "input_size"}.get(family)
            value = {"vit": 96, "maxvit": (size, size)}.get(family)
            case = Case(name, "torchvision", family, task, 96 if family == "vit" else size, {key: value} if key else {})
            cases.append((parameters, case))
    return [case for _, case in sorted(cases, key=lambda pair: pair[0])]


def cases() -> list[Case]:
    """All networks, in the order in which they are tried: torchvision's from small to large, then timm's."""
    own = [Case("unet", "passdeploy", "unet", "segmentation")]
    timm = [
        Case(name, "timm", family, size=size or 64, options={"img_size": size} if family in _SIZE_IS_AN_OPTION else {})
        for family, name, size in TIMM
    ]
    return own + _torchvision_cases() + timm
