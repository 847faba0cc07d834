r"""Stock Pyro programs as one compiled graph: the loss and its gradients, random draws inside.

A step of ``SVI`` runs two Python programs, site by site. Most of them have a static structure, so that
the tensor operations are the same at every step; traced once, forward and backward together,

.. math::
    x_0 \;\mapsto\; \big(\widehat{\mathcal L},\; \nabla_{\theta, \phi}\, \widehat{\mathcal L}\big), \qquad
    \widehat{\mathcal L} = -\widehat{\mathrm{ELBO}},

they are a graph of a few hundred operations that ``torch.compile`` turns into machine code. What a trace
can get wrong is checked when it is made: the graph and the programs, given the same new noise, must agree.

References:
    PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph
    Compilation (Ansel et al., 2024). https://doi.org/10.1145/3620665.3640366
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pyro_diffusion.checks import unchecked

__all__ = ["CompiledELBO", "compile_elbo"]


def compile_elbo(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    elbo: ELBO,
    *,
    backend: str | None = "inductor",
) -> "CompiledELBO":
    r"""``elbo(model, guide)``, traced into one graph and compiled.

    For any static model and guide, of this package or not::

        loss = compile_elbo(pair.model, pair.guide, TraceMeanField_ELBO())
        optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
        for batch in loader:
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()

    and in Lightning ``SVIModule(model, guide, partial(compile_elbo, elbo=TraceMeanField_ELBO()), …)``.

    The first call with data of a shape runs the programs themselves, traces them and compiles the graph,
    which takes seconds; a change of shape, dtype, device or training mode, or another tensor in place of a
    parameter or buffer, does so again, so drop the last batch if it is smaller. Later calls run the graph:
    every draw is new, and seeded by ``torch.manual_seed``. Parameters and buffers are the modules' own,
    whatever trains or loads them in place. All else is as it was at the first call: attributes and Python's
    numbers. Values, such as NaN in the data, are checked at the first call only.

    Args:
        model: Program for :math:`p`.
        guide: Program for :math:`q`.
        elbo: ``Trace_ELBO(…)`` or a loss derived from it, such as ``TraceMeanField_ELBO(…)``.
        backend: Of ``torch.compile``; ``None`` runs the graph's operations one by one, which is about as
            fast as the programs without Pyro, and needs neither seconds nor a C++ compiler.

    Returns:
        A module that is called with the programs' arguments and returns the loss, minus the ELBO, in nats.

    Raises:
        ValueError: A loss that enumerates, or has steps of its own. From a call: programs whose control flow
            depends on values, whose draws are enumerated, that have nothing to train or put other tensors in
            place of buffers; a first loss that is not finite; arguments that want gradients, or that are
            neither tensors nor numbers or words; handlers around the call.

    Example:
        >>> denoiser = NeuralDenoiser(MLP((2,)), LogSNRSchedule(20), event_shape=(2,))
        >>> pair = DiffusionModel(denoiser).subsampled()
        >>> loss = compile_elbo(pair.model, pair.guide, TraceMeanField_ELBO(), backend=None)
        >>> loss(torch.randn(16, 2)).backward()
    """
    return CompiledELBO(model, guide, _check_elbo(elbo), backend)


class CompiledELBO(nn.Module):
    """The module that :func:`compile_elbo` makes."""

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], elbo: ELBO, backend: str | None
    ) -> None:
        super().__init__()
        self.model, self.guide, self.elbo, self.backend = model, guide, elbo, backend
        self._graphs: dict[Any, _Graph] = {}
        self._stated: dict[str, Tensor] = {}
        owners = [getattr(program, "__self__", program) for program in (model, guide)]
        modules = [m for owner in owners if isinstance(owner, nn.Module) for m in owner.modules()]
        self._modes = list({id(module): module for module in modules}.values())
        self._leaves: list[Tensor] = list(self.parameters())

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of model and guide; after a first call also what their param statements name."""
        own = set()
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            own.add(id(parameter))
            yield name, parameter
        for name, tensor in self._stated.items():
            if id(tensor) not in own:
                yield name, tensor  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, differentiable in all parameters."""
        values, spec = pytree.tree_flatten((args, kwargs))
        tensors = [value for value in values if isinstance(value, Tensor)]
        graph = self._graphs.get(self._key(values, spec))
        if graph is None:
            graph = self._compile(values, spec)
            self._graphs[self._key(values, spec)] = graph  # by parameters that are known only now
        if torch.is_grad_enabled():
            return _Loss.apply(graph.run, tensors, *graph.leaves)
        return graph.run(*tensors)[0].clone()

    def _key(self, values: list[Any], spec: pytree.TreeSpec) -> Any:
        """What a graph is good for: kinds of arguments and parameters, modes of modules, precision."""
        for handler in _PYRO_STACK:
            if not getattr(handler, "in_place", False):
                raise ValueError(
                    f"handlers around a compiled ELBO: got {type(handler).__name__}, which would not reach "
                    "the graph, or stay in it; expected none. Put it inside the programs, which are traced "
                    "with it, or take the ELBO as it is."
                )
        return (
            spec,
            tuple(map(_kind, values)),
            tuple(map(_kind, self._leaves)),
            tuple(module.training for module in self._modes),
            tuple(map(id, self._tensors_read())),
            tuple(_PYRO_STACK),
            _autocast(values),
        )

    def _tensors_read(self) -> list[Tensor]:
        """Parameters and buffers by the modules that hold them: another object is another graph."""
        held = (kind for m in self._modes for kind in (m._parameters, m._buffers))
        return [tensor for kind in held for tensor in kind.values() if tensor is not None]

    def _compile(self, values: list[Any], spec: pytree.TreeSpec) -> "_Graph":
        """Run the programs, trace them, compare, and compile; generators stay where they were."""
        if any(isinstance(value, Tensor) and value.requires_grad for value in values):
            raise ValueError(
                "arguments of a compiled ELBO: got a tensor that wants a gradient; expected data, for "
                "gradients are those of the programs' parameters. Put what made the tensor into the programs."
            )
        devices = {v.device for v in values if isinstance(v, Tensor) and v.is_cuda}
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            # Objects of their own: the same one given twice would be one input of the graph.
            values = [_own(value) if isinstance(value, Tensor) else value for value in values]
            tensors = [value for value in values if isinstance(value, Tensor)]
            with _modules_called() as called:
                leaves = self._find_leaves(values, spec)
            _restore_buffers(called)
            known = {id(module): module for module in (*self._modes, *called)}
            self._modes = list(known.values())
            step = _Step(self, leaves, values, spec)
            traced = _trace(step, tensors)
            _check_agreement(step, traced, tensors)
            _restore_buffers(called)  # the graph's own run moves running means
        compiled: Any = traced
        if self.backend is not None:
            options: dict[str, Any] = {"fallback_random": True, "triton.cudagraphs": bool(devices)}
            compiled = torch.compile(
                traced,
                fullgraph=True,
                dynamic=False,
                backend=self.backend,
                options=options if self.backend == "inductor" else None,
            )
        return _Graph(compiled, leaves, _autocast(values), self._tensors_read())

    def _find_leaves(self, values: list[Any], spec: pytree.TreeSpec) -> list[Tensor]:
        """Run the programs once; what their loss has gradients for, stated or not."""
        args, kwargs = pytree.tree_unflatten(values, spec)
        with poutine.trace(param_only=True) as statements:
            _, surrogate = self.loss_and_surrogate(args, kwargs)
        self._stated = {
            name: site["value"].unconstrained()
            for name, site in statements.trace.nodes.items()
            if site["type"] == "param"
        }
        leaves = _leaves_of(surrogate)
        if not leaves:
            raise ValueError(
                "arguments 'model' and 'guide': got programs without parameters that want gradients; "
                "expected some to train. Read a bound with elbo_terms."
            )
        known = {id(tensor): tensor for tensor in (*self.parameters(), *leaves)}
        self._leaves = list(known.values())
        return leaves

    def loss_and_surrogate(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Tensor]:
        """What Pyro's ELBO computes: a value, and what to differentiate for its gradient."""
        loss: Any = 0.0
        surrogate: Any = 0.0
        for traces in self.elbo._get_traces(self.model, self.guide, args, kwargs):
            _check_sites(*traces)
            value, differentiable = self.elbo._differentiable_loss_particle(*traces)
            loss = loss + value / self.elbo.num_particles
            surrogate = surrogate + differentiable / self.elbo.num_particles
        return loss, surrogate

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_graphs": {}, "_stated": {}}  # of the original's parameters


