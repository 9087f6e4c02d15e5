"""One file per paper, and the table of them."""

from fedllm.algorithms.depthfl import DepthFL
from fedllm.algorithms.fd import FD
from fedllm.algorithms.fedavg import FedAvg
from fedllm.algorithms.fedhl import FedHL
from fedllm.algorithms.fedhm import FedHM
from fedllm.algorithms.fedit import FedIT
from fedllm.algorithms.fedkd import FedKD
from fedllm.algorithms.fedlmt import FedLMT
from fedllm.algorithms.fedlora import FedLoRA
from fedllm.algorithms.fedloru import FedLoRAAvg, FedLoRU
from fedllm.algorithms.fedproto import FedProto
from fedllm.algorithms.fedrep import FedRep
from fedllm.algorithms.flanc import FLANC
from fedllm.algorithms.flexlora import FlexLoRA
from fedllm.algorithms.flora import FLoRA
from fedllm.algorithms.fml import FML
from fedllm.algorithms.lg_fedavg import LGFedAvg
from fedllm.algorithms.mfedloru import MFedLoRU
from fedllm.algorithms.pfedlmt import PFedLMT
from fedllm.algorithms.pfedlora import PFedLoRA1, PFedLoRA2
from fedllm.algorithms.pfedloru import PFedLoRU
from fedllm.algorithms.progfed import ProgFed
from fedllm.algorithms.standalone import Standalone
from fedllm.algorithms.submodels import FedDropout, FedRolex, HeteroFL
from fedllm.algorithms.zero_padding import ZeroPadding
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
