r"""A step of training as a graph: the operations of a function, recorded once and compared with it.

A step is a function of tensors, :math:`x_0 \mapsto (\widehat{\mathcal L}, \nabla \widehat{\mathcal L})`. A
trace runs it once and records every tensor operation, the random draws included. Three things can go wrong:

- Python's control flow depends on a tensor's values. The recording stops with an error that says so.
- A value is copied out of the tensors, by ``tolist()`` or NumPy, and would become a constant of the graph.
  These calls raise an error.
- The step runs other operations at every call. The graph and the step are therefore run once more from the
  same seed, and their losses and gradients must agree.

References:
    torch.fx: Practical Program Capture and Transformation for Deep Learning in Python (Reed et al., 2022).
    https://arxiv.org/abs/2112.08429
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import pyro
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from pyro_diffusion.checks import require, unchecked

#: Returns the loss of some tensors, followed by the gradients.
Step = Callable[..., tuple[Tensor, ...]]
Buffers = dict[nn.Module, dict[str, tuple[Tensor, Tensor]]]


def trace_step(step: Step, tensors: list[Tensor]) -> GraphModule:
    """The operations of a step as a graph that gives the same numbers.

    The graph reads parameters and buffers from the tensors that the step reads, and draws new noise at
    every call.

    Args:
        step: Called as ``step(*tensors)``.
        tensors: Arguments of the step. The graph is valid for others of the same shapes and dtypes.

    Raises:
        ValueError: Control flow or shapes that depend on values, values that are copied out of tensors, a
            result that is not finite, or a graph that gives other numbers than the step.
    """
    graph = _recorded(step, tensors)
    _check_shapes(graph)
    _check_agreement(step, graph, tensors)
    return graph


def leaves_of(loss: Any) -> list[Tensor]:
    """Every tensor that a backward pass through ``loss`` accumulates gradients for."""
    nodes: list[Any] = [loss.grad_fn] if getattr(loss, "grad_fn", None) else []
    seen, leaves = set(nodes), []
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        # Count each parent once: one operation can use a tensor twice, as w * w does.
        new = dict.fromkeys(p for p, _ in node.next_functions if p is not None and p not in seen)
        seen.update(new)
        nodes.extend(new)
    return leaves[::-1]


def without_dead_draws(graph: GraphModule) -> GraphModule:
    """The graph without unused operations, including unused draws (at sites whose KL has a formula).

    An optimising compiler removes unused operations by itself, but it keeps draws, because they change the
    state of the generator.
    """
    for node in reversed(graph.graph.nodes):
        if node.op == "call_function" and not node.users and _is_removable(node):
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _is_removable(node: torch.fx.Node) -> bool:
    """Whether an operation has no effect besides its result, which is not used."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.name.startswith("aten::") or "assert" in schema.name:
        return False
    if not schema.is_mutable:
        return True
    # A draw in place (as most draws in a graph are) into a new tensor that no other operation reads.
    return torch.Tag.nondeterministic_seeded in cast(Any, node.target).tags and all(
        not maker.all_input_nodes and list(maker.users) == [node] for maker in node.all_input_nodes
    )


def machine_code(graph: GraphModule, tensors: list[Tensor]) -> Step:
    """The graph, compiled by inductor as it is.

    ``torch.compile`` would trace it once more, and check at every call whether anything has changed. Neither
    is needed: the graph is a trace already, and :class:`CompiledELBO` has a key for each valid graph.
    """
    from torch._inductor import (
        compile as compiled,
    )  # as torch.compile does: it takes a second to import

    with torch.no_grad():
        return cast(Step, compiled(graph, list(tensors), options={"fallback_random": True}))


@contextmanager
def modules_called() -> Iterator[Buffers]:
    """The modules that the body calls, each with its buffers and a copy of what was in them before."""
    called: Buffers = {}

    def note(module: nn.Module, args: Any) -> None:
        """Copy a module's buffers before it runs for the first time."""
        if module not in called:
            buffers = module.named_buffers(recurse=False)
            called[module] = {name: (buffer, buffer.clone()) for name, buffer in buffers}

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield called
    finally:
        handle.remove()


def restore_buffers(called: Buffers) -> None:
    """Restore the buffers, such as running means, to their values before the modules were called.

    Raises:
        ValueError: A module that put another tensor in a buffer's place.
    """
    for module, buffers in called.items():
        for name, (buffer, before) in buffers.items():
            if getattr(module, name) is not buffer:
                raise ValueError(
                    f"buffer {name!r} of a {type(module).__name__}: got a new tensor in a call; expected a "
                    "change in place, which a graph can record. Write self.x.copy_(…), not self.x = …"
                )
            with torch.no_grad():
                buffer.copy_(before)


def without_casts(autocast: tuple[str, torch.dtype] | None) -> AbstractContextManager[Any]:
    """Switch mixed precision off, because a graph contains its casts already."""
    return torch.autocast(autocast[0], enabled=False) if autocast else nullcontext()


