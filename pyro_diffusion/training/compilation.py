r"""Pyro programs as one compiled graph: the loss and its gradients, with the random draws inside.

A step of ``SVI`` runs two Python programs, site by site. Most of them have a static structure: they run the
same tensor operations at every step. Traced once, with the backward pass, such programs become a graph

.. math::
    x_0 \;\mapsto\; \big(\widehat{\mathcal L},\; \nabla_{\theta, \phi}\, \widehat{\mathcal L}\big), \qquad
    \widehat{\mathcal L} = -\widehat{\mathrm{ELBO}},

of a few hundred operations, which ``torch.compile`` turns into machine code.
:mod:`~pyro_diffusion.training.graphs` makes the trace, and compares it with the programs.

References:
    PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph
    Compilation (Ansel et al., 2024). https://doi.org/10.1145/3620665.3640366
"""

import os
import shutil
import sys
from collections.abc import Callable, Hashable, Iterator
from functools import cache, partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from pyro_diffusion.checks import require
from pyro_diffusion.given import by_position
from pyro_diffusion.training.graphs import (
    CompiledGraph,
    GraphLoss,
    Step,
    leaves_of,
    machine_code,
    modules_called,
    restore_buffers,
    trace_step,
    without_casts,
    without_dead_draws,
)


def compile_elbo(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    elbo: ELBO,
    *,
    backend: str | None = "inductor",
) -> "CompiledELBO":
    r"""``elbo(model, guide)``, traced into one graph and compiled.

    Model and guide may be any static pair, of this package or your own::

        loss = compile_elbo(pair.model, pair.guide, TraceMeanField_ELBO())
        optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
        for batch in loader:
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()

    In Lightning it is ``SVIModule(model, guide, partial(compile_elbo, elbo=TraceMeanField_ELBO()), …)``.

    The first call runs the programs themselves, traces them and compiles the graph, which takes seconds.
    Later calls run the graph. Every call draws new noise, seeded by ``torch.manual_seed``. A compiled graph
    leaves out draws that the loss does not depend on, such as those of sites with an analytic KL; otherwise
    the same seed gives the programs' draws.

    A new shape, dtype, device or training mode makes a new graph, and so does another tensor in place of a
    parameter or buffer. Drop the last batch if it is smaller. The graph reads the modules' own parameters
    and buffers, so that it uses new values if they are trained or loaded in place. Everything else
    (attributes and Python numbers) keeps the value of the first call. Values, such as NaN in the data, are
    checked at the first call only.

    Args:
        model: Program for :math:`p`.
        guide: Program for :math:`q`.
        elbo: ``Trace_ELBO(…)`` or a loss derived from it, such as ``TraceMeanField_ELBO(…)``.
        backend: Backend of ``torch.compile``. ``None`` runs the graph's operations one by one. This is
            about as fast as the programs without Pyro, and needs neither time to compile nor a C++ compiler.

    Returns:
        A module that is called with the programs' arguments and returns the loss, minus the ELBO, in nats. A
        context goes by name or by position, ``loss(x_0, context=c)``; its tensors are inputs of the graph.

    Raises:
        ValueError: A loss that enumerates, or that defines its own steps. From a call: programs whose control
            flow depends on values, whose draws are enumerated, that have no parameters, or that put other
            tensors in place of buffers; a first loss that is not finite; arguments that require gradients,
            or that are neither tensors, numbers nor strings; handlers around the call.

    Example:
        >>> denoiser = NeuralDenoiser(MLP((2,)), LogSNRSchedule(20), event_shape=(2,))
        >>> pair = DiffusionModel(denoiser).subsampled()
        >>> loss = compile_elbo(pair.model, pair.guide, TraceMeanField_ELBO(), backend=None)
        >>> loss(torch.randn(16, 2)).backward()
    """
    return CompiledELBO(model, guide, _check_elbo(elbo), backend)


