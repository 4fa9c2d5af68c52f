"""For torch.hub: `torch.hub.load("<owner>/<repository>", "mobilevitv3_s", num_classes=10)` is
`mvit3_kernels.create_model("mobilevitv3_s", num_classes=10)`, and so for every network. `torch.hub.list` names them."""

from functools import partial as _partial
from functools import update_wrapper as _update_wrapper

from mvit3_kernels import create_model as _create_model
from mvit3_kernels import from_pretrained  # noqa: F401
from mvit3_kernels import list_models as _list_models

dependencies = ["torch"]

for _name in _list_models("*"):
    globals()[_name] = _update_wrapper(_partial(_create_model, _name), _create_model)
