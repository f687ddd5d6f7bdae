"""What every pass needs of a graph: constants as arrays, new initializers, one consumer, a node in another's place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """The constant that a value holds; None when it is computed."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """An initializer of that name: a new one, or the present one if it holds the same array."""
    present = graph.initializers.get(name)
    if present is not None:
        held = array_of(present)
        assert held is not None and held.dtype == array.dtype and np.array_equal(held, array), f"{name} exists"
        return present
    # Not ascontiguousarray, which makes a vector of a scalar.
    tensor = ir.tensor(np.asarray(array, order="C"), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def nodes(model: ir.Model, op_type: str) -> Iterator[ir.Node]:
    """The graph's nodes of one kind, as they are now: a pass may change the graph while it goes on."""
    yield from [node for node in model.graph if node.op_type == op_type and node.domain in ("", "ai.onnx")]


def source(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes a value, if it is of that kind."""
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == op_type else None


def only_consumer(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that reads a value, if it is of that kind and the value is no output of the graph."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != op_type:
        return None
    return uses[0].node


def replace(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    """Put `new` in the place of `old`; the last one's output takes over its name, type, shape and readers."""
    graph.insert_before(old, new)
    before, after = old.outputs[0], new[-1].outputs[0]
    after.shape, after.type = before.shape, before.type
    after.name, before.name = before.name, None
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def is_parameter_quantizer(node: ir.Node) -> bool:
    """Whether a QuantizeLinear belongs to a weight: capture wrote the bounds of its grid beside it."""
    return "quant_min" in node.attributes


def integer_attribute(node: ir.Node, name: str, default: int) -> int:
    """An attribute of a node that holds an integer."""
    return node.attributes.get_int(name, default)