class _Graph(NamedTuple):
    """A compiled loss: ``compiled(*tensors)`` gives it, and its gradients by ``leaves``."""

    compiled: Callable[..., tuple[Tensor, list[Tensor]]]
    leaves: Sequence[Tensor]
    autocast: tuple[str, torch.dtype] | None
    held: list[Tensor]  # what the graph was made for by identity: no other object has it meanwhile

    def run(self, *tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradients; casts of mixed precision are in the graph already."""
        if self.autocast is None:
            with torch.no_grad():
                return self.compiled(*tensors)
        with torch.no_grad(), torch.autocast(self.autocast[0], enabled=False):
            return self.compiled(*tensors)


class _Step:
    """The loss and its gradients as a function of the tensors among the arguments."""

    def __init__(
        self,
        elbo: CompiledELBO,
        leaves: list[Tensor],
        values: list[Any],
        spec: pytree.TreeSpec,
    ) -> None:
        self.elbo, self.leaves, self.values, self.spec = elbo, leaves, values, spec

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
        given = iter(tensors)
        values = [next(given) if isinstance(value, Tensor) else value for value in self.values]
        args, kwargs = pytree.tree_unflatten(values, self.spec)
        loss, surrogate = self.elbo.loss_and_surrogate(args, kwargs)
        return torch.as_tensor(loss), list(torch.autograd.grad(surrogate, self.leaves))


class _Loss(torch.autograd.Function):
    """A loss whose gradients were computed along with it."""

    @staticmethod
    def forward(ctx: Any, run: Any, tensors: list[Tensor], *leaves: Tensor) -> Tensor:
        loss, ctx.grads = run(*tensors)
        return loss.clone()  # out of the memory that the next run of a CUDA graph writes to

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, *torch._foreach_mul(ctx.grads, grad)


class _Recording(TorchFunctionMode):
    """Python's numbers stay tensors; what would copy values out of a trace in silence is refused."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.item:
            return args[0].detach()
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            raise ValueError(_refusal(f"a call of Tensor.{func.__name__}"))
        return func(*args, **(kwargs or {}))


def _trace(step: _Step, tensors: list[Tensor]) -> GraphModule:
    """The operations of a step as a graph, in which parameters and buffers are the modules' own."""
    try:
        with pyro.validation_enabled(False), unchecked(), _Recording():
            graph = make_fx(step)(*tensors)
    except RuntimeError as error:
        if "get value out of a tracing tensor" not in str(error):
            raise
        raise ValueError(_refusal("control flow that depends on a tensor's values")) from error
    for node in graph.graph.nodes:
        if torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()) and (
            node.target is not torch.ops.aten.index.Tensor or _has_mask(node, graph)
        ):
            raise ValueError(_refusal(f"{node.target}, whose shape depends on a tensor's values"))
    return graph


