"""torch.export archives without pickle: how a bundle carries the networks that the service runs."""

import io
import json
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export.graph_signature import InputKind
from torch.export.passes import move_to_device_pass
from torch.fx.graph import CodeGen, Graph
from torch.fx.node import Node

from app.bundle import BundleError

Program = Callable[..., Tensor]

_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_PLAIN_TENSOR = re.compile(r"(weight|tensor)_\d+")
_PLAIN = re.compile(
    r"models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
)
_SIZE = re.compile(r"(Symbol\('\w+'(, (positive|integer)=True)*\)|Integer\(-?\d+\)|Add|Mul|[(), ])+")
_WHOLE = (), (0,), (0, None), (0, sys.maxsize), (None, None)
"""From where to where a slice goes that is all there is."""
_NO_EFFECT = {"dropout", "slice", "_assert_tensor_metadata"}
"""Operators that may go where nothing uses what they give."""
FUSED = (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
"""Whether oneDNN, which not every build of torch has, computes in bfloat16 on this processor."""
_OPERATOR = re.compile(r"torch\.ops\.aten\.\w+\.\w+")


def save_program(exported: torch.export.ExportedProgram, path: Path) -> str:
    """Writes the program without its sample inputs, the one part of an archive that is always pickled."""
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            target.writestr(entry, b"" if entry.filename.endswith(_SAMPLE_INPUTS) else source.read(entry))
    return path.name


def load_program(path: Path, device: torch.device) -> Program:
    """Raises `BundleError` for anything that is not a program written by `save_program`.

    torch.export.load would unpickle sample inputs, tensors and objects that an archive marks so, read older
    formats that are pickled whole, load compiled code, and evaluate what stands where a size should; an archive with
    any part of these, or with other operators than tensor ones, is refused unread.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = entry.filename.partition("/")[2]
                if name == _SAMPLE_INPUTS and not entry.file_size:
                    continue
                if not _PLAIN.fullmatch(name):
                    raise BundleError(f"{path.name} carries {entry.filename}, which is not read")
                if name.endswith("_config.json") and not _plain(json.loads(archive.read(entry))):
                    raise BundleError(f"{path.name} carries pickled tensors")
                if name == "models/model.json":
                    _check_graph(json.loads(archive.read(entry)), path.name)
        exported = torch.export.load(path)
        if device.type != "cpu":
            exported = move_to_device_pass(exported, device)
        state = {**exported.state_dict, **exported.constants}
        lifted = [
            state[spec.target]
            for spec in exported.graph_signature.input_specs
            if spec.kind is not InputKind.USER_INPUT and spec.target is not None
        ]
        graph = exported.graph_module
        if device.type == "cpu" and FUSED:
            _fuse(graph.graph)
        _simplify(graph.graph)
    except BundleError:
        raise
    except Exception as error:
        # There is no end to what the readers of a garbled archive raise.
        raise BundleError(f"{path.name}: {error!r}") from error
    # `exported.module()` flattens pytrees and checks shapes in Python on every call: six times the
    # cost of a small encoder. The graph itself, called with its parameters, costs what eager costs.
    graph.graph.set_codegen(CodeGen())
    graph.recompile()

    def run(*inputs: Tensor) -> Tensor:
        outputs: tuple[Tensor, ...] = graph(*lifted, *inputs)
        return outputs[0]

    return run


def _fuse(graph: Graph) -> None:
    """Makes layers of bfloat16 one operator with their relu, which alone takes half as long as the layer."""
    for node in list(graph.nodes):
        linear = node.args[0] if node.target is torch.ops.aten.relu.default else None
        if (
            isinstance(linear, Node)
            and linear.target is torch.ops.aten.linear.default
            and linear.meta["val"].dtype is torch.bfloat16
            and len(linear.users) == 1
        ):
            with graph.inserting_before(node):
                rows, weight, bias = (*linear.args, None)[:3]
                both = torch.ops.mkldnn._linear_pointwise.default
                node.replace_all_uses_with(graph.call_function(both, (rows, weight, bias, "relu", [], "")))
            graph.erase_node(node)
            graph.erase_node(linear)


def _simplify(graph: Graph) -> None:
    """Leaves the same arithmetic in fewer and shorter calls: a fifth of what an encoder takes for one shopper."""
    for node in list(graph.nodes):
        if not isinstance(node.target, OpOverload):
            continue
        name = node.target.overloadpacket.__name__
        if (name == "dropout" and not node.args[2]) or (name == "slice" and node.args[2:] in _WHOLE):
            node.replace_all_uses_with(node.args[0])
        if name in _NO_EFFECT and not node.users:
            graph.erase_node(node)
            continue
        for place in (torch, Tensor):
            # The operator's own binding finds the arguments sooner. Functions written in Python may do something else.
            if isinstance(own := getattr(place, name, None), BuiltinFunctionType | MethodDescriptorType):
                node.target = own
                break


def _check_graph(part: Any, file: str) -> None:
    if isinstance(part, dict):
        size, target = part.get("expr_str"), part.get("target")
        if size is not None and not _SIZE.fullmatch(size):
            raise BundleError(f"{file} carries code in the place of a size")
        # What begins so, torch looks up as a function; any other target names a parameter.
        if (
            isinstance(target, str)
            and target.startswith(("torch", "_operator", "math", "#"))
            and not _OPERATOR.fullmatch(target)
        ):
            raise BundleError(f"{file} carries the operator {target}, which is not run")
        part = part.values()
    elif not isinstance(part, list):
        return
    for inner in part:
        _check_graph(inner, file)


def _plain(config: Any) -> bool:
    payloads = config["config"].values()
    return all(not payload["use_pickle"] and _PLAIN_TENSOR.fullmatch(payload["path_name"]) for payload in payloads)
