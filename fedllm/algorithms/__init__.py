"""One file per paper, and the table of them."""

from fedllm.algorithms.lora.fed_plora import FedPLoRA
from fedllm.algorithms.lora.fed_sb import FedSB
from fedllm.algorithms.lora.fedalt import FedALT
from fedllm.algorithms.lora.feddpa import FedDPA
from fedllm.algorithms.lora.fedex_lora import FedExLoRA
from fedllm.algorithms.lora.fedhl import FedHL
from fedllm.algorithms.lora.fedit import FedIT
from fedllm.algorithms.lora.fedloru import FedLoRAAvg, FedLoRU
from fedllm.algorithms.lora.fedmomentum import FedMomentum
from fedllm.algorithms.lora.fedrot_lora import FedRotLoRA
from fedllm.algorithms.lora.fedsa_lora import FedSALoRA
from fedllm.algorithms.lora.fedsvd import FedSVD
from fedllm.algorithms.lora.ffa_lora import FFALoRA
from fedllm.algorithms.lora.flexlora import FlexLoRA
from fedllm.algorithms.lora.flora import FLoRA
from fedllm.algorithms.lora.florist import FLoRIST
from fedllm.algorithms.lora.hetlora import HetLoRA
from fedllm.algorithms.lora.lora_fair import LoRAFAIR
from fedllm.algorithms.lora.mfedloru import MFedLoRU
from fedllm.algorithms.lora.pfedloru import PFedLoRU
from fedllm.algorithms.lora.raflora import RaFLoRA
from fedllm.algorithms.lora.rbla import RBLA
from fedllm.algorithms.lora.rolora import RoLoRA
from fedllm.algorithms.lora.zero_padding import ZeroPadding
from fedllm.algorithms.networks.depthfl import DepthFL
from fedllm.algorithms.networks.fedavg import FedAvg
from fedllm.algorithms.networks.fedhm import FedHM
from fedllm.algorithms.networks.fedlmt import FedLMT
from fedllm.algorithms.networks.fedrep import FedRep
from fedllm.algorithms.networks.flanc import FLANC
from fedllm.algorithms.networks.pfedlmt import PFedLMT
from fedllm.algorithms.networks.pfedlora import PFedLoRA1, PFedLoRA2
from fedllm.algorithms.networks.progfed import ProgFed
from fedllm.algorithms.networks.submodels import FedDropout, FedRolex, HeteroFL
from fedllm.algorithms.own_models.fd import FD
from fedllm.algorithms.own_models.fedkd import FedKD
from fedllm.algorithms.own_models.fedlora import FedLoRA
from fedllm.algorithms.own_models.fedproto import FedProto
from fedllm.algorithms.own_models.fml import FML
from fedllm.algorithms.own_models.lg_fedavg import LGFedAvg
from fedllm.algorithms.own_models.standalone import Standalone
from fedllm.core import Algorithm

LOW_RANK: dict[str, type[Algorithm]] = {
    "fedit": FedIT,
    "zero_padding": ZeroPadding,
    "flexlora": FlexLoRA,
    "flora": FLoRA,
    "fedhl": FedHL,
    "fedlora_avg": FedLoRAAvg,
    "fedloru": FedLoRU,
    "pfedloru": PFedLoRU,
    "mfedloru": MFedLoRU,
    "ffa_lora": FFALoRA,
    "rolora": RoLoRA,
    "fedsvd": FedSVD,
    "fedex_lora": FedExLoRA,
    "fedmomentum": FedMomentum,
    "rbla": RBLA,
    "raflora": RaFLoRA,
    "florist": FLoRIST,
    "lora_fair": LoRAFAIR,
    "fedrot_lora": FedRotLoRA,
    "fed_plora": FedPLoRA,
    "fedsa_lora": FedSALoRA,
    "feddpa": FedDPA,
    "fedalt": FedALT,
    "hetlora": HetLoRA,
    "fed_sb": FedSB,
}
"""Rules on low-rank updates of a frozen model."""

WHOLE: dict[str, type[Algorithm]] = {
    "fedavg": FedAvg,
    "fedlmt": FedLMT,
    "pfedlmt": PFedLMT,
    "fedhm": FedHM,
    "feddropout": FedDropout,
    "heterofl": HeteroFL,
    "fedrolex": FedRolex,
    "depthfl": DepthFL,
    "progfed": ProgFed,
    "flanc": FLANC,
    "fedrep": FedRep,
    "pfedlora1": PFedLoRA1,
    "pfedlora2": PFedLoRA2,
}
"""Rules on networks that are trained from their first weights on."""

PRIVATE: dict[str, type[Algorithm]] = {
    "standalone": Standalone,
    "lg_fedavg": LGFedAvg,
    "fd": FD,
    "fedproto": FedProto,
    "fml": FML,
    "fedkd": FedKD,
    "fedlora": FedLoRA,
}
"""Rules that leave every client a network of its own, of any shape."""

ALGORITHMS: dict[str, type[Algorithm]] = LOW_RANK | WHOLE | PRIVATE
"""Every rule by the name that ``algorithm.name`` takes."""