def _has_mask(index: torch.fx.Node, graph: GraphModule) -> bool:
    used: list[Any] = [node for node in index.args[1] if node is not None]  # type: ignore[union-attr]
    values = [
        getattr(graph, node.target) if node.op == "get_attr" else node.meta.get("tensor_meta")
        for node in used
    ]
    return any(getattr(value, "dtype", None) == torch.bool for value in values)


def _check_agreement(step: _Step, traced: GraphModule, tensors: list[Tensor]) -> None:
    """Compare the graph with the programs at new noise: gradients closely, sums of float32 less so."""
    results = []
    for run in (step, traced):
        torch.manual_seed(0)
        loss, grads = run(*tensors)
        results.append((loss.item(), torch.cat([g.detach().double().flatten() for g in grads])))
    (ours, our_grads), (theirs, their_grads) = results
    if not math.isfinite(ours) or not our_grads.isfinite().all():
        raise ValueError(
            f"first call of a compiled ELBO: got a loss of {ours:g}, or gradients that are not finite; "
            "expected finite numbers, by which the graph is checked. Check data and parameters."
        )
    atol = 1e-5 * our_grads.abs().max().item()
    alike = torch.allclose(our_grads, their_grads, rtol=1e-5, atol=atol)
    if not alike or not math.isclose(ours, theirs, rel_tol=1e-3, abs_tol=1e-3):
        raise ValueError(_refusal(f"a graph that gives a loss of {theirs:g} for {ours:g}"))


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor.view_as(tensor)


