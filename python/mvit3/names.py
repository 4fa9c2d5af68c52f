"""Names that options can have, written out: asking the libraries takes seconds, and a misspelt name is to be answered at once. The
tests hold them to the libraries."""

_NETWORKS = """
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

NETWORKS = tuple(_NETWORKS.split())
OPTIMIZERS = tuple(_TIMM_OPTIMIZERS.split())

# What users of timm will type, where the name here is not a part of theirs
TIMM = {
    "data-dir": "data.root",
    "train-split": "data.train",
    "val-split": "data.val",
    "num-classes": "model.num_classes",
    "initial-checkpoint": "model.pretrained",
    "drop": "model.drop_rate",
    "drop-path": "model.drop_path_rate",
    "model": "model.name",
    "b": "data.batch_size",
    "j": "data.workers",
    "img-size": "sampler.size",
    "input-size": "sampler.size",
    "crop-pct": "data.resize",
    "opt": "optimizer.name",
    "opt-eps": "optimizer.eps",
    "opt-betas": "optimizer.betas",
    "aa": "augment.policy",
    "scale": "augment.crop_scale",
    "ratio": "augment.crop_ratio",
    "hflip": "augment.flip",
    "reprob": "augment.erase",
    "smoothing": "loss.label_smoothing",
    "mixup": "loss.mixup_alpha",
    "cutmix": "loss.cutmix_alpha",
    "mixup-prob": "loss.mix_probability",
    "mixup-switch-prob": "loss.switch_probability",
    "model-ema": "ema.enabled",
    "model-ema-decay": "ema.momentum",
    "model-ema-warmup": "ema.warmup",
    "amp-dtype": "run.amp",
    "dataset": "data.name",
    "dataset-download": "data.download",
    "sched": "schedule.name",
    "bce-loss": "loss.name",
    "kd-model-name": "distill.teacher",
    "kd-distill-type": "distill.kind",
    "kd-temperature": "distill.temperature",
    "distill-loss-weight": "distill.weight",
    "torchcompile": "run.compile",
    "grad-accum-steps": "run.accumulate",
    "log-interval": "run.log_steps",
    "log-wandb": "run.wandb",
    "checkpoint-hist": "run.keep_best",
}
