import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from app.bundle import BundleError
from app.engine.program import FUSED, load_program, save_program

CPU = torch.device("cpu")


class Net(nn.Module):
    """A parameter, a buffer, a constant and two inputs, given to the graph in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, features: Tensor, kinds: Tensor) -> Tensor:
        known = (kinds > 0).float()[:, None]
        linear = F.dropout(self.linear(features), training=self.training)[:, -3:]
        return torch.relu(linear) * self.scale - known * torch.tensor([0.5, 0.25, 0.125])


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def exported(net: Net) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(
        net, (torch.rand(5, 4), torch.ones(5, dtype=torch.int64)), dynamic_shapes=({0: batch}, {0: batch})
    )


@pytest.fixture(scope="module")
def saved(exported: torch.export.ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    assert save_program(exported, path) == "net.pt2"
    return path


@pytest.mark.parametrize("size", [1, 2, 5, 333])
def test_what_was_saved_computes_the_same(net: Net, saved: Path, size: int) -> None:
    features, kinds = torch.randn(size, 4), torch.arange(size) % 3
    with torch.inference_mode():
        assert torch.equal(load_program(saved, CPU)(features, kinds), net(features, kinds))


def test_what_has_no_effect_is_not_run(net: Net, saved: Path) -> None:
    def operators(program: Callable[..., Tensor]) -> set[str]:
        with torch.inference_mode(), torch.profiler.profile() as profile:
            program(torch.randn(2, 4), torch.ones(2, dtype=torch.int64))
        return {event.key for event in profile.key_averages()}

    assert "aten::dropout" in operators(net)
    run = operators(load_program(saved, CPU))
    assert "aten::linear" in run
    assert "aten::dropout" not in run


@pytest.mark.skipif(not FUSED, reason="oneDNN computes no bfloat16 here")
@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_bfloat16_run_with_their_relu(tmp_path: Path, bias: bool) -> None:
    layers = nn.Sequential(nn.Linear(40, 24, bias=bias), nn.ReLU(), nn.Linear(24, 8, bias=bias), nn.ReLU())
    layers = layers.bfloat16().eval()
    rows = torch.export.Dim("rows", min=1)
    exported = torch.export.export(layers, (torch.zeros(8, 40).bfloat16(),), dynamic_shapes=({0: rows},))
    save_program(exported, tmp_path / "layers.pt2")
    run = load_program(tmp_path / "layers.pt2", CPU)
    for size in (1, 64, 1000):
        features = torch.randn(size, 40).bfloat16()
        with torch.inference_mode(), torch.profiler.profile() as profile:
            found = run(features)
        assert not {"aten::relu", "aten::linear"} & {event.key for event in profile.key_averages()}
        with torch.inference_mode():
            assert torch.equal(found, layers(features))


def test_layers_of_bfloat16_run_without_onednn_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engine.program.FUSED", False)
    layers = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).bfloat16().eval()
    save_program(torch.export.export(layers, (torch.zeros(2, 4).bfloat16(),)), tmp_path / "layers.pt2")
    features = torch.randn(2, 4).bfloat16()
    with torch.inference_mode():
        assert torch.equal(load_program(tmp_path / "layers.pt2", CPU)(features), layers(features))


def test_loading_twice_gives_two_programs(net: Net, saved: Path) -> None:
    features, kinds = torch.randn(2, 4), torch.ones(2, dtype=torch.int64)
    first, second = load_program(saved, CPU), load_program(saved, CPU)
    assert torch.equal(first(features, kinds), second(features, kinds))


def test_nothing_saved_is_pickled(saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        contents = {entry.filename.partition("/")[2]: archive.read(entry) for entry in archive.infolist()}
    assert contents.pop("data/sample_inputs/model.pt") == b""
    assert not any(name.endswith((".pt", ".pkl")) or "obj" in name for name in contents)
    assert not any(b'"use_pickle": true' in content for content in contents.values())


def rewritten(saved: Path, to: Path, change: Callable[[str, bytes], bytes], **more: bytes) -> Path:
    """The archive with every entry changed, and entries added."""
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(to, "w", zipfile.ZIP_STORED) as target:
        root = source.namelist()[0].partition("/")[0]
        for entry in source.infolist():
            target.writestr(entry, change(entry.filename.partition("/")[2], source.read(entry)))
        for name, content in more.items():
            target.writestr(f"{root}/{name}", content)
    return to


def test_an_archive_with_pickled_sample_inputs_is_refused(
    exported: torch.export.ExportedProgram, tmp_path: Path
) -> None:
    torch.export.save(exported, tmp_path / "net.pt2")
    with pytest.raises(BundleError, match="sample_inputs"):
        load_program(tmp_path / "net.pt2", CPU)


def test_an_archive_with_pickled_parts_is_refused_and_they_are_not_read(saved: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    pickled = f"cos\nmkdir\n(S'{trap}'\ntR.".encode()
    pickled += bytes(-len(pickled) % 4)  # whole float32s, or it is not even looked at
    meta = {
        "dtype": 7,
        "sizes": [{"as_int": 1}],
        "requires_grad": False,
        "device": {"type": "cpu", "index": None},
        "strides": [{"as_int": 1}],
        "storage_offset": {"as_int": 0},
        "layout": 7,
    }

    def config(kind: str, path_name: str, use_pickle: bool) -> Callable[[str, bytes], bytes]:
        payload = {"path_name": path_name, "is_param": False, "use_pickle": use_pickle, "tensor_meta": meta}
        changed = json.dumps({"config": {"stowaway": payload}}).encode()
        return lambda name, content: changed if name == f"data/{kind}/model_{kind}_config.json" else content

    archives = [
        rewritten(saved, tmp_path / "1.pt2", config("weights", "weight_9", True), **{"data/weights/weight_9": pickled}),
        rewritten(
            saved, tmp_path / "2.pt2", config("constants", "tensor_9", True), **{"data/constants/tensor_9": pickled}
        ),
        # torch.export.load unpickles these whatever `use_pickle` says.
        rewritten(
            saved,
            tmp_path / "3.pt2",
            config("constants", "opaque_obj_0", False),
            **{"data/constants/opaque_obj_0": pickled},
        ),
        rewritten(saved, tmp_path / "4.pt2", config("constants", "opaque_obj_0", False)),
        rewritten(
            saved,
            tmp_path / "5.pt2",
            config("constants", "custom_obj_0", False),
            **{"data/constants/custom_obj_0": pickled},
        ),
        # Formats of before 2.8.
        rewritten(saved, tmp_path / "6.pt2", _unchanged, **{"data/weights/model.pt": pickled}),
        rewritten(saved, tmp_path / "7.pt2", _unchanged, **{"data/constants/model.pt": pickled}),
        # Machine code.
        rewritten(saved, tmp_path / "8.pt2", _unchanged, **{"data/aotinductor/model/model.so": b"\x7fELF"}),
        rewritten(saved, tmp_path / "9.pt2", lambda name, content: pickled if "sample_inputs" in name else content),
    ]
    for archive in archives:
        with pytest.raises(BundleError, match=r"carries"):
            load_program(archive, CPU)
    assert not trap.exists()


def _unchanged(name: str, content: bytes) -> bytes:
    return content


def test_code_in_the_place_of_a_size_or_an_operator_is_refused_and_not_run(saved: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    expression = f"__import__('os').mkdir('{trap}') or 1"

    def graph(pattern: str, replacement: str) -> Callable[[str, bytes], bytes]:
        def change(name: str, content: bytes) -> bytes:
            if name != "models/model.json":
                return content
            changed = re.sub(pattern, replacement, content.decode())
            assert changed.encode() != content
            return changed.encode()

        return change

    for pattern, replacement in (
        (r'"expr_str": "[^"]*"', f'"expr_str": "{expression}"'),
        (r'"target": "torch\.ops\.aten\.relu\.default"', '"target": "torch.os.system"'),
        (r'"target": "torch\.ops\.aten\.relu\.default"', '"target": "torch.load"'),
        (r'"target": "torch\.ops\.aten\.relu\.default"', '"target": "_operator.methodcaller"'),
    ):
        with pytest.raises(BundleError, match=r"in the place of a size|which is not run"):
            load_program(rewritten(saved, tmp_path / "code.pt2", graph(pattern, replacement)), CPU)
    assert not trap.exists()


def test_an_archive_of_the_format_of_before_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("version", "8.8")
        for name in ("exported_program.json", "state_dict.pt", "constants.pt", "example_inputs.pt"):
            archive.writestr(f"serialized_{name}", b"")
    with pytest.raises(BundleError, match="carries version"):
        load_program(tmp_path / "old.pt2", CPU)


def test_a_rewritten_archive_with_nothing_changed_is_taken(saved: Path, tmp_path: Path) -> None:
    load_program(rewritten(saved, tmp_path / "same.pt2", _unchanged), CPU)


@pytest.mark.parametrize("left_out", ["models/model.json", "archive_format", "data/weights/model_weights_config.json"])
def test_an_archive_with_a_part_missing_is_refused(saved: Path, tmp_path: Path, left_out: str) -> None:
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(tmp_path / "part.pt2", "w") as target:
        for entry in source.infolist():
            if not entry.filename.endswith(left_out):
                target.writestr(entry, source.read(entry))
    with pytest.raises(BundleError, match=r"part\.pt2: "):
        load_program(tmp_path / "part.pt2", CPU)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"net\.pt2: "):
        load_program(tmp_path / "net.pt2", CPU)


@settings(max_examples=40, deadline=None)
@given(content=st.binary(max_size=200), place=st.floats(0, 1, exclude_max=True))
def test_garbage_and_a_program_cut_anywhere_are_refused(
    tmp_path_factory: pytest.TempPathFactory, saved: Path, content: bytes, place: float
) -> None:
    path = tmp_path_factory.mktemp("garbage") / "net.pt2"
    whole = saved.read_bytes()
    for garbage in (content, whole[: int(place * len(whole))], content + whole[len(content) + 1 :]):
        path.write_bytes(garbage)
        with pytest.raises(BundleError, match=r"net\.pt2"):
            load_program(path, CPU)


@settings(max_examples=15, deadline=None)
@given(graph=st.recursive(st.none() | st.integers(-1, 1) | st.text(max_size=3), st.lists, max_leaves=3))
def test_a_graph_of_garbage_is_refused(tmp_path_factory: pytest.TempPathFactory, saved: Path, graph: object) -> None:
    content = json.dumps(graph).encode()
    archive = rewritten(
        saved,
        tmp_path_factory.mktemp("graph") / "net.pt2",
        lambda name, whole: content if name == "models/model.json" else whole,
    )
    with pytest.raises(BundleError, match=r"net\.pt2: "):
        load_program(archive, CPU)