class CompiledGraph(NamedTuple):
    """A compiled loss: ``compiled(*tensors)`` returns it with its gradients by ``leaves``."""

    compiled: Step
    leaves: Sequence[Tensor]
    autocast: tuple[str, torch.dtype] | None
    held: list[Tensor]  # kept alive, so that no other object can have one of the ids in the key
    fresh: bool = False  #: whether each gradient is in memory that nothing else uses

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The loss and its gradients. The graph contains the casts of mixed precision already."""
        with torch.no_grad(), without_casts(self.autocast):
            return self.compiled(*tensors)

    def tried(self, tensors: list[Tensor]) -> "CompiledGraph":
        """The same, after a first run that shows whether the gradients share memory with other tensors.

        A graph always places its results in the same way. On a GPU it may reuse the same memory at every run.
        """
        loss, *grads = self.run(*tensors)
        if any(x.is_cuda for x in (loss, *grads)):
            return self
        others = {
            x.untyped_storage().data_ptr() for x in (loss, *tensors, *self.held, *self.leaves)
        }
        places = {grad.untyped_storage().data_ptr() for grad in grads}
        return self._replace(fresh=len(places) == len(grads) and not places & others)


class GraphLoss(torch.autograd.Function):
    """A loss whose gradients were computed along with it: ``GraphLoss.apply(graph, tensors, *leaves)``."""

    @staticmethod
    def forward(ctx: Any, graph: CompiledGraph, tensors: list[Tensor], *leaves: Tensor) -> Tensor:
        """The loss. Its gradients by the leaves are kept for the backward pass."""
        loss, *grads = graph.run(*tensors)
        ctx.save_for_backward(*grads)
        ctx.fresh = graph.fresh
        return loss.clone()  # the next run of a CUDA graph writes to the same memory

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradients that were kept, times the gradient of the loss, unless that is one."""
        grads = ctx.saved_tensors
        if ctx.fresh and grad.item() == 1:
            return None, None, *grads
        return None, None, *torch._foreach_mul(grads, grad)


class _Recording(TorchFunctionMode):
    """Keep the numbers of ``item()`` as tensors; raise an error for calls that copy values out of a trace."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.item:
            return args[0].detach()
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            raise ValueError(_refusal(f"a call of Tensor.{func.__name__}"))
        return func(*args, **(kwargs or {}))


def _recorded(step: Step, tensors: list[Tensor]) -> GraphModule:
    try:
        with pyro.validation_enabled(False), unchecked(), _Recording():
            return make_fx(step)(*tensors)
    except RuntimeError as error:
        if "get value out of a tracing tensor" not in str(error):
            raise
        raise ValueError(_refusal("control flow that depends on a tensor's values")) from error


def _check_shapes(graph: GraphModule) -> None:
    """Raise an error for shapes that depend on values. Indexing by numbers is allowed."""
    for node in graph.graph.nodes:
        if torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()) and (
            node.target is not torch.ops.aten.index.Tensor or _has_mask(node, graph)
        ):
            raise ValueError(_refusal(f"{node.target}, whose shape depends on a tensor's values"))


def _has_mask(index: torch.fx.Node, graph: GraphModule) -> bool:
    """Whether a tensor is indexed by booleans, whose values determine the shape of the result."""
    values = (
        getattr(graph, node.target) if node.op == "get_attr" else node.meta.get("tensor_meta")
        for node in cast(Any, index.args[1])
        if node is not None
    )
    return any(getattr(value, "dtype", None) == torch.bool for value in values)


def _check_agreement(step: Step, graph: GraphModule, tensors: list[Tensor]) -> None:
    """Compare graph and step at new noise: gradients closely, the loss, a sum in float32, less closely."""
    results = []
    for run in (step, graph):
        torch.manual_seed(0)
        loss, *grads = run(*tensors)
        results.append((loss.item(), torch.cat([g.detach().double().flatten() for g in grads])))
    (ours, our_grads), (theirs, their_grads) = results
    require(
        math.isfinite(ours) and bool(our_grads.isfinite().all()),
        "first call of a compiled ELBO",
        f"a loss of {ours:g}, or gradients that are not finite",
        "finite numbers, because the graph is compared with the programs by them",
        "Check data and parameters.",
    )
    atol = 1e-5 * our_grads.abs().max().item()
    alike = torch.allclose(our_grads, their_grads, rtol=1e-5, atol=atol)
    if not alike or not math.isclose(ours, theirs, rel_tol=1e-3, abs_tol=1e-3):
        raise ValueError(_refusal(f"a graph that gives a loss of {theirs:g} for {ours:g}"))


def _refusal(got: str) -> str:
    return (
        f"arguments 'model' and 'guide': got {got}; expected programs that run the same operations at every "
        "call, so that they can be traced once. Write choices as torch.where, or use the ELBO without "
        "compile_elbo."
    )