def _leaves_of(surrogate: Any) -> list[Tensor]:
    """Everything that a loss accumulates gradients for."""
    nodes = [getattr(surrogate, "grad_fn", None)]
    seen, leaves = set(nodes), []
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        new = [parent for parent, _ in node.next_functions if parent not in seen]
        seen.update(new)
        nodes.extend(new)
    return leaves[::-1]


@contextmanager
def _modules_called() -> Iterator[dict[nn.Module, dict[str, tuple[Tensor, Tensor]]]]:
    """The modules that are called meanwhile, with their buffers and what was in them before."""
    called: dict[nn.Module, dict[str, tuple[Tensor, Tensor]]] = {}

    def note(module: nn.Module, args: Any) -> None:
        """Look at a module before it runs for the first time."""
        if module not in called:
            buffers = module.named_buffers(recurse=False)
            called[module] = {name: (buffer, buffer.clone()) for name, buffer in buffers}

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield called
    finally:
        handle.remove()


def _restore_buffers(called: dict[nn.Module, dict[str, tuple[Tensor, Tensor]]]) -> None:
    for module, buffers in called.items():
        for name, (buffer, before) in buffers.items():
            if getattr(module, name) is not buffer:
                raise ValueError(
                    f"buffer {name!r} of a {type(module).__name__}: got another tensor in a call; expected "
                    "it to be changed in place, which a graph can do. Write self.x.copy_(…), not self.x = …"
                )
            with torch.no_grad():
                buffer.copy_(before)


def _check_sites(*traces: poutine.Trace) -> None:
    for trace in traces:
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and site["infer"].get("enumerate"):
                raise ValueError(
                    f"site {name!r}: got a site that is enumerated; expected draws, of which a compiled ELBO "
                    "is made. Take TraceEnum_ELBO()(model, guide) as it is."
                )


def _refusal(got: str) -> str:
    return (
        f"arguments 'model' and 'guide': got {got}; expected programs of the same operations at every call, "
        "which can be traced once. Write choices as torch.where, or take the ELBO as it is."
    )


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if not isinstance(value, Hashable):
        raise ValueError(
            f"arguments of a compiled ELBO: got a {type(value).__name__}; expected tensors, and numbers or "
            "words that stay in the graph. Convert arrays with torch.as_tensor."
        )
    return type(value), value  # True is not 1


def _autocast(values: list[Any]) -> tuple[str, torch.dtype] | None:
    """Mixed precision that the call is under."""
    kind = next((value.device.type for value in values if isinstance(value, Tensor)), "cpu")
    if not torch.is_autocast_enabled(kind):
        return None
    return kind, torch.get_autocast_dtype(kind)


def _check_elbo(elbo: ELBO) -> Trace_ELBO:
    plain = isinstance(elbo, Trace_ELBO) and all(
        getattr(type(elbo), step) is getattr(Trace_ELBO, step)
        for step in ("differentiable_loss", "loss_and_grads")
    )
    if not plain:
        got = f"the class {elbo.__name__}" if isinstance(elbo, type) else type(elbo).__name__
        raise ValueError(
            f"argument 'elbo': got {got}; expected Trace_ELBO(), TraceMeanField_ELBO() or a loss that "
            "changes their terms only. One that enumerates, traces or differentiates on its own is taken "
            "as it is: elbo(model, guide)."
        )
    return elbo
