# ruff: noqa: PT009, PT027 - torch.testing is made of unittest, and its assertEqual compares tensors
"""torch's own machinery for checking optimizers, on groups of pairs; run by test_torchs_checks.py.

The inputs, schedulers and errors are those of ``torch.testing._internal.common_optimizers``, as far
as arguments are shared. What does not apply: complex and sparse parameters, ``maximize``,
``foreach``, ``fused``, ``differentiable``, ``capturable``. Two things are stricter here: a step
without any gradient and a parameter that is there twice are errors.
"""

from __future__ import annotations

import copy
import inspect
import io
import sys
import types
import unittest
from importlib.util import find_spec

import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import lorapro
from fault_cases import KINDS
from lorapro.factors import LoraPair

if find_spec("expecttest") is None:  # torch's test cases derive from it, and use nothing of it here
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase

from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    optim_db,
    optims,
)
from torch.testing._internal.common_utils import TestCase

TORCHS = {info.optim_cls: info for info in optim_db}
# Of ours: the class, torch's whose inputs it takes, and torch's that steps what is no pair.
CLASSES = {
    "efficient": (lorapro.LoraProAdamW, torch.optim.AdamW, torch.optim.AdamW),
    "full": (lorapro.LoraProAdamW, torch.optim.AdamW, torch.optim.AdamW),
    "factored": (lorapro.LoraProAdamW, torch.optim.AdamW, torch.optim.AdamW),
    "muon": (lorapro.LoraProMuon, torch.optim.Muon, torch.optim.AdamW),
    "sgd": (lorapro.LoraProSGD, torch.optim.SGD, torch.optim.SGD),
}


def groups_of(params, **options):
    """Each two matrices in a list as a pair, in every group; anything else as it is."""
    if not isinstance(params, list):
        return params
    if params and isinstance(params[0], dict):
        return [
            g
            for group in params
            for g in (
                groups_of(group["params"], **{k: v for k, v in group.items() if k != "params"})
                if isinstance(group["params"], list)
                else [group]
            )
        ]
    made = []
    if len(params) > 1 and all(isinstance(p, torch.Tensor) and p.dim() == 2 for p in params[:2]):
        bare = torch.empty(params[1].shape[0], params[0].shape[1])  # a base that full mode decays
        pair = LoraPair("w", *params[:2], scaling=2.0, base=Parameter(bare))
        made, params = lorapro.lora_param_groups(None, pairs=[pair]), params[2:]
        made = [{**group, **options} for group in made]
    return made + ([{"params": params, **options}] if params else [])


def taking_tensors(kind):
    base, _, _ = CLASSES[kind]
    fixed = {k: v for k, v in KINDS[kind].items() if k != "optimizer"}

    def init(self, params, **kwargs):
        base.__init__(self, groups_of(params), **{**fixed, **kwargs})

    return type(kind, (base,), {"__init__": init})


def shared(kind, inputs, read=lambda given: given):
    """Of torch's inputs, those whose arguments ours has too."""
    known = set(inspect.signature(CLASSES[kind][0].__init__).parameters)
    return [given for given in inputs if set(read(given).kwargs) <= known]


def info_of(kind):
    info = TORCHS[CLASSES[kind][1]]
    return OptimizerInfo(
        taking_tensors(kind),
        optim_inputs_func=lambda device: shared(kind, info.optim_inputs_func(device)),
        scheduler_inputs=info.scheduler_inputs,
        optim_error_inputs_func=lambda device, dtype: shared(
            kind, info.optim_error_inputs_func(device, dtype), lambda e: e.optimizer_error_input
        ),
    )


OURS = [info_of(kind) for kind in CLASSES]


