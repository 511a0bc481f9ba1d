"""torch.export archives without pickle: how a bundle carries the networks that the service runs."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.export.passes import move_to_device_pass
from torch.fx.graph import CodeGen

from app.bundle import BundleError

Program = Callable[..., Tensor]


def save_program(exported: torch.export.ExportedProgram, path: Path) -> str:
    """Writes the program without its sample inputs, the one part of an archive that is always pickled."""
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            target.writestr(entry, b"" if "/data/sample_inputs/" in entry.filename else source.read(entry))
    return path.name


def load_program(path: Path, device: torch.device) -> Program:
    """Raises `BundleError` for anything that is not a program written by `save_program`.

    torch.export.load would unpickle payloads that an archive marks so; such an archive is refused unread.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if "/data/sample_inputs/" in entry.filename and entry.file_size:
                    raise BundleError(f"{path.name} carries pickled sample inputs")
                if entry.filename.endswith("_config.json") and _pickled(json.loads(archive.read(entry))):
                    raise BundleError(f"{path.name} carries pickled tensors")
        exported = torch.export.load(path)
        if device.type != "cpu":
            exported = move_to_device_pass(exported, device)
        state = {**exported.state_dict, **exported.constants}
        lifted = [
            state[spec.target]
            for spec in exported.graph_signature.input_specs
            if spec.kind is not InputKind.USER_INPUT and spec.target is not None
        ]
    except (OSError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path.name}: {error}") from error
    # `exported.module()` flattens pytrees and checks shapes in Python on every call: six times the
    # cost of a small encoder. The graph itself, called with its parameters, costs what eager costs.
    graph = exported.graph_module
    graph.graph.set_codegen(CodeGen())
    graph.recompile()

    def run(*inputs: Tensor) -> Tensor:
        outputs: tuple[Tensor, ...] = graph(*lifted, *inputs)
        return outputs[0]

    return run


def _pickled(config: Any) -> bool:
    if isinstance(config, dict):
        return bool(config.get("use_pickle")) or any(map(_pickled, config.values()))
    return isinstance(config, list) and any(map(_pickled, config))