class CompiledELBO(nn.Module):
    """The module that :func:`compile_elbo` returns."""

    __call__: Callable[..., Tensor]  # of forward

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], elbo: ELBO, backend: str | None
    ) -> None:
        super().__init__()
        self.model, self.guide, self.elbo, self.backend = model, guide, elbo, backend
        self._graphs: dict[Any, CompiledGraph] = {}
        self._stated: dict[str, Tensor] = {}
        owners = [getattr(program, "__self__", program) for program in (model, guide)]
        modules = (m for owner in owners if isinstance(owner, nn.Module) for m in owner.modules())
        self._modes = list(dict.fromkeys(modules))
        self._leaves: list[Tensor] = list(self.parameters())

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of model and guide; after a first call also those of their param statements."""
        own = list(super().named_parameters(prefix, recurse, remove_duplicate))
        known = {id(parameter) for _, parameter in own}
        yield from own
        yield from ((n, p) for n, p in self._stated.items() if id(p) not in known)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, differentiable in all parameters. A context may go by name or by position."""
        if "context" in kwargs and (len(args) == 1 or "x_0" in kwargs):
            x_0 = args[0] if args else kwargs.pop("x_0")
            moved, kwargs = by_position(x_0, kwargs)
            args = tuple(moved)
        values, spec = _flattened(args, kwargs)
        _check_call(values)
        tensors = [value for value in values if isinstance(value, Tensor)]
        graph = self._graphs.get(self._key(values, spec))
        if graph is None:
            graph = self._compile(values, spec)
            self._graphs[self._key(values, spec)] = graph  # a new key: the call may add parameters
        if torch.is_grad_enabled():
            return GraphLoss.apply(graph, tensors, *graph.leaves)
        return graph.run(*tensors)[0].clone()

    def _key(self, values: list[Any], spec: pytree.TreeSpec) -> Any:
        """What a graph is valid for: kinds of arguments and parameters, modes of modules, precision."""
        read = (*self._leaves, *self._tensors_read())
        kinds = {id(tensor): tensor for tensor in read}
        return (
            spec,
            tuple(map(_kind, values)),
            tuple(map(id, read)),  # by place: one tensor may be in two places
            tuple(map(_kind, kinds.values())),
            tuple([module.training for module in self._modes]),
            tuple(_PYRO_STACK),
            _autocast(values),
        )

    def _tensors_read(self) -> list[Tensor]:
        """Parameters and buffers of the modules. Another object in a place needs another graph."""
        held = [kind.values() for m in self._modes for kind in (m._parameters, m._buffers) if kind]
        return [tensor for tensors in held for tensor in tensors if tensor is not None]

    def _compile(self, values: list[Any], spec: pytree.TreeSpec) -> CompiledGraph:
        """Run the programs, trace them, and compile. The generators' states stay as they were."""
        devices = {v.device for v in values if isinstance(v, Tensor) and v.is_cuda}
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            # A tensor that is passed twice becomes two objects, because one object would be a single input.
            values = [_own(value) if isinstance(value, Tensor) else value for value in values]
            with modules_called() as called:
                leaves = self._find_leaves(values, spec)
            restore_buffers(called)
            self._modes = list(dict.fromkeys((*self._modes, *called)))
            tensors = [value for value in values if isinstance(value, Tensor)]
            traced = trace_step(partial(self._step, leaves, values, spec), tensors)
            autocast, held = _autocast(values), self._tensors_read()
            with without_casts(autocast):
                compiled = self._compiled(traced, tensors, on_cuda=bool(devices))
            graph = CompiledGraph(compiled, leaves, autocast, held).tried(tensors)
            restore_buffers(called)  # running the graph moved running means, too
        return graph

    def _compiled(self, graph: GraphModule, tensors: list[Tensor], on_cuda: bool) -> Step:
        if self.backend is None:
            return graph
        graph = without_dead_draws(graph)
        if self.backend == "inductor" and not on_cuda:
            return machine_code(graph, tensors)
        options: dict[str, Any] = {"fallback_random": True, "triton.cudagraphs": on_cuda}
        return torch.compile(
            graph,
            fullgraph=True,
            dynamic=False,
            backend=self.backend,
            options=options if self.backend == "inductor" else None,
        )

    def _find_leaves(self, values: list[Any], spec: pytree.TreeSpec) -> list[Tensor]:
        """Run the programs once, and find the tensors that their loss has gradients for, stated or not."""
        with poutine.trace(param_only=True) as statements:
            _, surrogate = self.loss_and_surrogate(*pytree.tree_unflatten(values, spec))
        self._stated = {
            name: site["value"].unconstrained()
            for name, site in statements.trace.nodes.items()
            if site["type"] == "param"
        }
        leaves = leaves_of(surrogate)
        require(
            len(leaves) > 0,
            "arguments 'model' and 'guide'",
            "programs without parameters that require gradients",
            "parameters to train",
            "Compute a bound without training by elbo_terms.",
        )
        self._leaves = list({id(leaf): leaf for leaf in (*self.parameters(), *leaves)}.values())
        return leaves

    def _step(
        self, leaves: list[Tensor], values: list[Any], spec: pytree.TreeSpec, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """The loss and its gradients as a function of the tensors among the arguments."""
        given = iter(tensors)
        values = [next(given) if isinstance(value, Tensor) else value for value in values]
        loss, surrogate = self.loss_and_surrogate(*pytree.tree_unflatten(values, spec))
        return torch.as_tensor(loss), *torch.autograd.grad(surrogate, leaves)

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
        return self.__dict__ | {"_graphs": {}, "_stated": {}}  # a copy makes its own


def cpp_compiler() -> str | None:
    """The C++ compiler that inductor uses on a CPU, if it is found: ``$CXX``, or else the usual one."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX", usual))


def _flattened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
    """The values among the arguments, and their places."""
    if not kwargs and all(isinstance(value, Tensor) for value in args):
        return list(args), _of_tensors(len(args))
    return pytree.tree_flatten((args, kwargs))


@cache
def _of_tensors(count: int) -> pytree.TreeSpec:
    """The places of the values if all arguments are tensors, as in most calls."""
    return pytree.tree_flatten(((0,) * count, {}))[1]


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor.view_as(tensor)


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if not isinstance(value, Hashable):
        raise ValueError(
            f"arguments of a compiled ELBO: got a {type(value).__name__}; expected tensors, or numbers and "
            "strings that are constants of the graph. Convert arrays with torch.as_tensor."
        )
    return type(value), value  # True is not 1


def _autocast(values: list[Any]) -> tuple[str, torch.dtype] | None:
    """The mixed precision of the call, or ``None``."""
    kind = next((value.device.type for value in values if isinstance(value, Tensor)), "cpu")
    return (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None


def _check_elbo(elbo: ELBO) -> Trace_ELBO:
    plain = isinstance(elbo, Trace_ELBO) and all(
        getattr(type(elbo), step) is getattr(Trace_ELBO, step)
        for step in ("differentiable_loss", "loss_and_grads")
    )
    if not plain:
        got = f"the class {elbo.__name__}" if isinstance(elbo, type) else type(elbo).__name__
        raise ValueError(
            f"argument 'elbo': got {got}; expected Trace_ELBO(), TraceMeanField_ELBO() or a loss that "
            "changes their terms only. Use a loss that enumerates, traces or differentiates on its own "
            "without compile_elbo: elbo(model, guide)."
        )
    return elbo


def _check_call(values: list[Any]) -> None:
    outside = [h for h in _PYRO_STACK if not getattr(h, "in_place", False)]
    if outside:
        raise ValueError(
            f"handlers around a compiled ELBO: got {type(outside[0]).__name__}, which would have no effect "
            "on later calls, or a permanent one; expected none. Put it inside the programs, which are traced "
            "with it, or use the ELBO without compile_elbo."
        )
    if any(isinstance(value, Tensor) and value.requires_grad for value in values):
        raise ValueError(
            "arguments of a compiled ELBO: got a tensor that requires a gradient; expected data, because "
            "only the programs' parameters have gradients. Move the code that makes the tensor into the "
            "programs."
        )


def _check_sites(*traces: poutine.Trace) -> None:
    for site in (site for trace in traces for site in trace.nodes.values()):
        require(
            site["type"] != "sample" or not site["infer"].get("enumerate"),
            f"site {site['name']!r}",
            "a site that is enumerated",
            "a site that is drawn, because a compiled ELBO cannot enumerate",
            "Use TraceEnum_ELBO()(model, guide) without compile_elbo.",
        )