class Checks(TestCase):
    def factors(self, dtype, contiguous=True):
        """A (3, 5), B (4, 3) and a bias (4,)."""
        made = [torch.randn(*s, 2, dtype=dtype)[..., 0] for s in ((3, 5), (4, 3), (4,))]
        return [Parameter(p.contiguous() if contiguous else p) for p in made]

    def closure_of(self, optimizer, params, x):
        def closure():
            optimizer.zero_grad()
            A, B, bias = params
            loss = (2.0 * (B @ (A @ x)) + bias).square().sum()
            loss.backward()
            return loss

        return closure

    def cases(self, info, device, dtype, contiguous=True):
        """(optimizer, its three parameters, a closure) for every input."""
        for given in info.optim_inputs_func(device):
            with self.subTest(given.desc):
                params = self.factors(dtype, contiguous)
                optimizer = info.optim_cls(params, **copy.deepcopy(given.kwargs))
                x = torch.randn(5, dtype=dtype)
                yield optimizer, params, self.closure_of(optimizer, params, x)

    @optims(OURS)
    def test_errors(self, device, dtype, optim_info):
        seen = 0
        for error in optim_info.optim_error_inputs_func(device, dtype):
            given = error.optimizer_error_input
            about_shape = "2D" in given.desc or "complex" in given.desc  # no pairs: AdamW's
            both_tensors = "both floats or both" in given.desc
            if about_shape or both_tensors or error.error_on != OptimizerErrorEnum(0):
                continue
            kind = ValueError if error.error_type is UserWarning else error.error_type
            params = self.factors(dtype) if given.params is None else given.params
            with self.subTest(given.desc), self.assertRaises(kind):
                optim_info.optim_cls(params, **given.kwargs)
            seen += 1
        self.assertGreaterEqual(seen, 6)

    @optims(OURS)
    def test_goes_in_the_right_direction_under_every_scheduler(self, device, dtype, optim_info):
        for contiguous in (True, False):
            for schedulers in [[], *optim_info.scheduler_inputs]:
                for optimizer, _, closure in self.cases(optim_info, device, dtype, contiguous):
                    for group in optimizer.param_groups:
                        group["lr"] = group["lr"] * 0 + 1e-3
                    made = [s(optimizer) for s in schedulers]
                    first = float(closure())
                    for _ in range(20):
                        loss = optimizer.step(closure)
                        for s in made:
                            s.step(loss) if isinstance(s, ReduceLROnPlateau) else s.step()
                    self.assertLess(float(closure()), first)

    @optims(OURS)
    def test_param_groups_have_their_own_lr_and_decay(self, device, dtype, optim_info):
        for option in ({"lr": 1e-2}, {"weight_decay": 0.1}):
            A, B, bias = self.factors(dtype)
            groups = [{"params": [A, B], **option}, {"params": [bias]}]
            optimizer = optim_info.optim_cls(groups, lr=1e-3, weight_decay=0.0)
            (name, value) = next(iter(option.items()))
            held = [g[name] for g in optimizer.param_groups if g["role"] != "base"]
            self.assertEqual(held, [value, {"lr": 1e-3, "weight_decay": 0.0}[name]])
            closure = self.closure_of(optimizer, [A, B, bias], torch.randn(5))
            first = float(closure())
            for _ in range(20):
                optimizer.step(closure)
            self.assertLess(float(closure()), first)

    @optims(OURS, dtypes=[torch.float32, torch.float64])
    def test_state_dict_is_deterministic_and_saved_with_weights_only(
        self, device, dtype, optim_info
    ):
        for given in optim_info.optim_inputs_func(device):
            params, x = self.factors(dtype), torch.randn(5, dtype=dtype)
            twins = [Parameter(p.detach().clone()) for p in params]
            one, two = (
                optim_info.optim_cls(p, **copy.deepcopy(given.kwargs)) for p in (params, twins)
            )
            for _ in range(3):
                one.step(self.closure_of(one, params, x))
            for p, q in zip(params, twins, strict=True):
                q.data.copy_(p.data)
            file = io.BytesIO()
            torch.save(one.state_dict(), file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
            kept = copy.deepcopy(state)
            two.load_state_dict(state)
            self.assertEqual(state, kept)
            for _ in range(3):
                one.step(self.closure_of(one, params, x))
                two.step(self.closure_of(two, twins, x))
            self.assertEqual(params, twins, rtol=0, atol=0)
            self.assertEqual(one.state_dict()["state"], two.state_dict()["state"])

    @optims(OURS)
    def test_an_older_state_dict_without_an_option_is_loaded(self, device, dtype, optim_info):
        for optimizer, _, closure in self.cases(optim_info, device, dtype):
            optimizer.step(closure)
            for option in ("x", "damping"):  # what this package added to torch's
                state = copy.deepcopy(optimizer.state_dict())
                for group in state["param_groups"]:
                    del group[option]
                optimizer.load_state_dict(state)
                optimizer.step(closure)

    @optims(OURS)
    def test_zero_gradients_move_nothing_and_none_are_refused(self, device, dtype, optim_info):
        params = self.factors(dtype)
        optimizer = optim_info.optim_cls(params, weight_decay=0.0)
        before = copy.deepcopy(params)
        with self.assertRaisesRegex(ValueError, "none of 1 pairs has a gradient"):
            optimizer.step()
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        self.assertEqual(params, before, rtol=0, atol=0)

    @optims(OURS)
    def test_hooks_of_steps_and_states(self, device, dtype, optim_info):
        params, heard = self.factors(dtype), []
        optimizer = optim_info.optim_cls(params)
        closure = self.closure_of(optimizer, params, torch.randn(5))

        def hook(name, answer=None):
            return lambda *args, **kwargs: heard.append(name) or answer

        handles = [
            register_optimizer_step_pre_hook(hook("all before")),
            optimizer.register_step_pre_hook(hook("before")),
            optimizer.register_step_post_hook(hook("after")),
            register_optimizer_step_post_hook(hook("all after")),
            optimizer.register_state_dict_pre_hook(hook("saving")),
            optimizer.register_state_dict_post_hook(hook("saved")),
            optimizer.register_load_state_dict_pre_hook(hook("loading")),
            optimizer.register_load_state_dict_post_hook(hook("loaded")),
        ]
        for _ in range(2):
            optimizer.step(closure)
            optimizer.load_state_dict(optimizer.state_dict())
            for handle in handles:
                handle.remove()
        steps = {"before", "all before", "after", "all after"}
        self.assertEqual(set(heard[:2]) | set(heard[2:4]), steps)
        self.assertEqual(heard[4:], ["saving", "saved", "loading", "loaded"])

    @optims(OURS)
    def test_copied_whole_printed_and_never_without_state(self, device, dtype, optim_info):
        for optimizer, params, closure in self.cases(optim_info, device, dtype):
            optimizer.step(closure)
            public = {k for k in vars(optimizer) if not k.startswith("_")}
            self.assertEqual(
                public, {k for k in vars(copy.deepcopy(optimizer)) if not k.startswith("_")}
            )
            self.assertIn("pairs (1 of rank 3)", repr(optimizer))
            keeps = not isinstance(optimizer, lorapro.LoraProSGD) or optimizer.defaults["momentum"]
            for p in params if keeps else ():
                self.assertTrue(optimizer.state[p])

    @optims(OURS, dtypes=[torch.float32, torch.float64])
    def test_what_is_no_pair_steps_as_torchs(self, device, dtype, optim_info):
        torchs = CLASSES[optim_info.name][2]
        known = set(inspect.signature(torchs.__init__).parameters)
        for optimizer, (_, _, bias), closure in self.cases(optim_info, device, dtype):
            twin = Parameter(bias.detach().clone())
            options = optimizer.defaults.items()
            plain = torchs([twin], **{k: v for k, v in options if k in known})
            for _ in range(5):
                closure()
                twin.grad = bias.grad.clone()
                optimizer.step()
                plain.step()
                self.assertEqual(bias, twin, rtol=1e-5, atol=1e-7)


instantiate_device_type_tests(Checks, globals(), only_for="cpu")
