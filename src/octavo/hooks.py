"""Forward hooks on a model's routers: see what they choose, or choose in their place; no flag in any forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from octavo.model import Mixtral, Router, Routing

Tell = Callable[[Sequence[Routing]], None]
Choose = Callable[[int, Router, Tensor, Routing], Routing]


class Observer:
    """A hook that changes nothing: it takes down what its layer's router chose."""

    def __init__(self, forward: _Forward, layer: int) -> None:
        self._forward, self._layer = forward, layer

    def __call__(self, router: nn.Module, inputs: Any, routing: Routing) -> None:
        """Called by torch."""
        self.note(routing)

    def note(self, routing: Routing) -> None:
        """Take it down; with the last layer, tell."""
        self._forward.note(self._layer, routing)


class _Forward:
    """What one forward chose so far, layer by layer."""

    def __init__(self, n_layers: int, tell: Tell) -> None:
        self._n_layers, self._tell = n_layers, tell
        self._layers: list[Routing] = []

    def note(self, layer: int, routing: Routing) -> None:
        if layer == 0:
            self._layers = []
        if layer != len(self._layers):  # the hooks came when this forward was under way
            return
        self._layers.append(routing)
        if layer + 1 == self._n_layers:
            self._tell(self._layers)


def observe(routers: Sequence[Router], tell: Tell) -> list[RemovableHandle]:
    """Tell what the routers chose, once a forward has passed the last of them.

    Args:
        routers: in the order of the layers.
        tell: is given one `Routing` a layer, as earlier hooks left them, to keep; of a forward that failed, or was
            under way when the hooks came, it is told nothing.

    Returns:
        The hooks; remove them to see no more.
    """
    forward = _Forward(len(routers), tell)
    return [router.register_forward_hook(Observer(forward, layer)) for layer, router in enumerate(routers)]


def observers(hooks: Mapping[int, Any]) -> list[Observer] | None:
    """A router's hooks, where all of them merely observe; None where one may do something else."""
    found = [hook for hook in hooks.values() if type(hook) is Observer]
    return found if len(found) == len(hooks) else None


@contextmanager
def observed(model: Mixtral, tell: Tell) -> Iterator[None]:
    """`observe` a model's routers meanwhile."""
    with _removed(observe(model.routers(), tell)):
        yield


@contextmanager
def rerouted(model: Mixtral, choose: Choose) -> Iterator[None]:
    """Let something else choose in the routers' place meanwhile.

    Args:
        choose: is given layer, router, its input [T, D] and what it chose; what it returns is computed with.
    """
    hooks = [
        router.register_forward_hook(partial(_choose, choose, layer)) for layer, router in enumerate(model.routers())
    ]
    with _removed(hooks):
        yield


@contextmanager
def _removed(hooks: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _choose(choose: Choose, layer: int, router: Router, inputs: tuple[Tensor], routing: Routing) -> Routing:
    return choose(layer, router, inputs[0], routing)
