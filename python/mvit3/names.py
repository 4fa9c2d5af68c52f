"""Names that options can have, written out: asking the libraries takes seconds, and a misspelt name is to be answered
at once. The tests hold them to the libraries."""

_BACKBONES = """
mobilevit_s mobilevit_xs mobilevit_xxs mobilevitv2_050 mobilevitv2_075 mobilevitv2_100 mobilevitv2_125
mobilevitv2_150 mobilevitv2_175 mobilevitv2_200 mobilevitv3_050 mobilevitv3_075 mobilevitv3_100 mobilevitv3_200
mobilevitv3_s mobilevitv3_s_fast mobilevitv3_xs mobilevitv3_xs_fast mobilevitv3_xxs mobilevitv3_xxs_fast
"""
_TIMM_OPTIMIZERS = """
adabelief adadelta adafactor adafactorbv adafactorbvc adagrad adahessian adam adamax adamc adamp adamuon adamw
adamwlegacy adan adanw adopt adoptc adoptw bnbadam bnbadam8bit bnbadamw bnbadamw8bit bnbademamix bnbademamix8bit
bnblion bnblion8bit bnbsgd bnbsgd8bit cadafactor cadafactorbv cadafactorbvc cadamc cadamp cadamw cadan cadanw cadopt
cadoptc cadoptw clamb clambw claprop clion clionc cmars cnadamc cnadamw crmsproptf csgdc csgdp csgdw fusedadam
fusedadamw fusedlamb fusednovograd fusedsgd kron kronc kronw lamb lambc lambcd lambcw lambw laprop lapropc larc lars
lion lionc madgrad madgradw mars momentum muon nadam nadamc nadamlegacy nadamuon nadamw nesterov nesterovw nlarc
nlars nmuon novograd novogradc novogradw radabelief radam radamlegacy radamw rmsprop rmsproptf rmsproptfc rmsproptfw
sgd sgdc sgdp sgdw
"""

# What stands in front of the backbone's name in the networks of a task; a classifier is named as its backbone.
_TASKS = {"deeplabv3": "segmentation", "pspnet": "segmentation", "ssdlite": "detection"}

BACKBONES = tuple(_BACKBONES.split())
NETWORKS = tuple(sorted([*BACKBONES, *(f"{head}_{backbone}" for head in _TASKS for backbone in BACKBONES)]))
OPTIMIZERS = tuple(_TIMM_OPTIMIZERS.split())


def task_of(network: str) -> str:
    """What a network is for, by its name: "classification", "segmentation" or "detection"."""
    return _TASKS.get(network.partition("_")[0], "classification")
